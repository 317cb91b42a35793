"""The program that teachers draw by, killed outright as often as it takes: its set is the one of a run left alone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fopd_jax.tasks.demonstrations import Demonstrations
from tests.configs import FOLDER, options
from tests.quick import environment

TIMEOUT_S, SHARDS = 300.0, "demonstrations-*"  # whole ones: what is begun has a name that begins with a dot
SETTINGS = {"eval.num_steps": 2, "eval.batch_size": 2, "run.compiled": ""}


def _start(out: Path, *flags: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "fopd_jax.demonstrate", f"--config={FOLDER}/miniature.py", f"--out={out}"]
    given = ["--per-task=8", "--shard-rows=2", "--trajectories", "--dtype=float16", *options(SETTINGS), *flags]
    return subprocess.Popen(
        [*words, *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def _finish(out: Path, *flags: str) -> str:
    with _start(out, *flags) as process:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    return said


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
    found, expected = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (killed, straight))
    assert found == expected
    rows = Demonstrations(killed, "text", "f").rows(range(8))
    assert {row["states"].shape for row in rows} == {(2, 24, 24, 3)}
