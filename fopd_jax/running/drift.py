"""Where monitors of reward hacking have gone since a run began, over all its restarts."""

from collections.abc import Mapping
from pathlib import Path

from fopd_jax.parallel.distributed import warn
from fopd_jax.rewards.monitors import Watch
from fopd_jax.running.metrics import all_logged

ADVICE = "look at the pictures: a reward may be earned by what it does not mean"


class Drift:
    """Warns when a monitor leaves its band, and again once it was back. Every process sees the same values.

    `about`: what they are of; `prefix`: of their names in the log; `updates`: lines of it that are the baseline.
    """

    def __init__(self, workdir: Path | None, prefix: str, about: str, updates: int) -> None:
        self._about, self._watch, self._outside = about, Watch(updates=updates), frozenset[str]()
        for _, seen in all_logged(workdir, prefix) if workdir else ():
            self._see(seen)

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """The next line's; others than monitors do not matter."""
        before = self._outside
        for name, words in self._see(values).items():
            if name not in before:
                warn(f"step {step}, {self._about}: {words}; {ADVICE}")

    def _see(self, values: Mapping[str, float]) -> dict[str, str]:
        self._watch, words = self._watch.see(values)
        measured = self._watch.bands.keys() & values.keys()
        self._outside = (self._outside - measured) | words.keys()
        return words
