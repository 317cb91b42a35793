"""Score the same held-out (prompt, noise) pairs of any policy."""

import collections
import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from fopd_jax.config.schema import Evaluation
from fopd_jax.console import Progress
from fopd_jax.evaluation.sampler import Sampler, check_finite
from fopd_jax.parallel.agreement import share, together
from fopd_jax.parallel.distributed import gather_rows
from fopd_jax.parallel.sharding import batch_sharding, filled
from fopd_jax.policy.velocity import Tree
from fopd_jax.rewards import monitors
from fopd_jax.rewards.combine import weighted_sum
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.rewards.pool import Pool, Ticket
from fopd_jax.rewards.reward import Metadata, Reward, Scores
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World

SUM = "reward/"
"""Before a task's name: the weighted sum of its rewards."""


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """`samples` pairs a task: the task's test prompts in turn, each time with fresh noise drawn from `seed`.

    `made_at_once` are one batch, `batch_size` filled up to what the mesh divides; pictures show some of the first
    `batch_size` pairs, which are the same on every mesh. `max_failed`: share of a reward's scores that may fail, see
    `run.max_failed_rewards`; `monitored`: whether what reward hacking looks like is measured as well. `read`: what
    networks read in a prompt's place, see `reader`; rewards go by the prompt.
    """

    tasks: Mapping[str, Task]
    samples: int
    batch_size: int
    seed: int
    ways: int = 1  # parts of a batch, see `batch_ways`
    max_failed: float = 1.0
    monitored: bool = False
    read: Callable[[str], str] = str

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
        return ["", *map(self.read, itertools.chain(*drawn, *(task.test for task in self.scored())))]


def reader(settings: Evaluation, world: World) -> Callable[[str], str]:
    """What the section `eval` has networks read in a prompt's place: the prompt, or the same in other words."""
    return (lambda prompt: world.paraphrase(prompt, settings.seed)) if settings.rewritten else str


def _skills(task: Task) -> tuple[str, ...]:
    return (*task.scored, f"{SUM}{task.name}") if task.weights else task.scored


def noise_keys(seed: int, task: str, index: np.ndarray) -> Array:
    """One key per pair, a function of (seed, task, index) alone."""
    root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(task.encode()))
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.asarray(index))


@dataclasses.dataclass(frozen=True)
class Measured:
    """By skill one value a pair, in the order of the pairs, NaN where it failed; `reasons`: why the first did.

    `monitors`: by name one value a pair, see `rewards.monitors`; `clocked`: how fast this process's rewards were.
    """

    values: dict[str, Float[np.ndarray, " n"]]
    reasons: dict[str, str]
    monitors: dict[str, Float[np.ndarray, " n"]] = dataclasses.field(default_factory=dict)
    clocked: dict[str, float] = dataclasses.field(default_factory=dict)

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

    def seen(self) -> dict[str, float]:
        """Means of the monitors that any pair has."""
        return {name: float(np.nanmean(each)) for name, each in self.monitors.items() if not np.isnan(each).all()}


