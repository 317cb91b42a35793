"""The settings of its sampler that a report is made at: numbers of steps and guidance scales."""

from fopd_jax.config.schema import Evaluation


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
