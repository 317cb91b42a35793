"""Score the same held-out (prompt, noise) pairs of any policy."""

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from fopd_jax.console import Progress
from fopd_jax.evaluation.grid import to_pixels
from fopd_jax.evaluation.sampler import Sampler, check_finite
from fopd_jax.parallel.agreement import share, together
from fopd_jax.parallel.distributed import gather_rows
from fopd_jax.parallel.sharding import batch_sharding, filled
from fopd_jax.policy.velocity import Tree
from fopd_jax.rewards.reward import Metadata, Reward, Scores
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World

SUM = "reward/"
"""Before a task's name: the weighted sum of its rewards."""


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

    def scored(self) -> list[Task]:
        """The tasks that some reward scores."""
        return [task for task in self.tasks.values() if task.scored]

    def skills(self) -> list[str]:
        """What evaluation gives a mean of: rewards by name, and by task the weighted sum of those that count there."""
        return list(dict.fromkeys(skill for task in self.scored() for skill in _skills(task)))

    def prompts(self) -> list[str]:
        """Every prompt that evaluation may ask for, the empty one included: of tasks without scores, what is drawn."""
        drawn = [next(self.pairs(task))[0] for task in self.tasks.values()]
        return ["", *itertools.chain(*drawn, *(task.test for task in self.scored()))]


def _skills(task: Task) -> tuple[str, ...]:
    return (*task.scored, f"{SUM}{task.name}") if task.weights else task.scored


def noise_keys(seed: int, task: str, index: np.ndarray) -> Array:
    """One key per pair, a function of (seed, task, index) alone."""
    root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(task.encode()))
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.asarray(index))


@dataclasses.dataclass(frozen=True)
class Measured:
    """By skill one value a pair, in the order of the pairs, NaN where it failed; `reasons`: why the first did."""

    values: dict[str, Float[np.ndarray, " n"]]
    reasons: dict[str, str]

    def failed(self) -> dict[str, int]:
        """How many pairs have no value, by skill, where there are any."""
        counts = {skill: int(np.isnan(values).sum()) for skill, values in self.values.items()}
        return {skill: count for skill, count in counts.items() if count}

    def told(self) -> list[str]:
        """What failed, in words, a line a skill."""
        return [
            f"{skill}: {count} of {len(self.values[skill])} failed: {self.reasons[skill]}"
            for skill, count in self.failed().items()
        ]

    def means(self) -> dict[str, float]:
        """Over the pairs that have a value."""
        return {skill: float(np.nanmean(values)) for skill, values in self.values.items()}


def check_failures(found: Measured, most: float, whose: str = "") -> None:
    """Refuse means of what is left, where too much is missing.

    Raises:
      FloatingPointError: all scores of a skill failed, or a larger share than `most`; names it, share and reason.
    """
    failed = found.failed()
    for skill, line in zip(failed, found.told(), strict=True):
        if failed[skill] == (count := len(found.values[skill])) or failed[skill] > most * count:
            raise FloatingPointError(f"scores{whose}: {line} (run.max_failed_rewards is {most:g})")


def evaluate(
    sampler: Sampler,
    world: World,
    eval_set: EvalSet,
    variables: Tree,
    adapter: Tree,
    progress: Progress = lambda n: None,
) -> Measured:
    """Scores of all tasks' pairs; tasks that share a skill are concatenated. All rewards must be in `world.rewards`.

    Tasks without scores are not sampled. Each process scores its own images; all get all scores.

    Raises:
      ValueError: an image is not finite; names its prompt.
    """
    values: dict[str, list[np.ndarray]] = {}
    reasons: dict[str, str] = {}
    for task in eval_set.scored():
        beside = task.beside("test")
        for prompts, index in eval_set.pairs(task):
            images = sampler.held(world, variables, adapter, prompts, noise_keys(eval_set.seed, task.name, index))
            wanted = int((index < eval_set.samples).sum())
            mine = [int(row) for row in sampler.rows(len(prompts)) if row < wanted]
            about = [beside[index[row] % len(beside)] for row in mine]
            score = functools.partial(_score, world.rewards, task, images, [prompts[row] for row in mine], about)
            found = together(f"scores of {task.name}", score)
            reasons = {**_reasons(found), **reasons}
            padded = {skill: _padded(found.get(skill), len(images)) for skill in _skills(task)}
            gathered = gather_rows(padded, batch_sharding(sampler.mesh), len(prompts))
            for skill in padded:  # in the task's order, which gathering does not keep
                values.setdefault(skill, []).append(gathered[skill][:wanted])
            progress(wanted)
    shared = share("failed scores", json.dumps(reasons)) if values else []
    reasons = {skill: reason for each in reversed(shared) for skill, reason in json.loads(each).items()}
    return Measured({skill: np.concatenate(parts) for skill, parts in values.items()}, reasons)


def _score(
    rewards: Mapping[str, Reward],
    task: Task,
    images: Float[np.ndarray, "b h w 3"],
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> dict[str, Scores]:
    """Scores of the first images, as many as there are prompts; nothing of none."""
    if not prompts:
        return {}
    images = images[: len(prompts)]
    check_finite(images, [f"prompt {prompt!r}" for prompt in prompts])
    found = measure(rewards, task.scored, to_pixels(images), prompts, metadata)
    return {**found, f"{SUM}{task.name}": weighted_sum(found, task.weights)} if task.weights else found


def measure(
    rewards: Mapping[str, Reward],
    names: Sequence[str],
    pixels: UInt8[np.ndarray, "n h w 3"],
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> dict[str, Scores]:
    """What the named rewards say of images.

    Raises:
      ValueError: one says it of another number of images; names it.
    """
    found = {name: rewards[name].score(pixels, prompts, metadata) for name in names}
    for name, scores in found.items():
        if len(scores) != len(pixels):
            raise ValueError(f"rewards.{name}: found {len(scores)} scores of {len(pixels)} images, expected one each")
    return found


def weighted_sum(found: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """Σ weight · value over `weights`, one reward at least; it fails where one of them does, and says which."""
    details: list[Metadata] = [{} for _ in next(iter(found.values())).values]
    for name in weights:
        for i in np.flatnonzero(found[name].failed):
            details[i] = details[i] or {"error": f"{name}: {found[name].details[i]['error']}"}
    values = np.sum([weight * found[name].values for name, weight in weights.items()], axis=0)
    return Scores(values, np.isnan(values), tuple(details))


def _reasons(found: Mapping[str, Scores]) -> dict[str, str]:
    """Why the first image failed, by skill, where some did."""
    return {
        skill: str(scores.details[int(scores.failed.argmax())]["error"])
        for skill, scores in found.items()
        if scores.failed.any()
    }


def _padded(scores: Scores | None, count: int) -> Float[np.ndarray, " b"]:
    """Values, filled up with zeros."""
    values = np.zeros(count)
    if scores is not None:
        values[: len(scores)] = scores.values
    return values
