"""The loop on a toy problem: what it logs, saves, resumes and refuses, and in which order."""

import dataclasses
import functools
import itertools
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fopd_jax.running import loop
from fopd_jax.running.checkpoints import Checkpoints, newest_step
from fopd_jax.running.feed import Feed
from fopd_jax.running.goodput import Goodput
from fopd_jax.running.guards import Alarms, Guard
from fopd_jax.running.metrics import MetricWriter
from fopd_jax.running.preemption import Preempted
from fopd_jax.running.stage import Progress
from fopd_jax.running.supervision import Supervision
from fopd_jax.running.watchdog import Watchdog
from fopd_jax.steps.state import TrainState, init_state
from tests.running.toy import OPTIMIZER, SHARDING, Recorder, Step, Toy, cadence, move, run


def _poisoned(at: int, metric: str, value: float) -> Step:
    """The step, with one metric of one step replaced."""

    poison = jnp.int32(at), jnp.float32(value)
    return lambda state, batch: _poisoned_step(state, batch, metric, *poison)


@functools.partial(jax.jit, static_argnums=2)
def _poisoned_step(state: TrainState, batch: Any, metric: str, at: Any, value: Any) -> Any:
    state, metrics = move(state, batch)
    return state, metrics | {metric: jnp.where(state.step == at, value, metrics[metric])}


# ---- order


def test_metrics_are_fetched_one_step_late_and_none_is_lost():
    recorder = Recorder()
    run(recorder, cadence(steps=4, log_every=1, checkpoint_every=100, eval_every=0))
    assert recorder.events == [
        ("step", 1), ("step", 2), ("train", 1), ("step", 3), ("train", 2), ("step", 4), ("train", 3), ("drain", 0),
        ("train", 4), ("save", 4),
    ]  # fmt: skip


def test_a_state_is_checked_then_saved_then_evaluated():
    recorder = Recorder()
    run(recorder, cadence(steps=5, log_every=2, checkpoint_every=2, eval_every=4))
    assert [event for event in recorder.events if event[0] not in ("step", "drain")] == [
        ("train", 2), ("save", 2), ("train", 4), ("save", 4), ("eval", 4), ("images", 4),
        ("train", 5), ("save", 5), ("eval", 5), ("images", 5),
    ]  # fmt: skip


def test_logged_values_are_those_of_their_step():
    recorder = Recorder()
    state = run(recorder, cadence(steps=3, log_every=1, checkpoint_every=2, eval_every=3))
    expected = init_state(jnp.zeros(3), OPTIMIZER, 0)
    for i in range(3):
        expected, metrics = move(expected, jnp.full(3, float(i)))
        assert recorder.scalars[i] == (i + 1, {f"train/{name}": float(value) for name, value in metrics.items()})
    assert recorder.scalars[3] == (3, {"eval/score": float(state.ema.sum())})
    ((step, images),) = recorder.images
    assert step == 3
    np.testing.assert_array_equal(images["samples"], np.full((2, 2, 3), 3))


def test_batches_are_put_where_the_experiment_says():
    seen: list[Any] = []

    def watch(state: TrainState, batch: Any) -> Any:
        seen.append(batch)
        return move(state, batch)

    run(Recorder(), cadence(2, 1, 1, 0), watch)
    assert [(type(batch), batch.sharding) for batch in seen] == [(type(jnp.zeros(3)), SHARDING)] * 2


