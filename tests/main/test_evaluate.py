"""The program that evaluates several models: its command line, killed outright, and on two processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from fopd_jax.config.parse import override, resolve
from fopd_jax.config.recorded import RECORD_FILE, recorded_config
from fopd_jax.stages.evaluation import Wish, evaluate_models
from tests.main.dying_reward import away_for
from tests.main.experiment import Program, one_error, snapshot, wait_for
from tests.parallel.processes import finish, free_port, start
from tests.quick import environment
from tests.test_sample import CONFIG

QUICK = ["--config.eval.num_steps=2", "--config.eval.batch_size=8"]
MODELS = ["--models", "base", "text=packaged:teacher_text.safetensors"]
JUDGE = ["--config.rewards.judge.kind=tests.main.dying_reward:judge", "--config.run.max_failed_rewards=0.5"]


def _line(out: Path, *flags: str) -> list[str]:
    return ["-m", "fopd_jax.evaluate", f"--config={CONFIG}", *MODELS, *QUICK, *flags, f"--out={out}"]


def _left(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in snapshot(out).items() if name not in ("run.json", "running.lock")}


def test_flags_of_the_other_use_are_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, *_line(tmp_path / "out", "--step=3")],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert one_error(done) == "error: --step: found 3 with --models, expected none\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_five_times_once_with_a_judge_away_and_the_same_bytes(tmp_path: Path):
    """By SIGKILL, as soon as more files of a kind are there; what the judge could not say is asked again."""
    around = environment(AWAY=str(tmp_path / "away"))

    def run(out: Path) -> subprocess.Popen[str]:
        line = [sys.executable, *_line(out, "--prompts=40", "--samples=2", *JUDGE)]
        return subprocess.Popen(line, env=around, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    finish([run(tmp_path / "whole")])
    killed = tmp_path / "killed"
    kinds = (("*.png", 5), ("*.png", 100), ("*.png", 250), ("scores/*.json", 3), ("records.jsonl", 2))
    for number, (kind, count) in enumerate(kinds):
        if number == 3:
            away_for(tmp_path / "away", 2)
        with run(killed) as process:
            alive = wait_for([process], lambda kind=kind, count=count: len(list(killed.rglob(kind))) >= count)
            assert alive, process.communicate()[0]
            process.kill()
    finish([run(killed)])
    finish([run(killed)])  # what failed
    assert _left(killed) == _left(tmp_path / "whole")
    assert len(list(killed.rglob("*.png"))) == 2 * 2 * 80


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One of two devices, two of one; a judge on each."""
    port, flags = free_port(), ["--prompts=9", "--samples=3", *JUDGE]
    monkeypatch.setenv("AWAY", str(tmp_path / "nowhere"))
    programs = [start(_line(tmp_path / "one", *flags), 2)]
    for process in range(2):
        member = [f"--coordinator=localhost:{port}", "--num-processes=2", f"--process-id={process}"]
        programs.append(start(_line(tmp_path / "two", *flags, *member), 1))
    finish(programs)
    one, two = _left(tmp_path / "one"), _left(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert one[name] == two[name], name


@pytest.mark.slow
def test_a_run_is_evaluated_at_its_newest_checkpoint(program: Program, tmp_path: Path):
    """As its exported student is; the run's folder names the config, too."""
    folder = program.run("evaluated", steps=2, checkpoint_every=1)
    models = {"student": str(folder), "exported": str(folder / "student.safetensors")}
    changes = {"eval.num_steps": 2, "eval.batch_size": 4}
    config = resolve(override(recorded_config(folder / RECORD_FILE), changes))
    before = snapshot(folder)
    cells = evaluate_models(config, Wish(models, ("text",), prompts=2, samples=1, also=("own",)), tmp_path / "out")
    assert snapshot(folder) == before
    kept, exported = (
        [record for cell in cells for record in cell.records if cell.model == name] for name in ("student", "exported")
    )
    assert [each.scores for each in kept] == [each.scores for each in exported]
    assert {cell.about["source"] for cell in cells} == {f"{folder}, step 2", str(folder / "student.safetensors")}
    assert {cell.settings.guidance for cell in cells if "own" in cell.setting} == {config.guidance}
