"""The loop that every stage shares: resume, step, log, checkpoint, evaluate; and stop without losing anything."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from fopd_jax.config.schema import Run
from fopd_jax.files import check_finite
from fopd_jax.parallel.agreement import agree, overheard
from fopd_jax.parallel.distributed import BARRIER_TIMEOUT_S, fetch, is_main, largest, warn
from fopd_jax.rewards.monitors import PREFIX
from fopd_jax.running import goodput, guards
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.running.display import Display
from fopd_jax.running.drift import Drift
from fopd_jax.running.means import SKIPPED, Means, split
from fopd_jax.running.metrics import EVALUATION, MetricWriter, logged
from fopd_jax.running.preemption import FAILURE_S, HEAD_START_S, Interrupted, Preempted, left_where_it_hangs
from fopd_jax.running.stage import ASIDE, LATER, Metrics, Stage
from fopd_jax.running.supervision import Supervision
from fopd_jax.steps.state import TrainState

TRAINING = "train/"  # prefix of an update's scalars
BASELINE = 5  # lines of metrics that say how rollouts looked when a run began
CLOCKED = "rewards/"  # those of them that say how fast rewards were
FAILED = "failed/evaluations"  # how many of this process's evaluations came to nothing
MEANS = "means"  # among a checkpoint's notes


def run(
    stage: Stage,
    settings: Run,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    supervision: Supervision | None = None,
) -> TrainState:
    """Train from the newest checkpoint, or from the start, to `run.steps`.

    Metrics of step k are fetched while step k+1 runs, and transfers that nobody asked for are errors. Every
    `run.log_every` steps, at the last one and when an alarm is raised, their means since the line before are logged.

    A state is saved before it is evaluated, and an evaluation that is not logged is made up for on resuming: no kill
    loses updates or scores. One that fails is told and counted, and made again if it was the last; training goes on.

    Raises:
      FloatingPointError: a metric is not finite, in more steps than are to be skipped; names it, step and samples.
        Nothing later is saved.
      Preempted: a signal asked to stop; it says whether the state is saved.
      ValueError: the run is already beyond `run.steps`, or an alarm watches a metric that does not exist.
      OSError: too many checkpoints in a row could not be saved, or metrics written; the latter after saving.
    """
    return _Run(stage, settings, checkpoints, writer, supervision or Supervision()).run()


@dataclasses.dataclass
class _Run:
    """`state` is that after the update dispatched last; `pending` its step and metrics until they are looked at.

    `means`: of the steps since the last line of metrics. `failed`: evaluations, the last of them if `unscored`.
    `begun`: the step whose save runs beside training, of which nothing is known yet; 0 without one.
    """

    stage: Stage
    settings: Run
    checkpoints: Checkpoints
    writer: MetricWriter
    watch: Supervision
    failed: int = 0
    unscored: bool = False
    begun: int = 0

    def run(self) -> TrainState:
        first = self.resume()
        steps, measure = self.settings.steps, self.watch.goodput.measure
        self.display = Display(self.settings, first, self.stage.samples, self.watch.goodput)
        with measure("step"), self.watch.preemption, self.watch.watchdog, contextlib.ExitStack() as at_end:
            for each in (self.display, self.stage, self.watch.profile):
                at_end.callback(each.close)
            self.catch_up(first)
            for i in range(first, steps):
                if self.watch.preemption.asked():
                    self.stop(i)
                with self.display.compiling() if i == first else contextlib.nullcontext():
                    self.update(i)
                self.settle(i + 1)
            if self.unscored:
                self.evaluate(steps)
        return self.state

    def due(self, every: int, step: int) -> bool:
        """Whether what happens every so many steps (0: never) happens after this one; the last has everything."""
        return every > 0 and (step % every == 0 or step == self.settings.steps)

    def resume(self) -> int:
        """Take up the newest checkpoint; returns its step."""
        newest = self.checkpoints.latest_step()
        self.state = self.stage.start() if newest is None else self.checkpoints.restore(self.stage.state)
        self.pending: tuple[int, Metrics] | None = None
        first = int(self.state.step)
        self.means = Means(None if newest is None else self.checkpoints.notes(first).get(MEANS))
        if first > self.settings.steps:
            raise ValueError(f"run.steps: found {self.settings.steps}, but this workdir is already at step {first}")
        self.drifts = {
            EVALUATION: Drift(self.watch.workdir, EVALUATION, "evaluation", updates=1),
            TRAINING: Drift(self.watch.workdir, TRAINING, "rollouts", updates=BASELINE),
        }
        self.watch.goodput.resume(first)
        self.watch.guard.resume(first)
        return first

    def catch_up(self, first: int) -> None:
        """Make up for an evaluation that a signal interrupted: its state is the one just restored."""
        workdir = self.watch.workdir
        if workdir is None or first == 0 or not self.due(self.settings.eval_every, first):
            return
        if largest(int(is_main() and not logged(workdir, first, EVALUATION))):
            self.evaluate(first)

    def update(self, i: int) -> None:
        """Dispatch one update, then look at the one before."""
        self.watch.profile.begin(i, self.state)
        with jax.profiler.StepTraceAnnotation("train", step_num=i):
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.stage.advance(self.state, i)
            self.report()
        self.pending = (i + 1, metrics)
        self.watch.profile.end(i, self.state)
        self.watch.preemption.listen()

    def settle(self, step: int) -> None:
        """What is due after a step."""
        saves = self.due(self.settings.checkpoint_every, step)
        evaluates = self.due(self.settings.eval_every, step)
        if saves or evaluates:
            self.stage.drain()
            self.report()  # a state is checked before it is evaluated or saved
        if saves:
            self.save(step)
        if evaluates:  # after saving: a kill repeats no update, and `catch_up` finds that the scores are missing
            self.evaluate(step)
        self.watch.goodput.write(goodput.WRITE_EVERY)

    # ---- metrics

    def report(self) -> None:
        """Look at the metrics that are pending; this waits for their step."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        metrics = dict(metrics)
        later: Any = metrics.pop(LATER, dict)
        scalars = {name: value for name, value in metrics.items() if not name.startswith(guards.SAMPLES)}
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        values |= later()
        self.watch.watchdog.beat(f"step {step}")
        alarms = self.skip(step, values, metrics) if values.get(SKIPPED, 0.0) else self.add(step, values)
        self.display.step(step, values)
        if self.due(self.settings.log_every, step) or any(alarms.values()):
            means = self.means.take()
            scalars = {f"{TRAINING}{name}": value for name, value in means.items()} | alarms
            self.writer.write_scalars(step, scalars, self.display.measured())
            self.drifts[TRAINING].see(step, means)

    def add(self, step: int, scalars: Mapping[str, float]) -> dict[str, float]:
        """An update that landed; returns its alarms."""
        values, weights = split(scalars)
        unmeasured = [name for name, weight in weights.items() if weight == 0]
        for name, value in scalars.items():
            if name not in unmeasured and not math.isfinite(value):
                raise FloatingPointError(f"step {step}: metric {name!r} is {value}; the last checkpoint is intact")
        self.means.add(values, weights)
        return self.watch.alarms.check(step, values, unmeasured)

    def skip(self, step: int, values: Mapping[str, float], metrics: Metrics) -> dict[str, float]:
        """An update that did not land: it raises no alarms."""
        samples = {name: fetch(value) for name, value in metrics.items() if name.startswith(guards.SAMPLES)}
        self.watch.guard.skip(step, values, samples, lambda: self.stage.batch(step - 1), self.stage.explain)
        self.means.skip()
        return {}

    # ---- evaluations, checkpoints

    def evaluate(self, step: int) -> None:
        """Score the state and draw it."""

        def progress(_: int) -> None:
            self.watch.watchdog.beat(f"part of the evaluation at step {step}")
            self.watch.preemption.interrupt()

        def score() -> None:
            scores.update(self.stage.evaluate(self.state, progress))
            check_finite("scores", {name: np.asarray(value) for name, value in scores.items()})
            images.update(self.stage.draw(self.state))

        scores: dict[str, float] = {}
        images: dict[str, np.ndarray] = {}
        about = f"the evaluation at step {step}"
        with self.watch.goodput.measure("eval"), left_where_it_hangs(about, lambda: overheard(about)):
            try:  # a missing file or a full memory in there is no reason to end days of training
                self.display.evaluating(step)
                problem = self.agreed(about, score, FAILURE_S + HEAD_START_S * is_main())
            except Interrupted:
                self.stop(step)
        self.unscored = bool(problem)
        if self.unscored:
            self.failed += 1
            warn(f"step {step}: the evaluation failed ({problem}); training goes on")
            self.writer.write_scalars(step, {FAILED: float(self.failed)})
            return
        shown = {name: value for name, value in scores.items() if not name.startswith((PREFIX, CLOCKED, *ASIDE))}
        self.display.scored(step, shown)
        named = {f"{EVALUATION}{name}": value for name, value in scores.items()}
        clocked = {name: value for name, value in named.items() if name.startswith(f"{EVALUATION}{CLOCKED}")}
        self.writer.write_scalars(step, {name: named[name] for name in named if name not in clocked}, clocked)
        self.writer.write_images(step, images)
        self.checkpoints.score(step, shown)
        self.drifts[EVALUATION].see(step, scores)

    def save(self, step: int) -> None:
        """Start to save the state, if there is room for it; a failed save is tried again at the next checkpoint.

        The last has no next one: it is waited for.
        """
        last, space = step == self.settings.steps, self.watch.space
        with self.watch.goodput.measure("checkpoint"), self.watch.preemption.bounded(f"the save at step {step}"):
            self.saved()
            if space.allows(step, self.state, last):
                if problem := self.store(step) if last else self.agreed("saving", lambda: self.begin(step)):
                    space.missed(step, f"saving failed ({problem})", last)
                else:
                    self.begun = step
                    self.watch.goodput.mark(step)
        self.watch.watchdog.beat(f"the checkpoint of step {step}")
        self.end_in_trouble()

    def end_in_trouble(self) -> None:
        """Metrics that cannot be written end a run only here, where its state is safe: training repeats nothing."""
        if not largest(int(bool(self.writer.trouble))):
            return
        if self.saved():
            raise OSError(self.writer.trouble or "the metrics cannot be written")

    def saved(self) -> bool:
        """Wait for the save that runs beside training; whether there was one, and it is in place."""
        step, self.begun = self.begun, 0
        if problem := self.agreed("saving", self.checkpoints.wait):
            self.watch.space.missed(step, f"saving failed ({problem})")
        elif step:
            self.watch.space.saved()
        return step > 0 and not problem

    def begin(self, step: int) -> None:
        self.checkpoints.save(step, self.state, {MEANS: self.means.notes()})  # the line that is not complete yet

    def store(self, step: int) -> str:
        """Save and wait; returns what went wrong."""
        return self.agreed("saving", lambda: self.begin(step)) or self.agreed("saving", self.checkpoints.wait)

    def agreed(self, about: str, act: Callable[[], None], failure_s: float = BARRIER_TIMEOUT_S) -> str:
        """What went wrong, here or on another process, so that all of them go on in the same way; empty if nothing.

        Raises:
          TimeoutError: another process does not come out of it, `failure_s` after it went wrong here.
        """
        try:
            act()
            problem = ""
        except Interrupted:
            raise
        except Exception as error:  # what storage and metrics raise has no common type
            problem = guards.in_one_line(error)
        try:
            return agree(about, problem, failure_s if problem else BARRIER_TIMEOUT_S)
        except TimeoutError as error:
            raise TimeoutError(
                f"{error}; here: {problem or 'nothing is wrong'}; the last checkpoint is intact"
            ) from error

    def stop(self, step: int) -> NoReturn:
        """Save the state after `step` updates, however long ago the last checkpoint was, and leave."""
        began = time.monotonic()
        self.stage.drain()
        self.report()
        with self.watch.goodput.measure("checkpoint"), self.watch.preemption.bounded(f"the save after step {step}"):
            self.agreed("saving", self.checkpoints.wait)  # if the save before failed, this one is all the more needed
            problem = self.store(step)
        if not problem:
            self.watch.goodput.mark(step)
        raise Preempted(self.watch.preemption.number or signal.SIGTERM, step, time.monotonic() - began, problem)
