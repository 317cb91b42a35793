"""Captioned renderings for flow matching, as clean or as corrupted as a stage wants them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fopd_jax.worlds.miniature.render import degrade, render
from fopd_jax.worlds.world import World


@dataclasses.dataclass(frozen=True)
class TaskPairs:
    """One task's pairs: their share among all, and how often they are corrupted.

    Raises:
      ValueError: a negative share, or a probability outside [0, 1]; names the field.
    """

    share: float
    wrong_caption: float  # the caption belongs to another prompt of the same task
    degraded: float  # the image is noisy, blurred, tinted or uneven

    def __post_init__(self) -> None:
        if not self.share >= 0:
            raise ValueError(f"data.tasks: found share {self.share}, expected at least 0")
        for name in ("wrong_caption", "degraded"):
            check_probability(f"data.tasks: {name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """What one batch looks like.

    Raises:
      ValueError: a probability outside [0, 1], no share above 0, or a batch size below 1; names the field.
    """

    batch_size: int
    tasks: Mapping[str, TaskPairs]
    empty_caption: float  # probability of the null prompt, for guidance

    def __post_init__(self) -> None:
        check_probability("data.empty_caption", self.empty_caption)
        if not any(pairs.share > 0 for pairs in self.tasks.values()):
            raise ValueError("data.tasks: expected at least one task with a share above 0")
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size: found {self.batch_size}, expected at least 1")


def check_probability(name: str, value: float) -> None:
    """Raises ValueError naming the field unless `value` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: found {value}, expected a probability")


def make_pairs(world: World, spec: PairSpec, seed: int, step: int) -> dict[str, Any]:
    """Batch number `step`: `{"x0": [B, 24, 24, 3], "conditioning": …}`, a function of (seed, step) alone."""
    rng = np.random.default_rng((seed, step))
    shares = np.asarray([pairs.share for pairs in spec.tasks.values()])
    images, captions = [], []
    for name in rng.choice(list(spec.tasks), spec.batch_size, p=shares / shares.sum()):
        train, pairs = world.tasks[name].train, spec.tasks[name]
        prompt = caption = train[rng.integers(len(train))]
        image = render(prompt, rng)
        if rng.random() < pairs.degraded:
            image = degrade(image, rng)
        if rng.random() < pairs.wrong_caption:
            caption = train[rng.integers(len(train))]
        if rng.random() < spec.empty_caption:
            caption = ""
        images.append(image)
        captions.append(caption)
    return {"x0": np.stack(images), "conditioning": world.encode(captions)}
