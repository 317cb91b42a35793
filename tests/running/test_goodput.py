"""Goodput: the seconds add up, survive restarts, and repeated work is lost work."""

import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fopd_jax.running import goodput
from fopd_jax.running.goodput import Goodput


class Clock:
    """A clock that the test moves; quarters of a second are exact in floating point."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _run(path: Path | None, step: int, work: list[tuple[str, float]], marks: dict[int, int]) -> Goodput:
    """One run: a second of setup, then phases in turn; `marks`: index of a phase → the step saved after it."""
    clock = Clock()
    watch = Goodput(path, clock)
    clock.now += 1
    watch.resume(step)
    for index, (phase, seconds) in enumerate(work):
        with watch.measure(phase):
            clock.now += seconds
        if index in marks:
            watch.mark(marks[index])
    watch.write()
    return watch


def test_every_second_is_charged_once_and_to_the_innermost_phase():
    clock = Clock()
    watch = Goodput(None, clock)
    clock.now += 2
    with watch.measure("step"):
        clock.now += 3
        with watch.measure("data"):
            clock.now += 0.5
        with contextlib.suppress(KeyError), watch.measure("eval"):
            clock.now += 0.25
            raise KeyError
        clock.now += 1
    clock.now += 4
    watch.mark(1)
    expected = {"init": 6.0, "step": 4.0, "data": 0.5, "eval": 0.25}
    assert watch.seconds == dict.fromkeys(goodput.PHASES, 0.0) | expected
    assert sum(watch.shares().values()) == pytest.approx(1, abs=1e-12)


def test_what_a_kill_makes_a_run_repeat_is_lost(tmp_path: Path):
    path = tmp_path / "goodput.json"
    work = [("step", 8.0), ("checkpoint", 1.0), ("step", 3.0), ("rewards", 1.0), ("eval", 2.0), ("compile", 16.0)]
    _run(path, 0, work, {1: 20})  # saved at step 20, then killed six seconds of work later
    watch = _run(path, 20, [("step", 4.0)], {})
    assert watch.runs == 2
    assert watch.seconds == {
        "init": 2.0, "compile": 16.0, "step": 12.0, "data": 0.0, "rewards": 0.0, "eval": 0.0, "checkpoint": 1.0,
        "lost": 6.0,
    }  # fmt: skip
    assert json.loads(path.read_text())["seconds"] == watch.seconds
    assert "goodput 32.4% of 0.01 hours in 2 runs" in watch.summary()


def test_a_checkpoint_that_turned_out_damaged_loses_what_came_after_the_one_before(tmp_path: Path):
    path = tmp_path / "goodput.json"
    _run(path, 0, [("step", 8.0), ("step", 4.0), ("step", 2.0)], {0: 10, 1: 20})
    assert _run(path, 10, [], {}).seconds["lost"] == 6


def test_without_any_checkpoint_all_work_is_lost(tmp_path: Path):
    path = tmp_path / "goodput.json"
    _run(path, 0, [("step", 8.0)], {})
    watch = _run(path, 0, [("step", 8.0)], {0: 5})
    assert (watch.seconds["step"], watch.seconds["lost"]) == (8, 8)


def test_a_run_that_ended_well_has_lost_nothing(tmp_path: Path):
    path = tmp_path / "goodput.json"
    _run(path, 0, [("step", 8.0), ("eval", 3.0)], {1: 20})
    watch = _run(path, 20, [("step", 8.0)], {0: 40})
    assert (watch.seconds["step"], watch.seconds["eval"], watch.seconds["lost"]) == (16, 3, 0)


_SECONDS = dict.fromkeys(("init", "compile", "step", "data", "eval", "checkpoint", "lost"), 1.0)


def test_a_record_of_before_rewards_had_a_phase_is_read(tmp_path: Path):
    path = tmp_path / "goodput.json"
    path.write_text(json.dumps({"runs": 1, "seconds": _SECONDS, "saved": {"3": _SECONDS}}))
    watch = _run(path, 3, [("rewards", 2.0)], {})
    assert (watch.runs, watch.seconds["rewards"], watch.seconds["step"]) == (2, 2.0, 1.0)
    assert not (tmp_path / "goodput.json.damaged").exists()


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", '{"runs": 1}', '{"runs": 1, "seconds": 3, "saved": {}}', "[" * 100_000,
        json.dumps({"runs": 1, "seconds": _SECONDS | {"step": float("inf")}, "saved": {}}),
        json.dumps({"runs": float("inf"), "seconds": _SECONDS, "saved": {}}),
    ],
)  # fmt: skip
def test_a_damaged_record_does_not_stop_a_run(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "goodput.json"
    path.write_text(content)
    assert _run(path, 3, [("step", 8.0)], {}).runs == 1
    assert json.loads(path.read_text())["runs"] == 1
    assert (tmp_path / "goodput.json.damaged").read_text() == content
    assert capsys.readouterr().err.count(f"{path}: damaged (") == 1


def test_nothing_is_written_before_the_run_is_known_to_go_on_nor_where_there_is_no_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    watch = Goodput(tmp_path / "goodput.json")
    watch.write()
    assert not any(tmp_path.iterdir())
    lost = Goodput(tmp_path / "nowhere" / "goodput.json")
    lost.resume(0)
    lost.mark(1)  # the folder is not there; a full disk looks the same
    lost.mark(2)
    assert capsys.readouterr().err.count("cannot be written") == 1  # told once


def test_the_record_stays_small(tmp_path: Path):
    watch = _run(tmp_path / "goodput.json", 0, [("step", 1.0)] * 100, {i: i + 1 for i in range(100)})
    assert watch.seconds["step"] == 100
    assert len(json.loads((tmp_path / "goodput.json").read_text())["saved"]) == goodput.REMEMBERED


def test_no_phase_is_ever_negative_whatever_compiles_at_once(tmp_path: Path):
    clock, path = Clock(), tmp_path / "goodput.json"
    watch = Goodput(path, clock)
    clock.now += 1
    with watch.measure("step"):
        clock.now += 2
        for _ in range(2):  # two threads, in the same two seconds
            watch._compiled(goodput._COMPILING[1], 2.0)
        watch.resume(0)  # and nothing is saved after it
        watch.write()
    resumed = _run(path, 0, [], {})
    for seconds in (watch.seconds, resumed.seconds):
        assert min(seconds.values()) >= 0
    assert (watch.seconds["compile"], sum(watch.seconds.values())) == (2, 3)


def test_compiling_is_told_apart_wherever_it_happens():
    with Goodput() as watch:
        with watch.measure("step"):
            jax.jit(lambda x: jnp.sin(x) * 3 + 1)(jnp.ones(7))
        compiled = watch.seconds["compile"]
        assert compiled > 0
    jax.jit(lambda x: jnp.cos(x) * 3 + 1)(jnp.ones(7))
    assert watch.seconds["compile"] == compiled  # no longer listening
