"""How fast a run goes, and how much memory it takes: metrics that depend on the clock and on the machine."""

import resource
import sys
from collections.abc import Callable

import jax

from fopd_jax.performance.host import GIB

SECONDS, RATE = "time/step_seconds", "time/samples_per_second"
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Pace:
    """How fast this process's updates follow each other; the first, which waits for its program, is left out.

    `spent()`: seconds on updates so far, evaluations and checkpoints apart. `samples`: of an update.
    """

    def __init__(self, samples: int, spent: Callable[[], float]) -> None:
        self._samples, self._spent = samples, spent
        self._first: tuple[int, float] | None = None
        self._line = self._last = (0, 0.0)

    def seen(self, step: int) -> None:
        """Update `step` has ended."""
        self._last = step, self._spent()
        if self._first is None:
            self._first = self._line = self._last

    def take(self) -> dict[str, float]:
        """Means over the updates since this was asked last; nothing where there were none."""
        since, self._line = self._line, self._last
        seconds = _per_step(since, self._last)
        return {} if seconds is None else {SECONDS: seconds, RATE: self._samples / seconds}

    @property
    def step_seconds(self) -> float | None:
        """Mean over all updates that count; None before there is one."""
        return None if self._first is None else _per_step(self._first, self._last)

    @property
    def samples_per_second(self) -> float | None:
        """The same in samples."""
        seconds = self.step_seconds
        return None if seconds is None else self._samples / seconds


def _per_step(since: tuple[int, float], until: tuple[int, float]) -> float | None:
    steps = until[0] - since[0]
    return max(until[1] - since[1], 1e-9) / steps if steps else None


def memory() -> dict[str, float]:
    """GiB on the fullest of this process's devices, now and at most; of the host where a backend does not tell."""
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not found:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        return {"memory/host_peak_gib": peak / GIB}
    names = {"memory/in_use_gib": "bytes_in_use", "memory/peak_gib": "peak_bytes_in_use"}
    return {name: max(stats.get(key, 0) for stats in found) / GIB for name, key in names.items()}
