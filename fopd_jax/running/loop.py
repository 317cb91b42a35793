"""The loop that every stage shares: resume, step, log, checkpoint, evaluate; and stop without losing anything."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from tqdm import tqdm

from fopd_jax.parallel.distributed import fetch, gather_rows, is_main, largest, put_batch
from fopd_jax.running import goodput, guards
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.running.guards import Describe
from fopd_jax.running.metrics import MetricWriter, is_logged
from fopd_jax.running.preemption import Interrupted, Preempted
from fopd_jax.running.prefetch import Prefetch
from fopd_jax.running.supervision import Supervision
from fopd_jax.steps.state import TrainState

Metrics = Mapping[str, jax.Array]
Progress = Callable[[int], Any]
EVALUATION = "eval/"  # prefix of an evaluation's scalars


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One stage, ready to run. `batch(i)` is a function of the step alone, so the data position *is* the step.

    `batch`: the rows of a global batch of `batch_size` that this process holds, made in a thread. `sharding`: where
    batches are put. `evaluate`: scores; it reports its progress after each batch, and is left from there if the run has
    to stop. `draw`: pictures (uint8 `[H, W, 3]`) to look at beside the scores. `describe`: a batch's rows, in words.
    """

    state: TrainState
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    batch: Callable[[int], Any]
    batch_size: int
    sharding: jax.sharding.Sharding
    evaluate: Callable[[TrainState, Progress], Mapping[str, float]]
    draw: Callable[[TrainState], Mapping[str, np.ndarray]]
    describe: Describe | None = None


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


def run(
    experiment: Experiment,
    cadence: Cadence,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    supervision: Supervision | None = None,
) -> TrainState:
    """Train from the newest checkpoint, or from the start, to `cadence.steps`.

    Metrics of step k are fetched while step k+1 runs, and transfers that nobody asked for are errors.

    Raises:
      FloatingPointError: a metric is not finite, in more steps than are to be skipped; names it, step and samples.
        Nothing later is saved.
      Preempted: a signal asked to stop; the state is saved.
      ValueError: the run is already beyond `cadence.steps`, or an alarm watches a metric that does not exist.
      OSError: too many checkpoints in a row could not be saved.
    """
    return _Run(experiment, cadence, checkpoints, writer, supervision or Supervision()).run()


