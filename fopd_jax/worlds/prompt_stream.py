"""Training prompts, drawn by the step alone."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Int

from fopd_jax.config.schema import RoutedTask
from fopd_jax.worlds.foreseen import foresee
from fopd_jax.worlds.world import World, select_tasks

Routes = Callable[[Sequence[str], Sequence[str]], Int[np.ndarray, " n"]]
"""`(tasks, prompts) -> each prompt's teacher`; raises ValueError where a task has none (see `policy.panel`)."""


@struct.dataclass
class Batch:
    """Encoded prompts `[B, …]` and each one's teacher `[B]`; a stream's are what its world embeds on the devices."""

    conditioning: Any  # Conditioning, once embedded
    route: Any


class PromptStream:
    """Training prompts as a function of the step alone: tasks by weight, prompts uniformly, teachers by task.

    `rows`: those of each batch that this process encodes (all by default), see `distributed.rows_of`.

    Raises:
      ValueError: an unknown task, a task without a teacher, no weight, or a batch that the group size does not divide.
    """

    def __init__(
        self,
        world: World,
        tasks: Mapping[str, RoutedTask],
        routes: Routes,
        *,
        batch_size: int,
        images_per_prompt: int,
        seed: int,
        rows: Int[np.ndarray, " n"] | None = None,
    ) -> None:
        self.tasks = select_tasks(world, tuple(tasks))
        for task in self.tasks.values():
            routes([task.name] * len(task.train), task.train)
        if batch_size % images_per_prompt:
            raise ValueError(
                f"images_per_prompt: found {images_per_prompt}, expected a divisor of batch_size {batch_size}"
            )
        self.encode, self.routes, self.seed = world.encode, routes, seed
        self.count, self.repeats = batch_size // images_per_prompt, images_per_prompt
        rows = np.arange(batch_size) if rows is None else rows
        self.drawn, self.repeat = np.unique(rows // images_per_prompt, return_inverse=True)
        weights = np.asarray([tasks[name].weight for name in self.tasks], float)
        if weights.sum() <= 0:
            raise ValueError(f"tasks: found weights {weights.tolist()}, expected at least one above 0")
        self.shares = weights / weights.sum()

    def draw(self, step: int) -> tuple[list[str], list[str]]:
        """The tasks and prompts of one step's whole batch, before prompts are repeated."""
        rng = np.random.default_rng((self.seed, step))
        tasks = [str(name) for name in rng.choice(list(self.tasks), self.count, p=self.shares)]
        return tasks, [self.tasks[task].train[rng.integers(len(self.tasks[task].train))] for task in tasks]

    def upto(self, steps: int) -> Iterator[str]:
        """The distinct prompts of the first `steps` batches, see `foresee`."""
        drawn = (task.train for task, share in zip(self.tasks.values(), self.shares, strict=True) if share > 0)
        return foresee(lambda step: self.draw(step)[1], steps, itertools.chain.from_iterable(drawn))

    def describe(self, step: int, rows: Sequence[int]) -> list[str]:
        """Task and prompt of some rows of one step's whole batch."""
        tasks, prompts = self.draw(step)
        return [f"{tasks[row // self.repeats]}: {prompts[row // self.repeats]!r}" for row in rows]

    def batch(self, step: int) -> Batch:
        """This process's rows of one step's batch."""
        tasks, prompts = ([drawn[i] for i in self.drawn] for drawn in self.draw(step))
        batch = Batch(self.encode(prompts), self.routes(tasks, prompts))
        return jax.tree.map(lambda leaf: leaf[self.repeat], batch)
