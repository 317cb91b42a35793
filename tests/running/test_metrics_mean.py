"""What a line of metrics holds: means since the line before, whatever interrupts the run between two lines."""

import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.running import loop
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.running.guards import Alarms, Guard
from fopd_jax.running.means import Means, split
from fopd_jax.running.metrics import MetricWriter
from fopd_jax.running.preemption import Preempted
from fopd_jax.running.supervision import Supervision
from fopd_jax.steps.state import TrainState
from tests.running.toy import Recorder, Step, Toy, cadence, move, run

STEPS = 11
RATIO = (1.0, 1.01, 0.99, 1.02, 1.5, 1.0, 0.98, 1.01, 1.0, 1.03, 1.04)  # an alarm at step 5
GAP = (0.3, 0.7, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.9, 0.2, 0.6)
COUNT = (2.0, 1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 4.0, 0.0, 1.0)  # samples of the task: none in some batches
SKIPPED = (8,)


@jax.jit
def scripted(state: TrainState, batch: jax.Array) -> Any:
    """The toy's step with metrics of all kinds: some out of bounds, some unmeasured, one update that did not land."""
    state, metrics = move(state, batch)
    at = state.step - 1
    skipped = jnp.isin(state.step, jnp.asarray(SKIPPED, jnp.int32))
    news = {
        "loss": jnp.where(skipped, jnp.nan, metrics["loss"]),
        "ratio": jnp.asarray(RATIO, jnp.float32)[at],
        "gap/text": jnp.asarray(GAP, jnp.float32)[at],
        "weights/gap/text": jnp.asarray(COUNT, jnp.float32)[at],
        "skipped": skipped.astype(jnp.float32),
    }
    return state, metrics | news


def _watch(folder: Path) -> Supervision:
    return Supervision(alarms=Alarms({"ratio": (0.9, 1.1)}), guard=Guard(folder, len(SKIPPED)), workdir=folder)


def _lines(folder: Path, step: Step, log_every: int = 4, checkpoint_every: int = 3) -> bytes:
    """One run on real files, to its end or to whatever stops it."""
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder, keep=2, config_hash="")
    writer = MetricWriter(folder, checkpoints.latest_step() or 0)
    try:
        settings = cadence(STEPS, log_every, checkpoint_every, 5)
        loop.run(Toy(step), settings, checkpoints, writer, _watch(folder))
    finally:
        writer.close()
        checkpoints.close()
    return (folder / "metrics.jsonl").read_bytes()


def _train(lines: bytes) -> dict[int, dict[str, float]]:
    parsed = [json.loads(line) for line in lines.splitlines()]
    return {line.pop("step"): line for line in parsed if any(name.startswith("train/") for name in line)}


# ---- what a line holds


def test_a_line_is_the_mean_of_every_metric_since_the_one_before(tmp_path: Path):
    each, found = (_train(_lines(tmp_path / str(n), scripted, log_every=n)) for n in (1, 4))
    assert list(each) == list(range(1, STEPS + 1))
    assert list(found) == [4, 5, 8, 11]  # the alarm at 5 is on a line at once; the last step has one
    for (before, step), name in itertools.product(itertools.pairwise([0, *found]), ("train/loss", "train/norm")):
        values = [each[at][name] for at in range(before + 1, step + 1) if at not in SKIPPED]
        assert found[step][name] == pytest.approx(math.fsum(values) / len(values), rel=1e-15)


def test_a_metric_counts_by_its_weight_where_it_has_one(tmp_path: Path):
    found = _train(_lines(tmp_path / "run", scripted))
    gap, count = np.asarray(GAP, np.float32).astype(float), np.asarray(COUNT)
    for first, last in ((0, 4), (8, 11)):
        expected = (gap * count)[first:last].sum() / count[first:last].sum()
        assert found[last]["train/gap/text"] == pytest.approx(expected, rel=1e-15)
    assert "train/gap/text" not in found[5] | found[8]  # no batch had the task
    assert not any("weights" in name for line in found.values() for name in line)


def test_steps_that_did_not_land_are_counted_and_left_out(tmp_path: Path):
    found = _train(_lines(tmp_path / "run", scripted))
    assert [line["train/skipped"] for line in found.values()] == [0, 0, 1, 0]
    ratios = np.asarray(RATIO, np.float32).astype(float)
    assert found[8]["train/ratio"] == pytest.approx(ratios[5:7].mean(), rel=1e-15)
    every = _train(_lines(tmp_path / "each", scripted, log_every=1))
    assert every[8] == {"train/skipped": 1}


