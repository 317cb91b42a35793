"""The life of a run on a TPU pod, with gcloud played by a script of answers."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from fopd_jax.exits import BAD_INPUT

FLAGS = ("--zone=z", "--poll-seconds=0")


def play(shell, folder: Path, pod: Sequence[str], program: Sequence[str], fails: str = "") -> None:
    """gcloud tells the states of the pod and of the program on its first host one after the other."""
    (folder / "pod").write_text("\n".join([*pod, ""]))
    (folder / "program").write_text("\n".join([*program, ""]))
    shell.stub(
        "gcloud",
        f"""
next() {{ read -r state <"{folder}/$1" || exit 9; sed -i 1d "{folder}/$1"
[[ $state != NONE ]] && echo "$state"; }}
case "$*" in
  *" describe "*) next pod ;;
  *"tpu_worker.sh state"*) next program ;;
  {fails or "nothing fails"}) exit 1 ;;
esac""".replace("nothing fails", '"nothing fails"'),
    )


def verbs(shell) -> list[str]:
    """What was asked of gcloud and of the hosts, looks at their state and copying left out."""
    asked = [re.search(r"tpu_worker\.sh (\w+)|tpu-vm (create|delete) ", call) for call in shell.calls()]
    found = [match[1] or match[2] for match in asked if match]
    return [verb for verb in found if verb != "state"]


@pytest.fixture
def run(shell, tmp_path):
    def start(pod: Sequence[str], program: Sequence[str], *flags: str, status: int = 0, fails: str = "") -> str:
        play(shell, tmp_path, pod, program, fails)
        return shell.run("tpu_pod.sh", "run", *FLAGS, *flags, status=status).stderr

    return start


def test_creates_a_pod_and_runs_to_the_end(shell, run) -> None:
    run(["NONE", "READY", "READY"], ["exited"])
    assert verbs(shell) == ["create", "install", "start", "follow"]


def test_uses_the_pod_that_is_there(shell, run) -> None:
    run(["CREATING", "READY", "READY"], ["exited"])
    assert verbs(shell) == ["install", "start", "follow"]


def test_goes_on_on_a_new_pod_after_a_preemption(shell, run) -> None:
    run(["READY", "READY", "PREEMPTED", "PREEMPTED", "NONE", "READY", "READY"], ["running", "exited"])
    once = ["install", "start", "follow"]
    assert verbs(shell) == [*once, "delete", "create", *once]


def test_a_broken_connection_only_follows_again(shell, run) -> None:
    run(["READY", "READY", "READY"], ["running", "exited"], fails='*"tpu_worker.sh follow"*')
    assert verbs(shell) == ["install", "start", "follow", "follow"]


def test_starts_again_where_a_host_came_back_without_the_program(shell, run) -> None:
    run(["READY", "READY", "READY"], ["dead", "exited"])
    assert verbs(shell) == ["install", "start", "follow", "start", "follow"]


def test_a_program_that_keeps_failing_ends_the_run(run) -> None:
    assert "the program failed 4 times" in run(["READY", "READY"], ["failed"], "--max-restarts=3", status=2)


def test_bad_input_ends_the_run_at_once(shell, run) -> None:
    assert "the program found bad input, which no restart can mend" in run(["READY", "READY"], ["refused"], status=2)
    assert verbs(shell) == ["install", "start", "follow"]


@pytest.mark.parametrize(("state", "status", "told"), [("failed", 2, "refused"), ("failed", 1, "failed"),
                                                       ("running", 2, "running")])  # fmt: skip
def test_a_host_tells_bad_input_from_other_failures(shell, state, status, told) -> None:
    shell.stub("systemctl", f"[[ $* == *ExecMainStatus* ]] && echo {status} || echo {state}")
    assert shell.run("tpu_worker.sh", "state").stdout == f"{told}\n"


def test_a_pod_that_cannot_be_made_is_given_up(shell, run) -> None:
    stderr = run(["NONE"] * 9, [], "--max-restarts=2", status=2, fails='*" create "*')
    assert "gave up after 2 restarts on pod fopd" in stderr
    assert verbs(shell) == ["create"] * 3


def test_stop_lets_every_host_save(shell) -> None:
    shell.run("tpu_pod.sh", "stop", *FLAGS)
    (call,) = shell.calls()
    assert "--worker=all" in call
    assert "tpu_worker.sh stop" in call


def test_stopping_a_host_is_a_signal_and_then_patience(shell) -> None:
    shell.run("tpu_worker.sh", "start")
    stop, _, start = shell.calls()
    assert stop == "sudo systemctl stop fopd"  # one at a time, and what ran before saves first
    assert "--property=KillMode=mixed --property=TimeoutStopSec=60" in start
    assert "--property=Restart=on-failure" in start
    assert f"--property=RestartPreventExitStatus={BAD_INPUT} " in start