@pytest.mark.parametrize("bad", [(), (3,)])
def test_batches_are_made_ahead_by_a_thread_that_the_run_takes_along(tmp_path: Path, bad: tuple[int, ...]):
    """Each is made once, a bad one again to be kept; none beyond the last step, whose prompts nobody has encoded."""
    made: list[int] = []

    def rows(i: int) -> np.ndarray:
        assert threading.current_thread() is not threading.main_thread()
        made.append(i)
        return np.full(3, i, np.float32)

    stage = Toy(lambda state, batch: _guarded(state, batch, bad), feed=Feed(rows, SHARDING, 3, 6))
    recorder, watch = Recorder(), Supervision(guard=Guard(tmp_path, 1))
    loop.run(stage, cadence(6, 2, 2, 0), recorder, recorder, watch)
    assert set(made) == set(range(6))
    assert bad or made == list(range(6))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_batch_that_cannot_be_made_stops_the_run_at_its_own_step():
    def rows(i: int) -> np.ndarray:
        if i == 3:
            raise ValueError("damaged encoding")
        return np.full(3, i, np.float32)

    recorder = Recorder()
    stage = Toy(events=recorder.events, feed=Feed(rows, SHARDING, 3, 6))
    with pytest.raises(ValueError, match=r"^damaged encoding$"):
        loop.run(stage, cadence(6, 1, 2, 0), recorder, recorder)
    assert [event for event in recorder.events if event[0] not in ("train", "drain")] == [
        ("step", 1), ("step", 2), ("save", 2), ("step", 3), ("step", 4),
    ]  # fmt: skip
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_no_evaluation_with_an_interval_of_zero():
    recorder = Recorder()
    run(recorder, cadence(steps=2, log_every=1, checkpoint_every=1, eval_every=0))
    assert not [event for event in recorder.events if event[0] in ("eval", "images")]


# ---- resuming


@pytest.mark.parametrize("stops", [(2,), (1, 3), (3, 4)])
def test_an_interrupted_run_ends_where_a_whole_one_does(tmp_path: Path, stops: tuple[int, ...]):
    def part(folder: Path, steps: int) -> TrainState:
        checkpoints = Checkpoints(folder, keep=1, config_hash="")
        state = loop.run(Toy(), cadence(steps, 1, 1, 0), checkpoints, Recorder())
        checkpoints.close()
        return state

    for steps in stops:
        part(tmp_path / "parts", steps)
    jax.tree.map(np.testing.assert_array_equal, part(tmp_path / "parts", 6), part(tmp_path / "whole", 6))


def test_a_finished_run_does_nothing_more():
    state = run(Recorder(), cadence(2, 1, 1, 0))
    recorder = Recorder(saved=state)
    assert run(recorder, cadence(2, 1, 1, 1)) is state
    assert not [event for event in recorder.events if event[0] != "drain"]


def test_fewer_steps_than_the_checkpoint_has_are_refused():
    recorder = Recorder(saved=run(Recorder(), cadence(3, 1, 1, 0)))
    with pytest.raises(ValueError, match=r"run\.steps: found 2, but this workdir is already at step 3"):
        run(recorder, cadence(2, 1, 1, 0))
    assert not [event for event in recorder.events if event[0] != "drain"]


# ---- what stops a run


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("metric", ["loss", "norm"])
@pytest.mark.parametrize(("every", "saved"), [(1, [1, 2]), (2, [2])])
def test_a_metric_that_is_not_finite_stops_the_run_before_it_is_saved(
    value: float, metric: str, every: int, saved: list[int]
):
    recorder = Recorder()
    settings = cadence(steps=6, log_every=100, checkpoint_every=every, eval_every=every)
    with pytest.raises(FloatingPointError, match=f"step 3: metric '{metric}' is {value}"):
        run(recorder, settings, _poisoned(3, metric, value))
    assert [step for kind, step in recorder.events if kind == "save"] == saved
    assert [step for kind, step in recorder.events if kind == "eval"] == saved


def test_a_metric_that_is_not_finite_at_the_last_step_is_noticed_too():
    recorder = Recorder()
    with pytest.raises(FloatingPointError, match="step 3"):
        run(recorder, cadence(3, 100, 100, 0), _poisoned(3, "loss", float("nan")))
    assert ("save", 3) not in recorder.events


