"""A task: prompts to train on, prompts held out, and what measures its images."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

Scores = Callable[[Float[np.ndarray, "n h w 3"], Sequence[str]], dict[str, Float[np.ndarray, " n"]]]


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts to train on, prompts held out from every stage of training, and named scores in [0, 1] of images.

    `score(images in [-1, 1], prompts)` returns one array per skill that the task measures; None where nothing measures.
    `images`: files that the training prompts are captions of, one each, where there are some.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    score: Scores | None = None
    images: tuple[Path, ...] = ()
