"""What the loop runs: a stage, from its first state to what it leaves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from fopd_jax.console import Progress
from fopd_jax.steps.state import TrainState

Tree = Any
Later = Callable[[], Mapping[str, float]]
Metrics = Mapping[str, jax.Array | Later]
ASIDE = ("fixed/", "disagreement/", "teachers/")
"""Before names of what an evaluation measures that is no score: it is logged, and neither told nor compared."""
LATER = "later"
"""Of metrics the name of more of them, which the host makes of an update's results once these are there."""


@runtime_checkable
class Stage(Protocol):
    """One update after the other, each a function of the state and of its number alone.

    So the data position *is* the step. `outputs`: files and folders of the workdir that `finish` writes, and what each
    of them is.
    """

    @property
    def outputs(self) -> Mapping[str, str]:
        """By name."""
        ...

    @property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: a resumed run has it from these, not from `start`."""
        ...

    @property
    def samples(self) -> int:
        """Of one update."""
        ...

    def start(self) -> TrainState:
        """The state of step 0."""
        ...

    def describe(self) -> None:
        """Print what trains and what does not."""
        ...

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """Update number `step`, counted from 0: one jitted program, or a composite on the host.

        It may return before devices have finished. The state is donated. Metrics named `samples/…` are `[B]`, and
        those under `LATER`, a function, are asked for when the others are looked at, while the next update runs; what
        it raises ends the run before anything later is saved.
        """
        ...

    def drain(self) -> None:
        """Leave no work in flight: called before every save and evaluation."""
        ...

    def close(self) -> None:
        """Let go of threads and the like; at the end, also of a run that fails."""
        ...

    def evaluate(self, state: TrainState, progress: Progress) -> Mapping[str, float]:
        """Scores of a state; reports its progress after each batch, and is left from there if the run has to stop."""
        ...

    def draw(self, state: TrainState) -> Mapping[str, np.ndarray]:
        """Pictures (uint8 `[H, W, 3]`) to look at beside the scores."""
        ...

    def batch(self, step: int) -> Tree:
        """The whole batch of an update as numpy, on every process: to keep where the update was not finite."""
        ...

    def explain(self, step: int, rows: Sequence[int]) -> Sequence[str]:
        """What some rows of that batch are, in words."""
        ...

    def finish(self, state: TrainState) -> None:
        """Write `outputs`."""
        ...

    def advise(self, source: str) -> Sequence[str]:
        """What to do with them, a line each; `source`: the config's file, as on the command line."""
        ...
