"""Where a run's time goes, over all its restarts: `workdir/goodput.json`."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax

from fopd_jax.files import write_json
from fopd_jax.parallel.distributed import warn
from fopd_jax.reading import is_taken, parse_json, read_regular
from fopd_jax.running.aside import begin_anew
from fopd_jax.running.guards import in_one_line

PHASES = ("init", "compile", "step", "data", "rewards", "eval", "checkpoint", "lost")
REPEATED = ("step", "data", "rewards", "eval", "checkpoint")
"""What a killed run did after its last checkpoint has to be done again: it moves to `lost`."""
LATER = ("rewards",)  # files of earlier versions lack it

FILE, WRITE_EVERY, REMEMBERED = "goodput.json", 1.0, 20  # seconds between writes; checkpoints whose seconds are kept
_COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
Seconds = dict[str, float]


class Goodput:
    """A stopwatch that always charges exactly one phase, so that the seconds add up to the time spent running.

    It starts in `init`. Compiling is charged to `compile` wherever it happens, once entered as a context. `path`: the
    file that accumulates over restarts, written only after `resume`; None keeps nothing.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._phase, self._since = "init", clock()
        self._written = -float("inf")
        self.seconds: Seconds = dict.fromkeys(PHASES, 0.0)
        self._told = False  # that it cannot be written
        self.runs = 0  # this one included, once it is known
        self._saved: dict[int, Seconds] = {}

    def __enter__(self) -> "Goodput":
        _active.append(self)
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        return self

    def __exit__(self, *exception: object) -> None:
        _active.remove(self)
        jax.monitoring.unregister_event_duration_listener(self._compiled)
        self.write()

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Charge what happens inside to `phase`, and to it alone."""
        outer = self._switch(phase)
        try:
            with jax.profiler.TraceAnnotation(phase):  # a profile shows the same phases
                yield
        finally:
            self._switch(outer)

    def _switch(self, phase: str) -> str:
        now, left = self._clock(), self._phase
        self.seconds[left] += now - self._since
        self._phase, self._since = phase, now
        return left

    def _compiled(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _COMPILING:
            self._switch(self._phase)
            moved = min(duration_secs, self.seconds[self._phase])  # several threads may compile in the same second
            self.seconds["compile"] += moved
            self.seconds[self._phase] -= moved

    # ---- over restarts

    def resume(self, step: int) -> None:
        """Add what earlier runs spent; work beyond `step`, where this one takes up, was lost."""
        self._switch(self._phase)
        self.runs, before, self._saved = _read(self._path, step)
        kept = self._saved[max(self._saved)] if self._saved else dict.fromkeys(PHASES, 0.0)
        for phase in REPEATED:
            repeated = max(0.0, before[phase] - kept[phase])
            before["lost"] += repeated
            before[phase] -= repeated
        for phase, value in before.items():
            self.seconds[phase] += value
        self._saved = {step: dict(self.seconds)}

    def mark(self, step: int) -> None:
        """What was spent until now is safe in the checkpoint of `step`."""
        self._switch(self._phase)
        self._saved[step] = dict(self.seconds)
        for old in sorted(self._saved)[:-REMEMBERED]:
            del self._saved[old]
        self.write()

    def write(self, least: float = 0.0) -> None:
        """Write the file unless that was less than `least` seconds ago.

        A record only: what stops it is told, once, and stops nothing else.
        """
        if self._path is None or not self.runs or self._clock() - self._written < least:
            return
        self._switch(self._phase)
        self._written = self._clock()
        saved = {str(step): seconds for step, seconds in self._saved.items()}
        content = {"runs": self.runs, "seconds": self.seconds, "shares": self.shares(), "saved": saved}
        try:
            write_json(self._path, content)
        except OSError as error:
            if not self._told:
                warn(f"{self._path}: cannot be written ({in_one_line(error)}); the run goes on")
            self._told = True
        else:
            self._told = False

    # ---- looking at it

    def spent(self, *phases: str) -> float:
        """Seconds on some phases until now, those of earlier runs included."""
        self._switch(self._phase)
        return sum(self.seconds[phase] for phase in phases)

    def shares(self) -> Seconds:
        """Each phase's part of the whole."""
        total = sum(self.seconds.values())
        return {phase: value / total if total > 0 else 0.0 for phase, value in self.seconds.items()}

    def summary(self) -> str:
        """One line: the goodput, then every phase."""
        shares, hours = self.shares(), sum(self.seconds.values()) / 3600
        parts = ", ".join(f"{phase} {share:.1%}" for phase, share in shares.items() if phase != "step")
        runs = "1 run" if self.runs == 1 else f"{self.runs} runs"
        return f"goodput {shares['step']:.1%} of {hours:.2f} hours in {runs}: {parts}"


_active: list[Goodput] = []


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Charge what happens inside to a phase of the stopwatch that is entered as a context, if one is."""
    with _active[-1].measure(name) if _active else contextlib.nullcontext():
        yield


def _read(path: Path | None, step: int) -> tuple[int, Seconds, dict[int, Seconds]]:
    """Number of this run, seconds of the ones before, and those at their checkpoints up to `step`.

    A damaged file counts as none, with a line: it is a record and holds nothing that training needs.
    """
    if path is not None and is_taken(path):
        try:
            content = parse_json(read_regular(path))
            seconds = _seconds(content["seconds"])
            saved = {int(at): _seconds(then) for at, then in content["saved"].items()}
            return int(content["runs"]) + 1, seconds, {at: then for at, then in saved.items() if at <= step}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            begin_anew(path, error)
    return 1, dict.fromkeys(PHASES, 0.0), {}


def _seconds(there: Mapping[str, float]) -> Seconds:
    """Earlier versions wrote negative ones."""
    whole = dict.fromkeys(LATER, 0.0) | dict(there)
    seconds = {phase: max(0.0, float(whole[phase])) for phase in PHASES}
    if not all(map(math.isfinite, seconds.values())):
        raise ValueError("seconds without end")
    return seconds
