"""A task: prompts to train on, prompts held out, and what measures its images."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

Scores = Callable[[Float[np.ndarray, "n h w 3"], Sequence[str]], dict[str, Float[np.ndarray, " n"]]]


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts to train on, prompts held out from every stage of training, and named scores in [0, 1] of images.

    `score(images in [-1, 1], prompts)` returns one array per skill that the task measures; None where nothing measures.
    `images`: files that the training prompts are captions of, one each, where there are some. `train_metadata` and
    `test_metadata` are what stands beside the prompts in their set, one each, or () where nothing does. A prompt's
    id is its place in its set: equal texts are different prompts.

    Raises:
      ValueError: prompts and their metadata differ in number.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    score: Scores | None = None
    images: tuple[Path, ...] = ()
    train_metadata: tuple[Mapping[str, Any], ...] = ()
    test_metadata: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for prompts, metadata in ((self.train, self.train_metadata), (self.test, self.test_metadata)):
            if metadata and len(metadata) != len(prompts):
                raise ValueError(f"task {self.name}: found metadata of {len(metadata)} among {len(prompts)} prompts")
