"""Captioned renderings for flow matching, as clean or as corrupted as a stage wants them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fopd_jax.config.schema import Pairs
from fopd_jax.worlds.miniature.render import degrade, render
from fopd_jax.worlds.world import World


def check_shares(tasks: Mapping[str, Pairs]) -> None:
    """Raises ValueError where no task has a share of the pairs."""
    if not any(pairs.share > 0 for pairs in tasks.values()):
        raise ValueError("tasks: expected at least one task with a share above 0")


def make_pairs(
    world: World, tasks: Mapping[str, Pairs], batch_size: int, empty_caption: float, seed: int, step: int
) -> dict[str, Any]:
    """Batch number `step`: `{"x0": [B, 24, 24, 3], "conditioning": …}`, a function of (seed, step) alone."""
    rng = np.random.default_rng((seed, step))
    shares = np.asarray([pairs.share for pairs in tasks.values()])
    images, captions = [], []
    for name in rng.choice(list(tasks), batch_size, p=shares / shares.sum()):
        train, pairs = world.tasks[name].train, tasks[name]
        prompt = caption = train[rng.integers(len(train))]
        image = render(prompt, rng)
        if rng.random() < pairs.degraded:
            image = degrade(image, rng)
        if rng.random() < pairs.wrong_caption:
            caption = train[rng.integers(len(train))]
        if rng.random() < empty_caption:
            caption = ""
        images.append(image)
        captions.append(caption)
    return {"x0": np.stack(images), "conditioning": world.encode(captions)}