def test_a_step_that_moves_data_to_the_device_unasked_is_an_error():
    add = jax.jit(lambda x, y: x + y)

    def leaky(state: TrainState, batch: Any) -> Any:
        return move(state, add(batch, np.ones(3, np.float32)))

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(Recorder(), cadence(2, 1, 1, 0), leaky)


def test_transfers_are_allowed_again_outside_of_the_step():
    seen = []

    def watch(state: TrainState, batch: Any) -> Any:
        guards = (jax.config.jax_transfer_guard_host_to_device, jax.config.jax_transfer_guard_device_to_host)
        seen.append(guards)
        return move(state, batch)

    before = jax.config.jax_transfer_guard_host_to_device
    run(Recorder(), cadence(2, 1, 1, 1), watch)
    assert seen == [("disallow", "disallow")] * 2
    assert jax.config.jax_transfer_guard_host_to_device == before


def test_zero_steps_are_a_run_without_training():
    recorder = Recorder()
    state = run(recorder, cadence(0, 1, 1, 1))
    assert int(state.step) == 0
    assert not [event for event in recorder.events if event[0] != "drain"]


# ---- updates that did not land


@functools.partial(jax.jit, static_argnums=2)
def _guarded(state: TrainState, batch: jax.Array, bad: tuple[int, ...]) -> Any:
    """The step as the guard inside it makes it: the updates of `bad` steps do not land, and say so."""
    new, metrics = move(state, batch)
    skipped = jnp.isin(new.step, jnp.asarray(bad, jnp.int32))
    landed = jax.tree.map(lambda after, before: jnp.where(skipped, before, after), new, state)
    losses = jnp.where(skipped & (jnp.arange(3) == 1), jnp.nan, batch)
    loss = jnp.where(skipped, jnp.nan, metrics["loss"])
    news = {"loss": loss, "skipped": skipped.astype(jnp.float32), "samples/loss": losses}
    return dataclasses.replace(landed, step=new.step), metrics | news


def _skipping(folder: Path, most: int, bad: tuple[int, ...], recorder: Recorder) -> TrainState:
    stage = Toy(lambda state, batch: _guarded(state, batch, bad))
    watch = Supervision(guard=Guard(folder, most))
    return loop.run(stage, cadence(6, 2, 2, 0), recorder, recorder, watch)


def test_a_bad_update_stops_the_run_before_it_is_saved(tmp_path: Path):
    recorder = Recorder()
    with pytest.raises(FloatingPointError, match=r"step 3: loss is nan; bad samples: 1 \(row 1 of batch 2\)"):
        _skipping(tmp_path, 0, (3,), recorder)
    assert [step for kind, step in recorder.events if kind == "save"] == [2]
    batch = load_file(tmp_path / "nonfinite" / "step_3.safetensors")
    np.testing.assert_array_equal(batch[""], np.full(3, 2.0))


def test_the_run_goes_on_beside_as_many_bad_updates_as_allowed(tmp_path: Path):
    recorder = Recorder()
    state = _skipping(tmp_path, 2, (3, 4), recorder)
    assert int(state.step) == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    logged = dict(recorder.scalars)
    assert sorted(logged) == [2, 4, 6]
    assert {step: values["train/skipped"] for step, values in logged.items()} == {2: 0, 4: 2, 6: 0}
    assert logged[4].keys() == {"train/skipped"}  # nothing to average
    assert not any("samples" in name for values in logged.values() for name in values)
    with pytest.raises(FloatingPointError, match=r"step 4: .*this is number 2"):
        _skipping(tmp_path / "other", 1, (3, 4), Recorder())


def test_alarms_are_logged_and_stop_nothing():
    recorder = Recorder()
    watch = Supervision(alarms=Alarms({"norm": (-1.0, 0.0)}))
    loop.run(Toy(), cadence(3, 2, 3, 0), recorder, recorder, watch)
    assert [step for step, _ in recorder.scalars] == [1, 2, 3]  # an alarm is logged whatever the cadence
    assert all(values["alarms/norm"] == 1 for _, values in recorder.scalars)


