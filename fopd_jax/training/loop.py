"""The loop that every stage shares: resume, step, log, checkpoint, evaluate."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fopd_jax.training.checkpoints import Checkpoints
from fopd_jax.training.metrics import MetricWriter
from fopd_jax.training.state import TrainState

Metrics = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One stage, ready to run. `batch(i)` is a function of the step alone, so the data position *is* the step.

    `sharding`: where batches are put. `draw`: pictures (uint8 `[H, W, 3]`) to look at beside the evaluation's scores.
    """

    state: TrainState
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    batch: Callable[[int], Any]
    sharding: jax.sharding.Sharding
    evaluate: Callable[[TrainState], Mapping[str, float]]
    draw: Callable[[TrainState], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Cadence:
    """Steps in all, and every how many of them to log, checkpoint and evaluate (0: never evaluate).

    Raises:
      ValueError: a negative number of steps or an interval that is not positive; names the field.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    eval_every: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("steps", "eval_every") else 1
            if value < least:
                raise ValueError(f"{field.name}: found {value}, expected at least {least}")

    def due(self, every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.steps)


def run(experiment: Experiment, cadence: Cadence, checkpoints: Checkpoints, writer: MetricWriter) -> TrainState:
    """Train from the newest checkpoint, or from the start, to `cadence.steps`.

    Metrics of step k are fetched while step k+1 runs, and transfers that nobody asked for are errors.

    Raises:
      FloatingPointError: a metric is not finite; names it and the step. Nothing later is saved.
      ValueError: the run is already beyond `cadence.steps`.
    """
    state = checkpoints.restore(experiment.state) if checkpoints.latest_step() is not None else experiment.state
    first, pending = int(state.step), None
    if first > cadence.steps:
        raise ValueError(f"steps: found {cadence.steps}, but this workdir is already at step {first}")
    with tqdm(
        total=cadence.steps, initial=first, unit="step", dynamic_ncols=True, disable=first >= cadence.steps
    ) as bar:
        for i in range(first, cadence.steps):
            batch = jax.device_put(experiment.batch(i), experiment.sharding)
            with jax.transfer_guard("disallow"):
                state, metrics = experiment.step(state, batch)
            if pending is not None:
                _report(*pending, cadence, writer, bar)
            pending = (i + 1, metrics)
            saves, evaluates = cadence.due(cadence.checkpoint_every, i + 1), cadence.due(cadence.eval_every, i + 1)
            if saves or evaluates or i + 1 == cadence.steps:
                _report(*pending, cadence, writer, bar)  # a state is checked before it is saved
                pending = None
            if evaluates:  # before saving: a kill in between repeats both, so no evaluation is lost
                writer.write_scalars(
                    i + 1, {f"eval/{name}": value for name, value in experiment.evaluate(state).items()}
                )
                writer.write_images(i + 1, experiment.draw(state))
            if saves:
                checkpoints.save(i + 1, state)
            bar.update()
    return state


def _report(step: int, metrics: Metrics, cadence: Cadence, writer: MetricWriter, bar: tqdm) -> None:
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}: metric {name!r} is {value}; the last checkpoint is intact")
    if cadence.due(cadence.log_every, step):
        writer.write_scalars(step, {f"train/{name}": value for name, value in values.items()})
        bar.set_postfix({"loss": f"{values['loss']:.4g}"})
