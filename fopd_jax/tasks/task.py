"""A task: prompts to train on, prompts held out, and what measures its images."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from fopd_jax.rewards.reward import Metadata


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts to train on, prompts held out from every stage of training, and the rewards that score their images.

    `measured`: those that a world evaluates its task by in any case; `rewards`: those that a config names, with their
    weights in the task's own reward, which is their weighted sum.
    `images`: files that the training prompts are captions of, one each, where there are some. `train_metadata` and
    `test_metadata` are what stands beside the prompts in their set, one each, or () where nothing does. A prompt's
    id is its place in its set: equal texts are different prompts.

    Raises:
      ValueError: prompts and their metadata differ in number.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    measured: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    train_metadata: tuple[Metadata, ...] = ()
    test_metadata: tuple[Metadata, ...] = ()
    rewards: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for prompts, metadata in ((self.train, self.train_metadata), (self.test, self.test_metadata)):
            if metadata and len(metadata) != len(prompts):
                raise ValueError(f"task {self.name}: found metadata of {len(metadata)} among {len(prompts)} prompts")

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of all rewards that score its images, each once."""
        return tuple(dict.fromkeys((*self.measured, *self.rewards)))

    @property
    def weights(self) -> dict[str, float]:
        """Of the rewards that count; none where the task has no reward of its own."""
        return {name: weight for name, weight in self.rewards.items() if weight}

    def beside(self, split: str) -> tuple[Metadata, ...]:
        """The metadata of all prompts of "train" or "test", {} where there is none."""
        prompts, metadata = (self.train, self.train_metadata) if split == "train" else (self.test, self.test_metadata)
        return metadata or ({},) * len(prompts)
