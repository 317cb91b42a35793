"""What a workdir tells of the times that a run was started in it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from fopd_jax.config.identity import config_hash
from fopd_jax.config.parse import flatten, resolve
from fopd_jax.performance import host
from fopd_jax.running import preemption, records
from fopd_jax.running.preemption import Preempted
from tests.configs import load

FIELDS = flatten(resolve(load()))


@pytest.fixture(autouse=True)
def _commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_output", lambda command: "abc" if "status" not in command else "")


def _starts(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "run.json").read_text())["starts"]


def test_a_start_says_who_where_when_and_with_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--config=x.py", "--config.run.steps=3"])
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    with records.keeping(tmp_path, FIELDS, {"of": 3}):
        (start,) = _starts(tmp_path)
        assert (start["status"], start["ended"]) == ("running", None)
        (tmp_path / "checkpoints" / "40").mkdir()
    (ended,) = _starts(tmp_path)
    assert start | {"status": "finished", "ended": ended["ended"], "at_step": 40} == ended
    assert ended["ended"] >= ended["began"]
    assert ended["config"] == json.loads(json.dumps(FIELDS))
    assert ended["config_hash"] == config_hash(resolve(load()))
    assert (ended["from_step"], ended["of"], ended["commit"], ended["pid"]) == (20, 3, "abc", os.getpid())
    assert ended["command"][0] == sys.executable
    assert ended["command"][-2:] == ["--config=x.py", "--config.run.steps=3"]
    assert ended["folder"] == os.getcwd()
    assert ended["versions"].keys() == {"python", *records.PACKAGES}
    assert ended["versions"]["jax"] == jax.__version__
    assert (ended["backend"], ended["devices"], ended["processes"]) == ("cpu", {"cpu": jax.device_count()}, 1)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Preempted(signal.SIGHUP, 7, 0.1), "stopped by SIGHUP"),
        (KeyboardInterrupt(), "stopped by SIGINT"),
        (
            FloatingPointError("step 3: metric\n'loss' is nan"),
            "failed: FloatingPointError: step 3: metric 'loss' is nan",
        ),
        (ValueError("run.mesh: no"), "failed: run.mesh: no"),
    ],
)
def test_how_a_run_ended_is_told_and_goes_on_its_way(tmp_path: Path, error: BaseException, status: str):
    with pytest.raises(type(error)), records.keeping(tmp_path, FIELDS):
        raise error
    assert [start["status"] for start in _starts(tmp_path)] == [status]


def test_a_later_start_is_added_and_tells_who_went_without_a_word(tmp_path: Path):
    with records.keeping(tmp_path, FIELDS):
        killed = (tmp_path / "run.json").read_bytes()
    (tmp_path / "run.json").write_bytes(killed)
    for _ in range(2):
        with records.keeping(tmp_path, FIELDS):
            pass
    assert [start["status"] for start in _starts(tmp_path)] == [records.GONE, "finished", "finished"]
    assert {path.name for path in tmp_path.iterdir()} == {"run.json"}


def test_the_newest_starts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "MOST_STARTS", 2)
    for number in range(3):
        with records.keeping(tmp_path, FIELDS, {"number": number}):
            pass
    assert [start["number"] for start in _starts(tmp_path)] == [1, 2]


def test_a_record_that_cannot_be_read_or_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run.json").write_text("{")
    with records.keeping(tmp_path, FIELDS):
        pass
    assert "run.json: damaged" in capsys.readouterr().err
    assert (tmp_path / "run.json.damaged").read_text() == "{"
    assert len(_starts(tmp_path)) == 1

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_json", full)
    with records.keeping(tmp_path, FIELDS):
        pass
    assert capsys.readouterr().err.count("run.json could not be written ([Errno 28] No space left on device)") == 2


def test_a_checkpoint_that_is_gone_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for left, told in (([20, 40], ""), ([20], "step 40, whose checkpoint is gone; the newest is of step 20"), ([], "")):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        for step in left:
            (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        told = told or ("" if left else "step 20, whose checkpoint is gone; there is none: this begins again")
        with records.keeping(tmp_path, FIELDS):
            error = capsys.readouterr().err
        assert told in error
        assert bool(error) == bool(told)


def test_process_0_alone_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "is_main", lambda: False)
    with records.keeping(tmp_path, FIELDS):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_signal_before_training_is_told(tmp_path: Path):
    """Where nothing is to be saved, the process ends at once, in the middle of a compilation."""
    with records.keeping(tmp_path, FIELDS):
        preemption._say_last_words("SIGTERM")
        assert [start["status"] for start in _starts(tmp_path)] == ["stopped by SIGTERM"]
    assert preemption._last_words == []


LEAVING = """
import os, signal, sys, time
from fopd_jax.running import preemption
preemption.leave_at_once()
with preemption.last_words(lambda name: open(sys.argv[1], "w").write(name)):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_last_words_are_said_before_the_process_is_gone(tmp_path: Path):
    command = [sys.executable, "-c", LEAVING, str(tmp_path / "said")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "said").read_text() == "SIGTERM"