@dataclasses.dataclass
class _Run:
    """`state` is that after the update dispatched last; `pending` its step and metrics until they are looked at."""

    experiment: Experiment
    cadence: Cadence
    checkpoints: Checkpoints
    writer: MetricWriter
    watch: Supervision

    def run(self) -> TrainState:
        first = self.resume()
        steps, measure = self.cadence.steps, self.watch.goodput.measure
        hidden = first >= steps or not is_main()
        self.bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=hidden)
        self.batch = Prefetch(self.experiment.batch, steps)
        with self.bar, measure("step"), self.watch.preemption, self.watch.watchdog, self.batch:
            self.catch_up(first)
            for i in range(first, steps):
                if self.watch.preemption.asked():
                    self.stop(i)
                self.update(i)
                self.settle(i + 1)
            with measure("checkpoint"):
                self.checkpoints.wait()
        return self.state

    def resume(self) -> int:
        """Take up the newest checkpoint; returns its step."""
        newest = self.checkpoints.latest_step()
        self.state = self.experiment.state if newest is None else self.checkpoints.restore(self.experiment.state)
        self.pending: tuple[int, Metrics] | None = None
        first = int(self.state.step)
        if first > self.cadence.steps:
            raise ValueError(f"steps: found {self.cadence.steps}, but this workdir is already at step {first}")
        self.watch.goodput.resume(first)
        self.watch.guard.resume(first)
        return first

    def catch_up(self, first: int) -> None:
        """Make up for an evaluation that a signal interrupted: its state is the one just restored."""
        workdir = self.watch.workdir
        if workdir is None or first == 0 or not self.cadence.due(self.cadence.eval_every, first):
            return
        if largest(int(is_main() and not is_logged(workdir, first, EVALUATION))):
            self.evaluate(first)

    def update(self, i: int) -> None:
        """Dispatch one update, then look at the one before."""
        experiment = self.experiment
        with self.watch.goodput.measure("data"):
            batch = put_batch(self.batch(i), experiment.sharding, experiment.batch_size)
        with jax.transfer_guard("disallow"):
            self.state, metrics = experiment.step(self.state, batch)
        self.report()
        self.pending = (i + 1, metrics)
        self.watch.preemption.listen()

    def settle(self, step: int) -> None:
        """What is due after a step."""
        saves = self.cadence.due(self.cadence.checkpoint_every, step)
        evaluates = self.cadence.due(self.cadence.eval_every, step)
        if saves or evaluates:
            self.report()  # a state is checked before it is evaluated or saved
        # Before saving: a kill in between repeats both, so no evaluation is lost.
        scores = self.evaluate(step) if evaluates else {}
        if saves:
            self.save(step, scores)
        self.bar.update()
        self.watch.goodput.write(goodput.WRITE_EVERY)

    # ---- metrics

    def report(self) -> None:
        """Look at the metrics that are pending; this waits for their step."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        scalars = {name: value for name, value in metrics.items() if not name.startswith(guards.SAMPLES)}
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        self.watch.watchdog.beat(f"step {step}")
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if values.get("skipped", 0.0):
            self.skip(step, values, metrics)
        elif bad:
            found = f"metric {bad[0]!r} is {values[bad[0]]}"
            raise FloatingPointError(f"step {step}: {found}; the last checkpoint is intact")
        else:
            self.log(step, values)

    def skip(self, step: int, values: Mapping[str, float], metrics: Metrics) -> None:
        """An update that did not land."""
        experiment = self.experiment
        samples = {name: fetch(value) for name, value in metrics.items() if name.startswith(guards.SAMPLES)}

        def batch() -> Any:
            return gather_rows(self.batch(step - 1), experiment.sharding, experiment.batch_size)

        self.watch.guard.skip(step, values, samples, batch, experiment.describe)
        self.writer.write_scalars(step, {f"train/{name}": v for name, v in values.items() if math.isfinite(v)})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        alarms = self.watch.alarms.check(step, values)
        if self.cadence.due(self.cadence.log_every, step) or any(alarms.values()):
            self.writer.write_scalars(step, {f"train/{name}": value for name, value in values.items()} | alarms)
            self.bar.set_postfix({"loss": f"{values['loss']:.4g}"})

    # ---- evaluations, checkpoints

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Score the state and draw it."""

        def progress(_: int) -> None:
            self.watch.watchdog.beat(f"part of the evaluation at step {step}")
            self.watch.preemption.interrupt()

        try:
            with self.watch.goodput.measure("eval"):
                scores = self.experiment.evaluate(self.state, progress)
                images = self.experiment.draw(self.state)
        except Interrupted:
            self.stop(step)
        self.writer.write_scalars(step, {f"{EVALUATION}{name}": value for name, value in scores.items()})
        self.writer.write_images(step, images)
        return scores

    def save(self, step: int, scores: Mapping[str, float]) -> None:
        """Start to save the state, if there is room for it; a failed save is tried again at the next checkpoint."""
        last = step == self.cadence.steps
        with self.watch.goodput.measure("checkpoint"):
            if self.watch.space.allows(step, self.state, last):
                try:
                    self.checkpoints.save(step, self.state, scores)
                except (OSError, RuntimeError) as error:  # of this save, or the one before, which ran beside training
                    self.watch.space.missed(step, f"saving failed ({error})", last)
                else:
                    self.watch.space.saved()
                    self.watch.goodput.mark(step)
        self.watch.watchdog.beat(f"the checkpoint of step {step}")

    def stop(self, step: int) -> NoReturn:
        """Save the state after `step` updates, however long ago the last checkpoint was, and leave."""
        began = time.monotonic()
        self.report()
        with self.watch.goodput.measure("checkpoint"):
            self.checkpoints.save(step, self.state)
            self.checkpoints.wait()
        self.watch.goodput.mark(step)
        raise Preempted(self.watch.preemption.number or signal.SIGTERM, step, time.monotonic() - began)
