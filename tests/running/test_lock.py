"""One run at a time in a workdir; what a dead one left is taken over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fopd_jax.running import lock, preemption
from fopd_jax.running.lock import FILE, holding


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lock, "SILENCE_S", 0.5)


def _left(folder: Path, host: str, pid: int) -> None:
    (folder / FILE).write_text(json.dumps({"host": host, "pid": pid, "since": "noon"}))


def test_a_second_run_is_refused_and_the_next_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with holding(tmp_path):
        monkeypatch.setattr(os, "getpid", lambda: -1)  # as another process
        with pytest.raises(ValueError, match=r"process \d+ on .* \(since .*\) is running in it"), holding(tmp_path):
            pass
        assert (tmp_path / FILE).exists()
    assert not list(tmp_path.iterdir())


def test_a_dead_process_of_this_host_is_noticed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    monkeypatch.setattr(lock, "_moves", lambda path, seconds: pytest.fail("not to be waited for"))
    _left(tmp_path, lock.socket.gethostname(), child.pid)
    with holding(tmp_path):
        assert f"process {child.pid} on " in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\0", b"[" * 100_000])
def test_one_that_shows_no_life_is_taken_over(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
):
    _left(tmp_path, "elsewhere", 1)
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with holding(tmp_path):
        assert capsys.readouterr().err.count("taken over") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pid", [10**30, float("inf"), "x", None])
def test_a_process_of_no_number_may_be_alive_and_is_waited_for(
    tmp_path: Path, pid: object, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / FILE).write_text(json.dumps({"host": lock.socket.gethostname(), "pid": pid, "since": "noon"}))
    with holding(tmp_path):
        error = capsys.readouterr().err
    assert error.count("may be running in it; looking for a sign of life for up to ") == 1
    assert error.count("taken over") == 1


def test_a_link_to_nothing_is_refused_at_once(tmp_path: Path):
    """There is nothing to be cleared, and the name is taken: without a word of its own that goes round for ever."""
    (tmp_path / FILE).symlink_to("nothing")
    for attempt in (lambda: lock.check(tmp_path), holding(tmp_path).__enter__):
        with pytest.raises(ValueError, match=r"running\.lock: a link, expected a file that a run has made"):
            attempt()


def test_looking_refuses_what_taking_would_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lock.check(tmp_path / "nowhere")
    with holding(tmp_path):
        monkeypatch.setattr(os, "getpid", lambda: -1)  # as another process
        with pytest.raises(ValueError, match="is running in it"):
            lock.check(tmp_path)
        monkeypatch.undo()
    _left(tmp_path, "elsewhere", 1)
    monkeypatch.setattr(lock, "_moves", lambda path, seconds: False)
    lock.check(tmp_path)  # dead: left for the one that takes it over
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_signal_that_ends_the_process_at_once_gives_the_folder_back(tmp_path: Path):
    with lock.holding(tmp_path):
        assert (tmp_path / lock.FILE).exists()
        preemption._say_last_words("SIGTERM")
        assert not (tmp_path / lock.FILE).exists()
