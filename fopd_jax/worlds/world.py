"""What surrounds a network: its tasks, how prompts become conditioning, how latents become images."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class World:
    """What surrounds a network: its tasks, how prompts become conditioning, how latents become images in [-1, 1].

    `prepare` tells the world all the prompts that a run will encode, so that it can do so at once, before training.
    """

    latent_shape: tuple[int, int, int]
    tasks: Mapping[str, Task]
    encode: Callable[[Sequence[str]], Conditioning]
    decode: Callable[[np.ndarray], Float[np.ndarray, "n h w 3"]]
    prepare: Callable[[Iterable[str]], None] = lambda prompts: None


def select_tasks(world: World, names: Sequence[str]) -> dict[str, Task]:
    """The named tasks.

    Raises:
      ValueError: a name is not one of the world's tasks.
    """
    for name in names:
        if name not in world.tasks:
            raise ValueError(f"tasks: found {name!r}, expected some of {tuple(world.tasks)}")
    return {name: world.tasks[name] for name in names}
