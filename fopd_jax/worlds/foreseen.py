"""Which prompts a run will draw: known beforehand, however long the run."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from fopd_jax.console import progress

MOST_DRAWN = 4_000_000
"""Prompts; drawing them takes ten seconds."""


def foresee(
    draw: Callable[[int], Sequence[str]], steps: int, everything: Iterable[str], most: int = MOST_DRAWN
) -> Iterator[str]:
    """The distinct prompts of the first `steps` batches, in the order in which they first come.

    `draw(step)`: a batch's; `everything`: all that may be drawn in them. It ends as soon as all have come. After `most`
    draws those that are left follow.
    """
    left, drawn = dict.fromkeys(everything), 0
    with progress("draw prompts", steps, "steps") as count:
        for step in range(steps):
            if not left or drawn >= most:
                break
            prompts = draw(step)
            for prompt in prompts:
                if prompt in left:
                    del left[prompt]
                    yield prompt
            drawn += len(prompts)
            count(1)
        else:
            return
    yield from left