def check_failures(found: Measured, most: float, whose: str = "") -> None:
    """Refuse means of what is left, where too much is missing.

    Raises:
      FloatingPointError: all scores of a skill failed, or a larger share than `most`; names it, share and reason.
    """
    failed = found.failed()
    for skill, line in zip(failed, found.told(), strict=True):
        if failed[skill] == (count := len(found.values[skill])) or failed[skill] / count > most:
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

    Tasks without scores are not sampled. Each process scores its own images, by rewards on the host or on servers
    while the next batch is sampled; all get all scores.

    Raises:
      ValueError: an image is not finite; names its prompt.
      TooManyFailures: see `Pool`; of any process, on all.
    """
    names = dict.fromkeys(name for task in eval_set.scored() for name in task.scored)
    rows: dict[str, list[np.ndarray]] = {}
    reasons: dict[str, str] = {}

    def settle(batch: _Batch) -> None:
        found, seen = together(f"scores of {batch.task.name}", batch.finish)
        reasons.update({**_reasons(found), **reasons})
        padded = {skill: _padded(found.get(skill), batch.size) for skill in _skills(batch.task)}
        padded |= {name: np.pad(values, (0, batch.size - len(values))) for name, values in seen.items()}
        gathered = gather_rows(padded, batch_sharding(sampler.mesh), batch.total)
        for name in padded:  # in the task's order, which gathering does not keep
            rows.setdefault(name, []).append(gathered[name][: batch.wanted])
        progress(batch.wanted)

    waiting: collections.deque[_Batch] = collections.deque()
    with Pool({name: world.rewards[name] for name in names}, most_failed=eval_set.max_failed) as pool:
        for batch in _begun(sampler, world, eval_set, variables, adapter, pool):
            waiting.append(batch)
            if len(waiting) > 1:
                settle(waiting.popleft())
        for batch in waiting:
            settle(batch)
        clocked = pool.statistics()
    shared = share("failed scores", json.dumps(reasons)) if rows else []
    reasons = {skill: reason for each in reversed(shared) for skill, reason in json.loads(each).items()}
    values = {name: np.concatenate(parts) for name, parts in rows.items()}
    seen = {name: values.pop(name) for name in list(values) if name.startswith(monitors.PREFIX)}
    return Measured(values, reasons, seen, clocked)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """This process's `size` images of a batch of `total`, of which `wanted` are no surplus, while they are scored."""

    task: Task
    total: int
    size: int
    wanted: int
    pixels: UInt8[np.ndarray, "n h w 3"]
    ticket: Ticket | None
    monitored: bool

    def finish(self) -> tuple[dict[str, Scores], dict[str, np.ndarray]]:
        """Scores and, where it is monitored, the monitors of each image; of none where nothing was begun."""
        found = self.ticket.result() if self.ticket else {}
        seen = self._seen(found) if self.monitored else {}
        if found and self.task.weights:
            found = {**found, f"{SUM}{self.task.name}": weighted_sum(found, self.task.weights)}
        return found, seen

    def _seen(self, found: Mapping[str, Scores]) -> dict[str, np.ndarray]:
        extra = monitors.extra_text_of(found, len(self.pixels))
        return {**monitors.of_images(self.pixels), monitors.EXTRA_TEXT: extra}


def _begun(
    sampler: Sampler, world: World, eval_set: EvalSet, variables: Tree, adapter: Tree, pool: Pool
) -> Iterator[_Batch]:
    """Every task's batches, sampled and begun to be scored, one by one."""
    for task in eval_set.scored():
        beside = task.beside("test")
        for prompts, index in eval_set.pairs(task):
            read = list(map(eval_set.read, prompts))
            images = sampler.held(world, variables, adapter, read, noise_keys(eval_set.seed, task.name, index))
            wanted = int((index < eval_set.samples).sum())
            mine = [int(row) for row in sampler.rows(len(prompts)) if row < wanted]
            own = [prompts[row] for row in mine]
            about = [beside[index[row] % len(beside)] for row in mine]
            submit = functools.partial(_submit, pool, task, images, own, about)
            pixels, ticket = together(f"images of {task.name}", submit)
            yield _Batch(task, len(prompts), len(images), wanted, pixels, ticket, eval_set.monitored)


def _submit(
    pool: Pool,
    task: Task,
    images: Float[np.ndarray, "b h w 3"],
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> tuple[UInt8[np.ndarray, "n h w 3"], Ticket | None]:
    """Begin to score the first images, as many as there are prompts; nothing of none."""
    images = images[: len(prompts)]
    check_finite(images, [f"prompt {prompt!r}" for prompt in prompts])
    pixels = to_pixels(images)
    return pixels, pool.submit(pixels, prompts, metadata, task.scored) if prompts else None


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
