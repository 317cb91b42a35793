"""The watchdog tells of silence, with stacks, as long as it lasts; and of nothing else."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fopd_jax.running import watchdog
from fopd_jax.running.watchdog import EXIT_STATUS, Watchdog

SILENCE = 0.2  # seconds


def _reports(folder: Path, process: int = 0) -> list[str]:
    path = folder / f"hang_{process}.txt"
    return [line for line in path.read_text().splitlines() if "watchdog:" in line] if path.exists() else []


def _wait_for_reports(folder: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 30
    while len(_reports(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return _reports(folder)


def test_a_hang_is_reported_with_all_stacks_again_and_again(tmp_path: Path):
    with Watchdog(tmp_path, SILENCE) as dog:
        dog.beat("step 7")
        reports = _wait_for_reports(tmp_path, 2)
    assert all("after step 7" in report for report in reports)
    stacks = (tmp_path / "hang_0.txt").read_text()
    assert "test_a_hang_is_reported" in stacks  # this thread's
    assert "_watch" in stacks  # and its own
    time.sleep(3 * SILENCE)
    assert len(_reports(tmp_path)) <= len(reports) + 1  # it ends with the context


def test_a_run_that_beats_is_left_alone(tmp_path: Path):
    with Watchdog(tmp_path, 2.0) as dog:  # enough for a busy machine
        for step in range(60):
            dog.beat(f"step {step}")
            time.sleep(0.05)
    assert not any(tmp_path.iterdir())


def test_compiling_may_take_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watchdog, "COMPILING", 1000)
    with Watchdog(tmp_path, SILENCE):
        time.sleep(4 * SILENCE)
    assert not any(tmp_path.iterdir())


def test_zero_seconds_watch_nothing(tmp_path: Path):
    with Watchdog(tmp_path) as dog:
        dog.beat("step 1")
        time.sleep(SILENCE)
    assert not any(tmp_path.iterdir())


def test_on_request_it_ends_the_process(tmp_path: Path):
    program = (
        "import pathlib, sys, time\n"
        "from fopd_jax.running.watchdog import Watchdog\n"
        "with Watchdog(pathlib.Path(sys.argv[1]), 0.2, abort=True, process=3) as dog:\n"
        "    dog.beat('step 1')\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == EXIT_STATUS != 0
    assert f"ending with status {EXIT_STATUS}" in done.stderr
    assert "most recent call first" in done.stderr
    assert len(_reports(tmp_path, 3)) == 1
