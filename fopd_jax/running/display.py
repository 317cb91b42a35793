"""What a run tells on the console: compilation, updates, scores as they come, and what it leaves at its end."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fopd_jax.config.schema import Run
from fopd_jax.console import Track, say, spell_seconds
from fopd_jax.running.goodput import Goodput
from fopd_jax.running.means import SKIPPED
from fopd_jax.running.pace import Pace, memory


class Display:
    """Tells of the updates from `first`, at which this process takes up, to `run.steps`; `samples`: of an update.

    The loss is the mean of the last `run.log_every` updates, as in the metrics. The time that is left is that of the
    updates that are left, at the mean of this process's but the first, and of their evaluations, at the last one's;
    the report after them is not in it.
    """

    def __init__(self, run: Run, first: int, samples: int, goodput: Goodput) -> None:
        self._run, self._goodput = run, goodput
        self._pace = Pace(samples, lambda: goodput.spent("step", "data"))
        self._track = Track("step", run.steps - first and run.steps, done=first, at_once=True)
        self._losses: deque[float] = deque(maxlen=max(run.log_every, 1))
        self._evaluation, self._since = 0.0, (0.0, 0.0)
        if first:
            say(f"resumed at step {first} of {run.steps}" + ("" if first < run.steps else ": nothing is left to train"))

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Around the first update, which returns as soon as its program is there and has been started."""
        say("compiling the update")
        began, before = time.monotonic(), self._goodput.spent("compile")
        yield
        compiler, seconds = self._goodput.spent("compile") - before, time.monotonic() - began
        say(f"compiled the update in {compiler:.1f} s; with tracing and the first batch {seconds:.1f} s")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Update `step` has ended with these metrics."""
        self._pace.seen(step)
        if "loss" in values and not values.get(SKIPPED):
            self._losses.append(values["loss"])
        loss = f"loss {sum(self._losses) / len(self._losses):.4g}" if self._losses else ""
        rate = self._pace.samples_per_second
        pace = "" if rate is None else f"samples/s {rate:.3g} ETA {spell_seconds(self._left(step))}"
        self._track.to(step, " ".join(filter(None, (loss, pace))))

    def _left(self, step: int) -> float:
        """Seconds until `run.steps`."""
        steps, every = self._run.steps, self._run.eval_every
        evaluations = -(-steps // every) - step // every if every and step < steps else 0
        return (self._pace.step_seconds or 0.0) * (steps - step) + self._evaluation * evaluations

    def measured(self) -> dict[str, float]:
        """Metrics of time and memory, of the updates since they were asked for last."""
        return self._pace.take() | memory()

    def evaluating(self, step: int) -> None:
        """An evaluation begins."""
        say(f"step {step}: evaluating")
        self._since = time.monotonic(), self._goodput.spent("compile")

    def scored(self, step: int, scores: Mapping[str, float]) -> None:
        """It has ended well; an evaluation that fails is told by the loop."""
        seconds, compiler = time.monotonic() - self._since[0], self._goodput.spent("compile") - self._since[1]
        self._evaluation = max(seconds - compiler, 0.0)
        compiled = f", {compiler:.1f} s of them compiling" if compiler >= 0.1 else ""
        say(f"step {step}: {spell_scores(scores) or 'drawn; nothing scores the tasks'} ({seconds:.1f} s{compiled})")

    def close(self) -> None:
        """No update follows."""
        self._track.close()


def spell_scores(scores: Mapping[str, float]) -> str:
    """Names and values on one line."""
    return " ".join(f"{name} {value:.4f}" for name, value in scores.items())


def describe_end(workdir: Path, title: str, scores: str, outputs: Mapping[str, str], next_steps: Sequence[str]) -> str:
    """The last block: scores, what is where, what to do next. `outputs`: what each file in the workdir is."""
    width = max(len(name) for name in outputs)
    files = [f"  {name:<{width}}  {what}" for name, what in outputs.items()]
    blocks = [title, scores, f"in {workdir}:", *files]
    return "\n".join([*filter(None, blocks), *(["next:"] if next_steps else []), *(f"  {line}" for line in next_steps)])
