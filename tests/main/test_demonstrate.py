"""The program that teachers draw by, killed outright as often as it takes: its set is the one of a run left alone."""

import subprocess
import time
from pathlib import Path

import pytest

from fopd_jax.tasks.demonstrations import Demonstrations
from tests.configs import FOLDER, options
from tests.parallel.processes import finish, free_port, start

TEXT = ["--tasks=text", "--config.tasks.text.rewards.quality=1", "--best-of=2", "--config.eval.batch_size=4"]
TIMEOUT_S, SHARDS = 300.0, "demonstrations-*"  # whole ones: what is begun has a name that begins with a dot
SETTINGS = {"eval.num_steps": 2, "eval.batch_size": 2, "run.compiled": ""}


def _words(out: Path, *flags: str) -> list[str]:
    words = ["-m", "fopd_jax.demonstrate", f"--config={FOLDER}/miniature.py", f"--out={out}"]
    given = ["--per-task=8", "--shard-rows=2", "--trajectories", "--dtype=float16", *options(SETTINGS), *flags]
    return [*words, *given]


def _start(out: Path, *flags: str) -> "subprocess.Popen[str]":
    return start(_words(out, *flags), 0)


def _finish(out: Path, *flags: str) -> str:
    with _start(out, *flags) as process:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    return said


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_outright_it_resumes_to_the_same_bytes(tmp_path: Path):
    straight, killed, kills = tmp_path / "straight", tmp_path / "killed", 0
    assert "text: 8 demonstrations" in _finish(straight)
    while kills < 3:
        before = len(list(killed.glob(SHARDS)))
        with _start(killed) as process:
            deadline = time.monotonic() + TIMEOUT_S
            while len(list(killed.glob(SHARDS))) <= before and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            process.kill()
        assert process.returncode == -9
        kills += 1
    assert not (killed / "dataset_info.json").exists()
    assert "shards are there" in _finish(killed)
    assert _bytes(killed) == _bytes(straight)
    rows = Demonstrations(killed, "text", "f").rows(range(8))
    assert {row["states"].shape for row in rows} == {(2, 24, 24, 3)}


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path):
    """On the same four devices: scores, the choice among candidates and all that is kept, to the byte."""
    (one, two), port = (tmp_path / name for name in "12"), free_port()
    member = [f"--coordinator=localhost:{port}", "--num-processes=2"]
    programs = [start(_words(two, *TEXT, *member, f"--process-id={process}"), 2) for process in range(2)]
    said = finish([start(_words(one, *TEXT), 4), *programs])
    assert _bytes(two) == _bytes(one)
    assert len(list(two.glob(SHARDS))) == 4
    assert all("text: 8 demonstrations, mean score" in each for each in said[:2])
    rows = Demonstrations(two, "text", "f").rows(range(8))
    assert {bool(row["sample"]) for row in rows} == {False, True}  # the second candidate is the better one at times