def test_with_a_line_a_step_values_are_those_of_the_step_to_the_bit():
    rng = np.random.default_rng(0)
    means = Means()
    for value, weight in (rng.lognormal(0, 20, (1000, 2)) * rng.choice([-1, 1], (1000, 2))).astype(np.float32):
        means.add({"loss": float(value), "gap": float(value)}, {"gap": abs(float(weight))})
        assert means.take() == {"gap": float(value), "loss": float(value)}
    assert means.take() == {}


def test_metrics_and_their_weights_are_told_apart():
    assert split({"gap": 1.0, "weights/gap": 2.0}) == ({"gap": 1.0}, {"gap": 2.0})


# ---- every step is looked at


def _with(metric: str, at: int, value: float) -> Step:
    @jax.jit
    def step(state: TrainState, batch: jax.Array) -> Any:
        state, metrics = scripted(state, batch)
        return state, metrics | {metric: jnp.where(state.step == at, value, metrics[metric])}

    return step


@pytest.mark.parametrize("metric", ["norm", "weights/gap/text"])
def test_a_metric_that_is_not_finite_between_two_lines_stops_the_run(metric: str):
    with pytest.raises(FloatingPointError, match=f"step 2: metric '{metric}' is nan"):
        run(Recorder(), cadence(STEPS, 100, 100, 0), _with(metric, 2, math.nan))


def test_a_metric_that_was_not_measured_may_be_anything(tmp_path: Path):
    expected = _lines(tmp_path / "zero", scripted)
    assert _lines(tmp_path / "nan", _with("gap/text", 3, math.nan)) == expected  # 0/0, where no sample is there
    recorder = Recorder()
    watch = Supervision(alarms=Alarms({"gap/text": (0.05, 1.0)}), guard=Guard(None, len(SKIPPED)))
    loop.run(Toy(scripted), cadence(STEPS, 1, 100, 0), recorder, recorder, watch)
    assert not any(values.get("alarms/gap/text") for _, values in recorder.scalars)


def test_an_alarm_is_raised_at_its_step(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    found = _train(_lines(tmp_path / "run", scripted))
    assert [line.get("alarms/ratio") for line in found.values()] == [0, 1, None, 0]
    assert "alarm: step 5: ratio is 1.5" in capsys.readouterr().err


# ---- what interrupts a run changes no line


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


def _killed(after: int) -> Step:
    calls = itertools.count()

    def step(state: TrainState, batch: Any) -> Any:
        if next(calls) == after:
            raise Killed
        return scripted(state, batch)

    return step


def _stopped(after: int) -> Step:
    calls = itertools.count(1)

    def step(state: TrainState, batch: Any) -> Any:
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return scripted(state, batch)

    return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Lines of a run that nothing interrupted."""
    return _lines(tmp_path_factory.mktemp("whole") / "run", scripted)


@pytest.mark.parametrize("after", [1, 4, 5, 8, 10])
def test_a_killed_run_has_the_lines_of_a_whole_one(tmp_path: Path, whole: bytes, after: int):
    with pytest.raises(Killed):
        _lines(tmp_path / "run", _killed(after))
    assert _lines(tmp_path / "run", scripted) == whole


@pytest.mark.parametrize("after", [2, 3, 4, 6, 8, 10])
def test_a_stopped_run_has_the_lines_of_a_whole_one(tmp_path: Path, whole: bytes, after: int):
    """The checkpoint that a signal asks for stands between two lines more often than not."""
    with pytest.raises(Preempted, match=f"stopped after step {after}"):
        _lines(tmp_path / "run", _stopped(after))
    assert _lines(tmp_path / "run", scripted) == whole


def test_a_run_interrupted_at_every_turn_has_the_lines_of_a_whole_one(tmp_path: Path, whole: bytes):
    for stops in range(1, 4):
        with pytest.raises(Preempted):
            _lines(tmp_path / "run", _stopped(2))
        with pytest.raises(Killed):
            _lines(tmp_path / "run", _killed(1))
        assert len(whole) > len((tmp_path / "run" / "metrics.jsonl").read_bytes()), stops
    assert _lines(tmp_path / "run", scripted) == whole


def test_a_checkpoint_keeps_the_sums_to_the_bit(tmp_path: Path):
    rng = np.random.default_rng(0)
    means = Means()
    for _ in range(7):
        means.add(dict(zip("abc", rng.lognormal(0, 20, 3), strict=True)), {"b": rng.uniform()})
    checkpoints = Checkpoints(tmp_path, keep=2, config_hash="")
    state = Toy().start()
    checkpoints.save(0, state, notes={"means": means.notes()})
    checkpoints.save(1, state)
    checkpoints.wait()
    assert Means(checkpoints.notes(0)["means"]).take() == means.take()
    assert checkpoints.notes(1) == {}
    checkpoints.close()
