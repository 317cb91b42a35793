"""A step as one program, its rewards within it. The host looks at the images of one step while the next one runs."""

from functools import partial
from typing import Any

import jax

from fopd_jax.running.stage import LATER, Metrics
from fopd_jax.stages.scoring import Scoring
from fopd_jax.stages.traced_scoring import Asked, TracedScoring
from fopd_jax.steps.grpo.spec import Base, Credit
from fopd_jax.steps.grpo.step import Step
from fopd_jax.steps.state import TrainState
from fopd_jax.worlds.prompt_stream import Batch, Drawn, PromptStream


class OneProgram:
    """`step` on a stream's prompts. `watch`: has the program's scores and images after it, as if it had scored them."""

    def __init__(self, step: Step, scoring: TracedScoring, base: Base, stream: PromptStream, watch: Scoring) -> None:
        self._step, self._scoring, self._base, self._stream, self._watch = step, scoring, base, stream, watch
        self._scorers = scoring.params()

    def rows(self, step: int) -> tuple[Batch, Asked]:
        """This process's rows of a batch: prompts, and what rewards need of them."""
        drawn = self._drawn(step)
        return self._stream.batch(step), self._scoring.ask([drawn[int(row)] for row in self._stream.rows])

    def advance(self, state: TrainState, step: int, conditioning: Any, asked: Asked) -> tuple[TrainState, Metrics]:
        """The state after all updates on one rollout; failures, and images that are not finite, are told of later."""
        state, metrics, credit, seen = self._step(self._base, self._scorers, state, conditioning, asked)
        return state, {**metrics, LATER: partial(self._look, step, credit, seen)}

    def _look(self, step: int, credit: Credit, seen: Any) -> dict[str, float]:
        with jax.transfer_guard("allow"):
            return self._watch.finish_within(step, self._drawn(step), credit, seen)

    def _drawn(self, step: int) -> list[Drawn]:
        return self._stream.drawn(step, merge_equal_prompts=self._scoring.comparison.merge_equal_prompts)
