"""The profiler's window: a real trace of as many updates as asked for, whatever ends it; annotations; refusals."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.config.schema import Run
from fopd_jax.running import loop, profile
from fopd_jax.running.goodput import Goodput
from fopd_jax.running.profile import Profile, check
from fopd_jax.running.supervision import Supervision
from fopd_jax.steps.state import TrainState
from tests.running.toy import Recorder, Step, Toy, cadence, move


def _traced(folder: Path, window: tuple[int, int], step: Step = move, saved: TrainState | None = None) -> TrainState:
    """Eight updates, saved after every third, evaluated after every fourth."""
    recorder = Recorder(saved)
    with Goodput() as goodput:
        watch = Supervision(profile=Profile(folder, window), goodput=goodput)
        return loop.run(Toy(step), cadence(8, 1, 3, 4), recorder, recorder, watch)


def _events(folder: Path) -> list[dict[str, Any]]:
    """Everything that the one trace below a folder holds."""
    (path,) = folder.glob("profile/*/plugins/profile/*/*.trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb"))
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def _updates(folder: Path) -> list[int]:
    """Numbers of the updates in it."""
    return [int(event["args"]["step_num"]) for event in _events(folder) if event.get("name") == "train"]


def test_the_updates_of_the_window_are_traced_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _traced(tmp_path, (2, 5))
    assert _updates(tmp_path) == [2, 3, 4]
    assert (tmp_path / "profile" / "2_5").is_dir()
    assert f"profile: updates 2 to 4 are in {tmp_path}/profile/2_5\n" in capsys.readouterr().out


def test_phases_are_named_in_the_trace(tmp_path: Path):
    _traced(tmp_path, (2, 5))
    names = {event.get("name") for event in _events(tmp_path)}
    assert {"train", "data", "eval", "checkpoint"} <= names
    assert any("move" in str(name) for name in names)  # and what they ran


def test_a_trace_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _traced(tmp_path, (6, 100))
    assert _updates(tmp_path) == [6, 7]
    assert "profile: updates 6 to 7 are in" in capsys.readouterr().out


def test_a_trace_is_written_when_the_run_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    calls = itertools.count()

    def failing(state: TrainState, batch: Any) -> Any:
        if next(calls) == 4:
            raise KeyError("the step")
        return move(state, batch)

    with pytest.raises(KeyError):
        _traced(tmp_path, (2, 7), failing)
    assert _updates(tmp_path)[:2] == [2, 3]
    assert "profile: updates 2 to 3 are in" in capsys.readouterr().out
    _traced(tmp_path / "next", (0, 1))  # another trace can begin
    assert _updates(tmp_path / "next") == [0]


def test_a_resumed_run_traces_what_is_left_of_the_window(tmp_path: Path):
    recorder = Recorder()
    saved = loop.run(Toy(), cadence(3, 1, 3, 0), recorder, recorder)
    _traced(tmp_path, (2, 5), saved=saved)
    assert _updates(tmp_path) == [3, 4]


def test_tracing_changes_nothing(tmp_path: Path):
    recorder = Recorder()
    expected = loop.run(Toy(), cadence(8, 1, 3, 4), recorder, recorder)
    jax.tree.map(np.testing.assert_array_equal, _traced(tmp_path, (0, 8)), expected)


def test_without_a_window_or_on_other_processes_nothing_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recorder = Recorder()
    loop.run(Toy(), cadence(3, 1, 3, 0), recorder, recorder, Supervision(profile=Profile(tmp_path)))
    monkeypatch.setattr(profile, "is_main", lambda: False)
    loop.run(Toy(), cadence(3, 1, 3, 0), Recorder(), Recorder(), Supervision(profile=Profile(tmp_path, (0, 3))))
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_made_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "profile").write_text("no folder")
    assert int(_traced(tmp_path, (2, 5)).step) == 8
    assert "warning: run.profile: no trace (" in capsys.readouterr().err
    with jax.profiler.trace(str(tmp_path / "other")):  # only one trace can be taken at a time
        assert int(_traced(tmp_path / "run", (2, 5)).step) == 8
    assert "warning: run.profile: no trace (" in capsys.readouterr().err


def test_a_window_without_updates_is_refused(tmp_path: Path):
    check(Run(steps=10), tmp_path, 10)
    check(Run(steps=10, profile=(9, 12)), tmp_path, 9)
    with pytest.raises(ValueError, match=r"run\.profile: found \(10, 12\), expected a start below the run's 10 steps"):
        check(Run(steps=10, profile=(10, 12)), tmp_path, 0)
    with pytest.raises(ValueError, match=r"run\.profile: found \(2, 5\), but .* is already at step 5"):
        check(Run(steps=10, profile=(2, 5)), tmp_path, 5)


def test_a_run_that_is_started_again_after_its_window_goes_on(tmp_path: Path):
    """Job managers repeat the command as it was."""
    _traced(tmp_path, (2, 5))
    check(Run(steps=10, profile=(2, 5)), tmp_path, 8)
    with pytest.raises(ValueError, match=r"run\.profile: found \(3, 5\)"):
        check(Run(steps=10, profile=(3, 5)), tmp_path, 8)
