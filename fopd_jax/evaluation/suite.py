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
from jaxtyping import Array, Float, Int

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.flow.rollout import sample_final
from fopd_jax.flow.transition import Transition, standard_normal
from fopd_jax.parallel.distributed import gather_rows, held_rows, put_replicated, rows_of
from fopd_jax.parallel.sharding import activation_rules, batch_sharding
from fopd_jax.policy.velocity import Tree, Velocity, guided_velocity
from fopd_jax.tasks.task import Scores, Task
from fopd_jax.worlds.world import World, embed_empty, embed_prompts

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

    `guided`: whether it reads the empty prompt, `null` being None otherwise. `mesh`: batches are split over it, so that
    each process encodes and decodes the rows of its own devices alone.
    """

    draw: Callable[..., Float[Array, "b h w c"]]
    guided: bool
    mesh: Mesh

    def __call__(
        self, world: World, variables: Tree, adapter: Tree, prompts: Sequence[str], keys: Array
    ) -> Float[np.ndarray, "b height width 3"]:
        """Images in [-1, 1] on every process, each from its prompt and key alone."""
        images = self.held(world, variables, adapter, prompts, keys)
        return gather_rows(images, batch_sharding(self.mesh), len(prompts))

    def held(
        self, world: World, variables: Tree, adapter: Tree, prompts: Sequence[str], keys: Array
    ) -> Float[np.ndarray, "n height width 3"]:
        """Of the same images those that this process's devices make, in the order of `rows`."""
        conditioning = embed_prompts(world, prompts, self.mesh)
        null = embed_empty(world, self.mesh) if self.guided else None
        keys = put_replicated(keys, batch_sharding(self.mesh))
        latents = self.draw(variables, adapter, conditioning, null, keys)
        return world.decode(held_rows(latents))

    def rows(self, batch_size: int) -> Int[np.ndarray, " n"]:
        """The rows of a batch that this process makes."""
        return rows_of(batch_sharding(self.mesh), batch_size)


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
        with activation_rules(mesh):
            return sample_final(policy, transition, jnp.asarray(sigmas), noise, steps)

    return Sampler(jax.jit(sample, out_shardings=batch_sharding(mesh)), guidance != 1, mesh)


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

    Tasks without scores are not sampled. Each process scores its own images; all get all scores.
    """
    scores: dict[str, list[np.ndarray]] = {}
    for task, score in eval_set.scored():
        for prompts, index in eval_set.pairs(task):
            images = sampler.held(world, variables, adapter, prompts, noise_keys(eval_set.seed, task.name, index))
            rows, wanted = sampler.rows(len(prompts)), int((index < eval_set.samples).sum())
            values = _score(score, images, [prompts[int(row)] for row in rows], int((rows < wanted).sum()))
            gathered = gather_rows(values, batch_sharding(sampler.mesh), len(prompts))
            for skill in values:  # in the task's order, which gathering does not keep
                scores.setdefault(skill, []).append(gathered[skill][:wanted])
            progress(wanted)
    return {skill: np.concatenate(parts) for skill, parts in scores.items()}


def _score(score: Scores, images: np.ndarray, prompts: Sequence[str], wanted: int) -> dict[str, np.ndarray]:
    """Scores of the first `wanted` images, then zeros; of one at least, since the skills are known from it alone."""
    count = max(wanted, 1)
    scores = score(images[:count], prompts[:count])
    return {skill: np.pad(values, (0, len(images) - count)) for skill, values in scores.items()}


def means(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {skill: float(values.mean()) for skill, values in scores.items()}
