"""What surrounds a network: its tasks, their pictures, how prompts become conditioning and latents images."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from fopd_jax.conditioning.encoder import Conditioning, TokenIds
from fopd_jax.config.schema import Pairs
from fopd_jax.parallel.distributed import put_batch, rows_of
from fopd_jax.parallel.sharding import batch_sharding, batch_ways, replicated
from fopd_jax.rewards.reward import Reward
from fopd_jax.tasks.paraphrase import paraphrase
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.decoder import Decoder

Encode = Callable[[Sequence[str]], Conditioning | TokenIds]


@runtime_checkable
class CaptionedLatents(Protocol):
    """Batches of captioned latents; row i of batch number `step` is a function of (seed, step, i) alone."""

    def batch(self, step: int, rows: Int[np.ndarray, " n"]) -> dict[str, Any]:
        """Some rows of a batch: `{"x0": [n, H, W, C], "conditioning": what `World.encode` makes of the captions}`."""
        ...

    def upto(self, steps: int) -> Iterable[str]:
        """The captions of the first `steps` batches, each once, for worlds that have to `prepare` them."""
        ...

    def describe(self, step: int, rows: Sequence[int]) -> list[str]:
        """Task and caption of some rows of a batch."""
        ...


MakePairs = Callable[[Mapping[str, Pairs], int, float, int], CaptionedLatents]
"""`(tasks, batch size, probability of an empty caption, seed) → captioned latents`; ValueError where it has none."""


def check_shares(tasks: Mapping[str, Pairs]) -> None:
    """Raises ValueError where no task has a share of the pairs."""
    if not any(pairs.share > 0 for pairs in tasks.values()):
        shares = [pairs.share for pairs in tasks.values()]
        raise ValueError(f"tasks: found shares {shares}, expected at least one task with a share above 0")


@dataclasses.dataclass(frozen=True)
class World:
    """What surrounds a network: its tasks, how prompts become conditioning, how latents become images in [-1, 1].

    `encode` gives what of prompts is put on the devices, rows on the host; `embed` makes the conditioning of it there.
    `prepare` tells the world all the prompts that a run will encode, so that it can do so at once, before training.
    `missing` are those of them that it has still to encode, `review` what is worth telling of them, a line each.
    `pairs` makes captioned latents to train on, where the world has images.
    `rewards`: what scores its tasks' images, by name: the world's own, and once a config has been read what it names.
    `decoder`: `decode` as part of a jitted program, where it can be one.
    `paraphrase(prompt, seed)`: the same in words that networks seldom or never saw, which `encode` takes.
    """

    latent_shape: tuple[int, int, int]
    tasks: Mapping[str, Task]
    encode: Encode
    decode: Callable[[np.ndarray], Float[np.ndarray, "n h w 3"]]
    prepare: Callable[[Iterable[str]], None] = lambda prompts: None
    embed: Callable[[Any], Conditioning] = lambda placed: placed
    missing: Callable[[Iterable[str]], list[str]] = lambda prompts: []
    review: Callable[[Iterable[str]], list[str]] = lambda prompts: []
    pairs: MakePairs | None = None
    rewards: Mapping[str, Reward] = dataclasses.field(default_factory=dict)
    decoder: Decoder | None = None
    paraphrase: Callable[[str, int], str] = paraphrase


def embed_prompts(world: World, prompts: Sequence[str], mesh: Mesh) -> Conditioning:
    """The conditioning of a batch of prompts, split over `mesh`; each process encodes the rows of its own devices."""
    sharding, size = batch_sharding(mesh), len(prompts)
    mine = world.encode([prompts[int(row)] for row in rows_of(sharding, size)])
    return world.embed(put_batch(mine, sharding, size))


def embed_empty(world: World, mesh: Mesh) -> Conditioning:
    """The conditioning of the empty prompt, one row, on every device of `mesh`."""
    return embed_alone(world, "", mesh)


def embed_alone(world: World, prompt: str, mesh: Mesh) -> Conditioning:
    """The same of any prompt."""
    return _first_row(mesh)(embed_prompts(world, [prompt] * batch_ways(mesh), mesh))


@functools.cache
def _first_row(mesh: Mesh) -> Callable[[Conditioning], Conditioning]:
    return jax.jit(lambda batch: jax.tree.map(lambda leaf: leaf[:1], batch), out_shardings=replicated(mesh))


def select_tasks(world: World, names: Sequence[str], field: str = "tasks") -> dict[str, Task]:
    """The named tasks.

    Raises:
      ValueError: a name is not one of the world's tasks; names the config's field.
    """
    for name in names:
        if name not in world.tasks:
            raise ValueError(f"{field}: found {name!r}, expected some of {tuple(world.tasks)}")
    return {name: world.tasks[name] for name in names}
