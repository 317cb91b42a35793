"""Captioned renderings for flow matching, as clean or as corrupted as a stage wants them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from fopd_jax.config.schema import Pairs
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.miniature.render import degrade, render
from fopd_jax.worlds.world import Encode, check_shares


@dataclasses.dataclass(frozen=True)
class Renderings:
    """The miniature's captioned latents, see `worlds.world.CaptionedLatents`.

    A batch's decisions and renderings come from one stream of random numbers, which the packaged weights were trained
    on; so every process renders all of a batch (about 1 ms an image) and encodes its own rows alone.

    Raises:
      ValueError: no task has a share, or one names a folder of images; names the field.
    """

    world: Mapping[str, Task]
    encode: Encode
    tasks: Mapping[str, Pairs]
    batch_size: int
    empty_caption: float
    seed: int

    def __post_init__(self) -> None:
        check_shares(self.tasks)
        for name, pairs in self.tasks.items():
            if pairs.images:
                raise ValueError(
                    f"tasks.{name}.images: found {pairs.images!r}, expected '': the miniature renders its own"
                )

    def draw(self, step: int) -> tuple[list[Float[np.ndarray, "24 24 3"]], list[str], list[str]]:
        """Images, tasks and captions of batch number `step`."""
        rng = np.random.default_rng((self.seed, step))
        shares = np.asarray([pairs.share for pairs in self.tasks.values()])
        names = [str(name) for name in rng.choice(list(self.tasks), self.batch_size, p=shares / shares.sum())]
        images, captions = [], []
        for name in names:
            train, pairs = self.world[name].train, self.tasks[name]
            prompt = caption = train[rng.integers(len(train))]
            image = render(prompt, rng)
            if rng.random() < pairs.degraded:
                image = degrade(image, rng)
            if rng.random() < pairs.wrong_caption:
                caption = train[rng.integers(len(train))]
            if rng.random() < self.empty_caption:
                caption = ""
            images.append(image)
            captions.append(caption)
        return images, names, captions

    def batch(self, step: int, rows: Int[np.ndarray, " n"]) -> dict[str, Any]:
        """`{"x0": [n, 24, 24, 3], "conditioning": …}`."""
        images, _, captions = self.draw(step)
        return {"x0": np.stack(images)[rows], "conditioning": self.encode([captions[row] for row in rows])}

    def upto(self, steps: int) -> Iterable[str]:
        """Nothing: a prompt of the miniature is encoded as fast as it is looked up."""
        return ()

    def describe(self, step: int, rows: Sequence[int]) -> list[str]:
        """Task and caption of some rows of a batch."""
        _, names, captions = self.draw(step)
        return [f"{names[row]}: {captions[row]!r}" for row in rows]
