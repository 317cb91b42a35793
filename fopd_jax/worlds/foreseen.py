"""Which prompts a run will draw: known beforehand, however long the run."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from tqdm import tqdm

from fopd_jax.parallel.distributed import is_main

MOST_DRAWN = 4_000_000
"""Prompts; drawing them takes ten seconds."""
_SHOWN_AFTER_S = 2.0


def foresee(
    draw: Callable[[int], Sequence[str]], steps: int, everything: Iterable[str], most: int = MOST_DRAWN
) -> Iterator[str]:
    """The distinct prompts of the first `steps` batches, in the order in which they first come.

    `draw(step)`: a batch's; `everything`: all that may be drawn. It ends as soon as all have come. After `most` draws
    those that are left follow, which a longer run may never ask for.
    """
    left, drawn = dict.fromkeys(everything), 0
    bar = tqdm(range(steps), "draw prompts", unit="step", dynamic_ncols=True, delay=_SHOWN_AFTER_S, leave=False,
               disable=not is_main())  # fmt: skip
    with bar:
        for step in bar:
            if not left or drawn >= most:
                break
            prompts = draw(step)
            for prompt in prompts:
                if prompt in left:
                    del left[prompt]
                    yield prompt
            drawn += len(prompts)
        else:
            return
    yield from left
