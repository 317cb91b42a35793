"""The batch script's life: crashes, the warning before the time limit, cancellation; Slurm is played."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"


def started(shell, **variables: str) -> subprocess.Popen[str]:
    variables = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(REPOSITORY), **variables}
    environment = shell.environment(**variables)
    command = [str(shell.commands / "bash"), str(SCRIPT), "--max-restarts=2"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def waits_for(path: Path) -> str:
    return f'while [ ! -e "{path}" ]; do sleep 0.05; done'


@pytest.fixture
def warned(shell, tmp_path):
    """Status of a job that is warned while its processes run; they end with `ends` when scancel reaches them."""

    def run(ends: int, state: str) -> int:
        shell.stub("srun", f'echo >"{tmp_path}/running"; {waits_for(tmp_path / "signalled")}; exit {ends}')
        shell.stub("scancel", f'echo >"{tmp_path}/signalled"')
        shell.stub("squeue", f"echo {state}")
        job = started(shell)
        deadline = time.monotonic() + 30
        while not (tmp_path / "running").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=30)
        return job.returncode

    return run


def names(shell) -> list[str]:
    return [call.split()[0] for call in shell.calls()]


def test_finished_program_ends_the_job(shell) -> None:
    job = started(shell)
    job.communicate(timeout=30)
    assert job.returncode == 0
    assert names(shell) == ["srun"]


def test_crashes_start_again_within_limits(shell) -> None:
    shell.stub("srun", "exit 3")
    job = started(shell)
    job.communicate(timeout=30)
    assert job.returncode == 3
    assert names(shell) == ["srun"] * 3


def test_bad_input_is_not_tried_again(shell) -> None:
    shell.stub("srun", "exit 2")
    job = started(shell)
    job.communicate(timeout=30)
    assert job.returncode == 2
    assert names(shell) == ["srun"]


def test_time_limit_saves_and_requeues(shell, warned) -> None:
    assert warned(143, "RUNNING") == 143
    assert names(shell) == ["srun", "scancel", "squeue", "scontrol"]
    assert shell.calls()[1] == "scancel --signal=TERM 7"  # the processes, not this shell and not srun
    assert shell.calls()[-1] == "scontrol requeue 7"


def test_cancelled_job_stays_cancelled(shell, warned) -> None:
    assert warned(143, "COMPLETING") == 143
    assert names(shell) == ["srun", "scancel", "squeue"]


def test_run_that_ends_in_its_last_minute_is_not_requeued(shell, warned) -> None:
    assert warned(0, "RUNNING") == 0
    assert names(shell) == ["srun", "scancel"]


def test_one_process_for_each_gpu() -> None:
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    given = dict(option.removeprefix("--").split("=", 1) for option in options if "=" in option)
    assert given["ntasks-per-node"] == given["gpus-per-node"]
    assert given["signal"] == "B:TERM@60"
    assert "--requeue" in options
