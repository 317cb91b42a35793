"""Sample the same held-out (prompt, noise) pairs from any policy and score them."""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from fopd_jax.conditioning import Conditioning
from fopd_jax.flow.rollout import sample_final
from fopd_jax.flow.transition import Transition, standard_normal
from fopd_jax.parallel.sharding import batch_sharding, replicated
from fopd_jax.policy import Tree, Velocity, guided_velocity
from fopd_jax.tasks.task import Scores, Task, World

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

    def scored(self) -> list[tuple[Task, Scores]]:
        """The tasks that something measures, and what does."""
        return [(task, task.score) for task in self.tasks.values() if task.score is not None]

    def prompts(self) -> list[str]:
        """Every prompt that evaluation may ask for, the empty one included: of tasks without scores, what is drawn."""
        drawn = [next(self.pairs(task))[0] for task in self.tasks.values()]
        return ["", *itertools.chain(*drawn, *(task.test for task, _ in self.scored()))]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """One jitted program for all policies: `draw(variables, adapter, conditioning, null, keys [B]) → latents`.

    `guided`: whether it reads the empty prompt, `null` being None otherwise. `mesh`: batches are split over it.
    """

    draw: Callable[..., Float[Array, "b h w c"]]
    guided: bool
    mesh: Mesh

    def __call__(
        self, world: World, variables: Tree, adapter: Tree, prompts: Sequence[str], keys: Array
    ) -> Float[np.ndarray, "b height width 3"]:
        """Images in [-1, 1] on the host, each from its prompt and key alone."""
        conditioning, keys = jax.device_put((world.encode(prompts), keys), batch_sharding(self.mesh))
        null = jax.device_put(world.encode([""]), replicated(self.mesh)) if self.guided else None
        return world.decode(jax.device_get(self.draw(variables, adapter, conditioning, null, keys)))


def make_sampler(
    velocity: Velocity,
    transition: Transition,
    sigmas: np.ndarray,
    guidance: float,
    latent_shape: tuple[int, ...],
    mesh: Mesh,
) -> Sampler:
    """A sampler of one schedule, transition and guidance scale; a scale of 1 does without the empty prompt."""

    def sample(variables: Tree, adapter: Tree, conditioning: Conditioning, null: Conditioning | None, keys: Array):
        def policy(x: Array, sigma: Array) -> Array:
            return guided_velocity(velocity, variables, adapter, x, sigma, conditioning, null, guidance)

        noise = standard_normal(keys, latent_shape)
        steps = jax.vmap(lambda t: jax.vmap(lambda key: jax.random.fold_in(key, t))(keys))(jnp.arange(len(sigmas) - 1))
        return sample_final(policy, transition, jnp.asarray(sigmas), noise, steps)

    return Sampler(jax.jit(sample), guidance != 1, mesh)


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
    """Scores by skill, one value per pair, in the order of the pairs; tasks that share a skill are concatenated.

    Tasks without scores are not sampled.
    """
    scores: dict[str, list[np.ndarray]] = {}
    for task, score in eval_set.scored():
        for prompts, index in eval_set.pairs(task):
            images = sampler(world, variables, adapter, prompts, noise_keys(eval_set.seed, task.name, index))
            wanted = int((index < eval_set.samples).sum())
            for skill, values in score(images[:wanted], prompts[:wanted]).items():
                scores.setdefault(skill, []).append(values)
            progress(wanted)
    return {skill: np.concatenate(parts) for skill, parts in scores.items()}


def means(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {skill: float(values.mean()) for skill, values in scores.items()}
