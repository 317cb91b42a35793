"""From a rollout's latents to each sample's credit, within a program: decoded, scored, compared as `scoring` does."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from fopd_jax.config.learning import Comparison, Decoding
from fopd_jax.parallel.distributed import spread
from fopd_jax.policy.velocity import Tree
from fopd_jax.rewards import traced
from fopd_jax.rewards.advantages import advantages
from fopd_jax.rewards.combine import Normalise
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.rewards.reward import Traced
from fopd_jax.stages.rewards import reward_names, task_numbers
from fopd_jax.steps.grpo.spec import Credit
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.decoder import Decoder
from fopd_jax.worlds.prompt_stream import Drawn
from fopd_jax.worlds.world import World


@struct.dataclass
class Asked:
    """What scores need of a batch's prompts, rows on the host or on the devices.

    `rows`: of each reward; `weights [B, R]`: of each reward for each sample; `asked [B, R]`: whether the sample's task
    names it; `groups [B]`; `task [B]`: which of the tasks it is of, None where there is one alone.
    """

    rows: Mapping[str, Tree]
    weights: Float[np.ndarray, "b r"] | Float[Array, "b r"]
    asked: Bool[np.ndarray, "b r"] | Bool[Array, "b r"]
    groups: Int[np.ndarray, " b"] | Int[Array, " b"]
    task: Int[np.ndarray, " b"] | Int[Array, " b"] | None = None


@struct.dataclass
class Seen:
    """For the host to look at: `pixels [B, h, w, 3]`, images in uint8 as their rewards saw them; `finite [B]`: whether
    all of an image was, before it was made bytes.
    """

    pixels: Any  # Any because tree operations put anything into a leaf
    finite: Any


def is_traceable(world: World) -> bool:
    """Whether all of a world's tasks can be scored within a program."""
    named = reward_names(world.tasks)
    return world.decoder is not None and all(world.rewards[name].traced is not None for name in named)


def see(images: Float[Array, "b h w 3"]) -> Seen:
    """Decoded images in about [-1, 1] as rewards see them, traced."""
    return Seen(to_pixels(images), jnp.isfinite(images).all(axis=(1, 2, 3)))


@dataclasses.dataclass(frozen=True)
class TracedScoring:
    """Scores rollouts of a world's tasks by the rewards that these name, and compares them within their groups.

    `count`: groups a batch.
    """

    tasks: Mapping[str, Task]
    rewards: Mapping[str, Traced]
    decoder: Decoder
    mesh: Mesh
    comparison: Comparison
    decoding: Decoding
    count: int

    def ask(self, drawn: Sequence[Drawn]) -> Asked:
        """Rows of a batch, on the host."""
        prompts, metadata = [each.prompt for each in drawn], [each.metadata for each in drawn]
        named = [self.tasks[each.task].rewards for each in drawn]
        return Asked(
            rows=traced.prepare(self.rewards, prompts, metadata),
            weights=np.array([[each.get(name, 0.0) for name in self.rewards] for each in named], np.float32),
            asked=np.array([[name in each for name in self.rewards] for each in named]),
            groups=np.array([each.group for each in drawn], np.int32),
            task=task_numbers(self.tasks, drawn),
        )

    def params(self) -> Tree:
        """What decoder and rewards compute with, on every device."""
        decoder = spread(self.decoder.params(), self.mesh)
        return {"decoder": decoder, "rewards": traced.place(self.rewards, self.mesh)}

    def credit(self, params: Tree, latents: Float[Array, "b h w c"], asked: Asked) -> tuple[Credit, Seen]:
        """The credit of final latents, and their images, traced."""
        with jax.named_scope("decode"):
            images = self.decoder.make(self.decoding, self.mesh)(params["decoder"], latents)
        with jax.named_scope("rewards"):
            values = traced.score(self.rewards, params["rewards"], images, asked.rows)
        values = jnp.where(asked.asked.T, values, jnp.nan)
        settings, groups = self.comparison, jnp.asarray(asked.groups)
        found = advantages(
            values, jnp.asarray(asked.weights).T, groups, self.count, cast(Normalise, settings.normalise),
            settings.clip, self.mesh,
        )  # fmt: skip
        task = None if asked.task is None else jnp.asarray(asked.task)
        credit = Credit(found.values, values, jnp.asarray(asked.asked).T, found.valid, found.flat, task)
        return credit, see(images)


def make_traced_scoring(
    world: World, mesh: Mesh, comparison: Comparison, decoding: Decoding, count: int
) -> TracedScoring:
    """That of a world.

    Raises:
      ValueError: a reward, or the world's decoder, has no form within a program; names it.
    """
    if world.decoder is None:
        raise ValueError("run.one_program: found True, but the world has no decoder within a program")
    rewards = traced.traced_of({name: world.rewards[name] for name in reward_names(world.tasks)})
    return TracedScoring(world.tasks, rewards, world.decoder, mesh, comparison, decoding, count)
