"""Score the same held-out (prompt, noise) pairs of any policy."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fopd_jax.console import Progress
from fopd_jax.evaluation.sampler import Sampler
from fopd_jax.parallel.agreement import together
from fopd_jax.parallel.distributed import gather_rows
from fopd_jax.parallel.sharding import batch_sharding, filled
from fopd_jax.policy.velocity import Tree
from fopd_jax.tasks.task import Scores, Task
from fopd_jax.worlds.world import World


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """`samples` pairs a task: the task's test prompts in turn, each time with fresh noise drawn from `seed`.

    `made_at_once` are one batch, `batch_size` filled up to what the mesh divides; pictures show some of the first
    `batch_size` pairs, which are the same on every mesh.
    """

    tasks: Mapping[str, Task]
    samples: int
    batch_size: int
    seed: int
    ways: int = 1  # parts of a batch, see `batch_ways`

    @property
    def made_at_once(self) -> int:
        return filled(self.batch_size, self.ways)

    def pairs(self, task: Task) -> Iterator[tuple[list[str], np.ndarray]]:
        """Batches of prompts and the indices of their noises; the last one is filled up, its surplus ignored."""
        for start in range(0, self.samples, self.made_at_once):
            index = np.arange(start, start + self.made_at_once)
            yield [task.test[i % len(task.test)] for i in index], index

    def scored(self) -> list[tuple[Task, Scores]]:
        """The tasks that something measures, and what does."""
        return [(task, task.score) for task in self.tasks.values() if task.score is not None]

    def prompts(self) -> list[str]:
        """Every prompt that evaluation may ask for, the empty one included: of tasks without scores, what is drawn."""
        drawn = [next(self.pairs(task))[0] for task in self.tasks.values()]
        return ["", *itertools.chain(*drawn, *(task.test for task, _ in self.scored()))]


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
            mine = [prompts[int(row)] for row in rows], int((rows < wanted).sum())
            values = together(f"scores of {task.name}", functools.partial(_score, score, images, *mine))
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