# ---- signals, restarts, full disks


def _signalling_twice(at: int, number: signal.Signals) -> Step:
    """The step; during its `at`th call somebody asks the process to stop, and once more."""
    calls = itertools.count(1)

    def step(state: TrainState, batch: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return move(state, batch)

    return step


def _finish(folder: Path, step: Step) -> TrainState:
    """One run on real files."""
    checkpoints, recorder = Checkpoints(folder, keep=2, config_hash=""), MetricWriter(folder, 0)
    watch = Supervision(workdir=folder, goodput=Goodput(folder / "goodput.json"))
    try:
        return loop.run(Toy(step), cadence(6, 1, 4, 0), checkpoints, recorder, watch)
    finally:
        recorder.close()
        checkpoints.close()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_in_flight_and_the_run_goes_on(tmp_path: Path, number: signal.Signals, status: int):
    with pytest.raises(Preempted, match=f"{number.name}: stopped after step 3, saved in") as stop:
        _finish(tmp_path / "parts", _signalling_twice(3, number))
    assert stop.value.status == status
    assert newest_step(tmp_path / "parts") == 3  # 4 would have been the next
    resumed = _finish(tmp_path / "parts", move)
    jax.tree.map(np.testing.assert_array_equal, resumed, _finish(tmp_path / "whole", move))
    record = json.loads((tmp_path / "parts" / "goodput.json").read_text())
    assert record["runs"] == 2
    assert record["seconds"]["lost"] < 0.05 * sum(record["seconds"].values())


def test_an_evaluation_is_left_for_a_signal_and_made_up_for(tmp_path: Path):
    seen = []

    def evaluate(state: TrainState, progress: Progress) -> dict[str, float]:
        seen.append(int(state.step))
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        progress(1)
        return {"score": float(state.ema.sum())}

    def lines(folder: Path) -> list[dict[str, float]]:
        checkpoints = Checkpoints(folder, keep=2, config_hash="")
        writer = MetricWriter(folder, checkpoints.latest_step() or 0)
        try:
            loop.run(Toy(score=evaluate), cadence(4, 1, 4, 2), checkpoints, writer, Supervision(workdir=folder))
        finally:
            writer.close()
            checkpoints.close()
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    with pytest.raises(Preempted, match="stopped after step 2"):
        lines(tmp_path / "parts")
    found = lines(tmp_path / "parts")
    assert seen == [2, 2, 4]
    assert found == lines(tmp_path / "whole")


def test_scores_are_saved_with_the_state_they_belong_to():
    recorder = Recorder()
    run(recorder, cadence(4, 1, 1, 2))
    assert {step for step, scores in recorder.scores.items() if "score" in scores} == {2, 4}


def test_a_save_that_fails_is_tried_again_at_the_next_checkpoint(capsys: pytest.CaptureFixture[str]):
    class Full(Recorder):
        full: frozenset[int] = frozenset()

        def save(self, step: int, *saved: Any) -> None:
            if step in self.full:
                raise OSError("no space left on device")
            super().save(step, *saved)

    recorder = Full()
    recorder.full = frozenset({2, 3})
    run(recorder, cadence(6, 1, 1, 0))
    assert [step for kind, step in recorder.events if kind == "save"] == [1, 4, 5, 6]
    assert "warning: step 2: no checkpoint saved: saving failed (no space left on device)" in capsys.readouterr().err
    recorder = Full()
    recorder.full = frozenset({2, 3, 4})
    with pytest.raises(OSError, match=r"step 4: .*3 in a row; the ones before are intact"):
        run(recorder, cadence(6, 1, 1, 0))


def test_an_evaluation_that_fails_is_told_counted_and_made_again_at_the_end(capsys: pytest.CaptureFixture[str]):
    seen: list[int] = []

    def evaluate(state: TrainState, progress: Progress) -> dict[str, float]:
        seen.append(int(state.step))
        if len(seen) in (1, 2):
            raise RuntimeError("out of\nmemory")
        return {"score": 1.0}

    recorder = Recorder()
    loop.run(Toy(score=evaluate), cadence(4, 4, 1, 2), recorder, recorder)
    assert seen == [2, 4, 4]
    assert [step for kind, step in recorder.events if kind == "save"] == [1, 2, 3, 4]
    assert [scalars for _, scalars in recorder.scalars if "train/loss" not in scalars] == [
        {loop.FAILED: 1.0}, {loop.FAILED: 2.0}, {"eval/score": 1.0},
    ]  # fmt: skip
    told = capsys.readouterr().err
    assert told.count("the evaluation failed (RuntimeError: out of memory); training goes on") == 2


class Behind(Recorder):
    """Saves that fail beside training: those of the steps `failing`, found out when they are waited for."""

    failing: frozenset[int] = frozenset()

    def wait(self) -> None:
        last = max((step for kind, step in self.events if kind == "save"), default=0)
        if last in self.failing:
            self.events.remove(("save", last))
            raise ValueError("PERMISSION_DENIED")


def _stopped(failing: frozenset[int]) -> tuple[Behind, str]:
    recorder = Behind()
    recorder.failing = failing
    with pytest.raises(Preempted) as stop:
        loop.run(Toy(_signalling_twice(3, signal.SIGTERM)), cadence(6, 1, 2, 0), recorder, recorder)
    return recorder, str(stop.value)


def test_a_stop_saves_although_the_save_before_failed():
    recorder, told = _stopped(frozenset({2}))
    assert [step for kind, step in recorder.events if kind == "save"] == [3]
    assert "stopped after step 3, saved in" in told


def test_a_stop_says_if_its_own_save_failed():
    _, told = _stopped(frozenset({3}))
    assert "stopped after step 3, not saved (PERMISSION_DENIED)" in told


def test_saves_that_fail_beside_training_are_counted_too():
    recorder = Behind()
    recorder.failing = frozenset({2, 3, 4})
    with pytest.raises(OSError, match=r"step 4: .*PERMISSION_DENIED.*3 in a row"):
        run(recorder, cadence(6, 1, 1, 0))


def test_the_watchdog_hears_of_every_step_checkpoint_and_part_of_an_evaluation(monkeypatch: pytest.MonkeyPatch):
    heard: list[str] = []
    dog = Watchdog()
    monkeypatch.setattr(dog, "beat", heard.append)
    recorder = Recorder()

    def evaluate(state: TrainState, progress: Progress) -> dict[str, float]:
        progress(1)
        return {"score": 1.0}

    loop.run(Toy(score=evaluate), cadence(2, 1, 2, 2), recorder, recorder, Supervision(watchdog=dog))
    assert heard == ["step 1", "step 2", "the checkpoint of step 2", "part of the evaluation at step 2"]


def test_metrics_that_cannot_be_written_end_the_run_once_its_state_is_saved():
    recorder = Recorder()
    recorder.told = "step 1: no metrics written"
    with pytest.raises(OSError, match="step 1: no metrics written"):
        run(recorder, cadence(6, log_every=1, checkpoint_every=2, eval_every=0))
    assert [step for kind, step in recorder.events if kind == "save"] == [2]


def test_scores_that_are_not_finite_are_named_and_not_written(capsys: pytest.CaptureFixture[str]):
    recorder = Recorder()
    stage = Toy(score=lambda state, progress: {"fine": 1.0, "broken": np.nan})
    loop.run(stage, cadence(2, log_every=1, checkpoint_every=2, eval_every=2), recorder, recorder)
    assert "the evaluation failed (FloatingPointError: scores: broken: " in capsys.readouterr().err
    assert not any(name == "eval/fine" for _, scalars in recorder.scalars for name in scalars)
