"""Captioned renderings for flow matching, as clean or as corrupted as a stage wants them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fopd_jax.miniature.render import degrade, render
from fopd_jax.tasks.task import World


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """What one batch looks like. Probabilities are per sample.

    Raises:
      ValueError: a probability outside [0, 1], or a batch size below 1; names the field.
    """

    batch_size: int
    tasks: Mapping[str, float]  # share of each task
    wrong_caption: float  # the caption belongs to another prompt of the same task
    degraded: float  # the image is noisy, blurred, tinted or uneven
    empty_caption: float  # the null prompt, for guidance

    def __post_init__(self) -> None:
        for name in ("wrong_caption", "degraded", "empty_caption"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name}: found {getattr(self, name)}, expected a probability")
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size: found {self.batch_size}, expected at least 1")


def make_pairs(world: World, spec: PairSpec, seed: int, step: int) -> dict[str, Any]:
    """Batch number `step`: `{"x0": [B, 24, 24, 3], "conditioning": …}`, a function of (seed, step) alone."""
    rng = np.random.default_rng((seed, step))
    names, shares = zip(*spec.tasks.items(), strict=True)
    images, captions = [], []
    for name in rng.choice(names, spec.batch_size, p=np.asarray(shares) / sum(shares)):
        train = world.tasks[name].train
        prompt = caption = train[rng.integers(len(train))]
        image = render(prompt, rng)
        if rng.random() < spec.degraded:
            image = degrade(image, rng)
        if rng.random() < spec.wrong_caption:
            caption = train[rng.integers(len(train))]
        if rng.random() < spec.empty_caption:
            caption = ""
        images.append(image)
        captions.append(caption)
    return {"x0": np.stack(images), "conditioning": world.encode(captions)}
