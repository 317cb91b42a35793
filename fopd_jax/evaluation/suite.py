"""Sample the same held-out (prompt, noise) pairs from any policy and score them."""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fopd_jax.conditioning import Conditioning
from fopd_jax.flow.rollout import sample_ode
from fopd_jax.flow.transition import standard_normal
from fopd_jax.policy import Tree, Velocity, guided_velocity
from fopd_jax.tasks.task import Task, World

Sampler = Callable[[Tree, Tree, Conditioning, Array], Float[Array, "b h w c"]]
Progress = Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """`samples` pairs a task: the task's test prompts in turn, each time with fresh noise drawn from `seed`."""

    tasks: Mapping[str, Task]
    samples: int
    batch_size: int
    seed: int

    def pairs(self, task: Task) -> Iterator[tuple[list[str], np.ndarray]]:
        """Batches of prompts and the indices of their noises; the last one is filled up, its surplus ignored."""
        for start in range(0, self.samples, self.batch_size):
            index = np.arange(start, start + self.batch_size)
            yield [task.test[i % len(task.test)] for i in index], index


def make_sampler(
    velocity: Velocity, sigmas: np.ndarray, null: Conditioning | None, guidance: float, latent_shape: tuple[int, ...]
) -> Sampler:
    """A jitted ODE sampler `(variables, adapter, conditioning, noise keys [B]) → latents`, one program for all."""

    def sample(variables: Tree, adapter: Tree, conditioning: Conditioning, keys: Array) -> Array:
        def policy(x: Array, sigma: Array) -> Array:
            return guided_velocity(velocity, variables, adapter, x, sigma, conditioning, null, guidance)

        return sample_ode(policy, jnp.asarray(sigmas), standard_normal(keys, latent_shape))

    return jax.jit(sample)


def noise_keys(seed: int, task: str, index: np.ndarray) -> Array:
    """One key per pair, a function of (seed, task, index) alone."""
    root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(task.encode()))
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.asarray(index))


def evaluate(
    sampler: Sampler,
    world: World,
    eval_set: EvalSet,
    variables: Tree,
    adapter: Tree,
    progress: Progress = lambda n: None,
) -> dict[str, Float[np.ndarray, " n"]]:
    """Scores by skill, one value per pair, in the order of the pairs; tasks that share a skill are concatenated."""
    scores: dict[str, list[np.ndarray]] = {}
    for task in eval_set.tasks.values():
        for prompts, index in eval_set.pairs(task):
            images = sample_images(
                sampler, world, variables, adapter, prompts, noise_keys(eval_set.seed, task.name, index)
            )
            wanted = int((index < eval_set.samples).sum())
            for skill, values in task.score(images[:wanted], prompts[:wanted]).items():
                scores.setdefault(skill, []).append(values)
            progress(wanted)
    return {skill: np.concatenate(parts) for skill, parts in scores.items()}


def sample_images(
    sampler: Sampler, world: World, variables: Tree, adapter: Tree, prompts: list[str], keys: Array
) -> Float[np.ndarray, "b h w 3"]:
    """Images in [-1, 1] on the host."""
    conditioning = jax.device_put(world.encode(prompts))
    return world.decode(jax.device_get(sampler(variables, adapter, conditioning, keys)))


def means(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {skill: float(values.mean()) for skill, values in scores.items()}
