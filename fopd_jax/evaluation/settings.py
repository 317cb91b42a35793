"""The settings of its sampler that a report is made at: numbers of steps and guidance scales."""

from collections.abc import Collection
from typing import NamedTuple

from fopd_jax.config.schema import Evaluation

OWN, REWRITTEN = "own", "rewritten"
ALSO = (OWN, REWRITTEN)
"""What an evaluation of models may make beside the config's settings: every model under the guidance that it is for,
and the main setting with prompts in other words."""


class Made(NamedTuple):
    """One setting of a sampler, and whether networks read the prompts in other words."""

    steps: int
    guidance: float
    rewritten: bool


def main_setting(evaluation: Evaluation) -> str:
    """The name of the one that all else is evaluated at: of what the others vary."""
    steps, scales = _grid(evaluation)
    parts = [f"steps {evaluation.num_steps}"] if len(steps) > 1 or len(scales) == 1 else []
    return ", ".join([*parts, f"guidance {evaluation.guidance:g}"] if len(scales) > 1 else parts)


def other_settings(evaluation: Evaluation) -> dict[str, tuple[int, float]]:
    """Of the others steps and scale, by what is other in them: `steps 4`, `guidance 1.5`, `steps 4, guidance 1.5`."""
    usual = evaluation.num_steps, evaluation.guidance
    steps, scales = _grid(evaluation)
    pairs = [(count, scale) for count in steps for scale in scales if (count, scale) != usual]
    return {_name(usual, pair): pair for pair in pairs}


def _grid(evaluation: Evaluation) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Every number of steps and every scale once, the usual one first."""
    steps = dict.fromkeys((evaluation.num_steps, *evaluation.also_steps))
    return tuple(steps), tuple(dict.fromkeys((evaluation.guidance, *evaluation.also_guidance)))


def _name(usual: tuple[int, float], pair: tuple[int, float]) -> str:
    named = zip(("steps", "guidance"), usual, pair, strict=True)
    return ", ".join(f"{what} {number:g}" for what, known, number in named if number != known)


def cell_settings(evaluation: Evaluation, own: float | None, also: Collection[str]) -> dict[str, Made]:
    """All settings that a model is evaluated at, the main one first, by names that are the same for all models.

    `own`: the scale that the model is for, None where it does not say: then the main setting's. `also`: of `ALSO`.
    """
    steps, scales = _grid(evaluation)
    said = evaluation.rewritten
    found = {_cell_name(n, f"{scale:g}", said): Made(n, scale, said) for n in steps for scale in scales}
    if OWN in also:
        scale = evaluation.guidance if own is None else own
        found |= {_cell_name(n, OWN, said): Made(n, scale, said) for n in steps}
    if REWRITTEN in also:
        usual = evaluation.num_steps, evaluation.guidance
        found[_cell_name(usual[0], f"{usual[1]:g}", True)] = Made(*usual, True)
    return found


def _cell_name(steps: int, guidance: str, rewritten: bool) -> str:
    return f"steps {steps}, guidance {guidance}{f', {REWRITTEN}' * rewritten}"
