"""Training prompts, drawn by the step alone."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from fopd_jax.config.learning import RewardedTask
from fopd_jax.config.schema import RoutedTask
from fopd_jax.rewards.reward import Metadata
from fopd_jax.tasks.sampling import Curriculum, Walk
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.foreseen import foresee
from fopd_jax.worlds.placement import Placement
from fopd_jax.worlds.world import World, select_tasks

Routes = Callable[[Sequence[str], Sequence[str]], Int[np.ndarray, " n"]]
"""`(tasks, prompts) -> each prompt's teacher`; raises ValueError where a task has none (see `policy.panel`)."""

Mixes = Callable[[Sequence[str], Sequence[str]], "Mix"]
"""`(tasks, prompts) -> each prompt's several teachers`."""

Dials = Callable[[int, Int[np.ndarray, " n"], Sequence[str]], tuple[Any, "Mix"]]
"""`(step, the draws' numbers in it, their tasks) -> each one's coordinates [n, K], and the teachers there`."""

MOST_ORDERED = 2**18
"""Draws; seeing them takes a second or few."""


@struct.dataclass
class Mix:
    """Soft routing: the teachers `bank [B, m]` that each sample is taught by, with weights `[B, 2, m]` at the image
    (t = 0) and at pure noise (t = 1), linear in t between them. The first is the chief one.
    """

    bank: Any
    weights: Any

    def at(self, sigma: Float[Array, "*b"]) -> Float[Array, "b m"]:
        """The weights at a noise level, 0-d or one a sample."""
        t = jnp.broadcast_to(sigma, self.bank.shape[:1])[:, None]
        return (1 - t) * self.weights[:, 0] + t * self.weights[:, 1]


@struct.dataclass
class Batch:
    """Encoded prompts `[B, …]` and each one's teacher `[B]`; a stream's are what its world embeds on the devices.

    `mix`: several teachers a prompt, of which `route` is then the chief one. `offline`: captioned latents beside them,
    as `worlds.world.CaptionedLatents` makes them; their number is their own. `coordinates [B, K]`: of the skills of a
    student that has a dial for each.
    """

    conditioning: Any  # Conditioning, once embedded
    route: Any
    mix: Mix | None = None
    offline: Any = None
    coordinates: Any = None

    @property
    def student(self) -> Any:
        """The conditioning of the student, who alone sees coordinates."""
        if self.coordinates is None:
            return self.conditioning
        return dataclasses.replace(self.conditioning, coordinates=self.coordinates)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One row of a batch, on the host: what rewards and advantages need of its prompt.

    `id`: of the prompt, by its place among the training prompts of all the stream's tasks, in their order; equal texts
    at two places have two. `group`: rows that advantages compare, by the number of their draw in the batch.
    """

    task: str
    prompt: str
    metadata: Metadata
    id: int
    group: int


class PromptStream:
    """Training prompts as a function of the step alone: tasks by weight, prompts by epochs, teachers by task.

    Counts of the tasks follow their weights of the time at every step (`tasks.sampling.Curriculum`), no prompt of a
    task comes twice within an epoch (`sampling.Walk`), and the draws of a step are shuffled over its rows.
    `rows`: those of each batch that this process encodes (all by default), see `distributed.rows_of`. `mixes`: several
    teachers a prompt, of which the chief one is then its route; or `dials`: coordinates, which say them. `read(task,
    prompt)`: what the network reads in a training prompt's place, and routes go by. Images of a draw share all of it.
    `placement`: which devices the draws of a step are dealt to, see there. `alternate`: whole steps of one task, by
    turns of so many; 0: tasks share each.

    Raises:
      ValueError: an unknown task, a task without a teacher, no weight, or a batch that the group size does not divide.
    """

    def __init__(
        self,
        world: World,
        tasks: Mapping[str, RoutedTask] | Mapping[str, RewardedTask],
        routes: Routes,
        *,
        batch_size: int,
        images_per_prompt: int,
        seed: int,
        rows: Int[np.ndarray, " n"] | None = None,
        mixes: Mixes | None = None,
        read: Callable[[str, str], str] | None = None,
        dials: Dials | None = None,
        placement: Placement | None = None,
        alternate: int = 0,
    ) -> None:
        self.tasks = select_tasks(world, tuple(tasks))
        for task in self.tasks.values():
            routes([task.name] * len(task.train), task.train)
        if batch_size % images_per_prompt:
            raise ValueError(
                f"images_per_prompt: found {images_per_prompt}, expected a divisor of batch_size {batch_size}"
            )
        self.encode, self.routes, self.mixes, self.seed = world.encode, routes, mixes, seed
        self.dials, self.placement = dials, placement
        self.count, self.repeats = batch_size // images_per_prompt, images_per_prompt
        self.rows = np.arange(batch_size) if rows is None else rows
        self._mine, self._repeat = np.unique(self.rows // images_per_prompt, return_inverse=True)
        self._all, sizes = tuple(self.tasks.values()), [len(task.train) for task in self.tasks.values()]
        self._curriculum = Curriculum.of([tasks[name] for name in self.tasks], alternate)
        self._walks = [Walk(seed, task.name, size) for task, size in zip(self._all, sizes, strict=True)]
        self._read = [task.train if read is None else _each(read, task) for task in self._all]
        self._beside = [task.beside("train") for task in self._all]
        self._first = np.cumsum([0, *sizes[:-1]])

    def _places(self, step: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Of one step's whole batch each draw's task, by number, and its prompt's place in the task."""
        before, after = (self._curriculum.counts(number, self.count) for number in (step, step + 1))
        tasks = np.repeat(np.arange(len(self._all)), after - before)
        places = [walk(*ends) for walk, *ends in zip(self._walks, before.tolist(), after.tolist(), strict=True)]
        rng = np.random.default_rng((self.seed, step))
        order = rng.permutation(self.count)
        if self.placement is not None:
            order = order[self.placement(tasks[order], rng)]
        return tasks[order], np.concatenate(places)[order]

    def draw(self, step: int) -> tuple[list[str], list[str]]:
        """The tasks and prompts of one step's whole batch, as they are read, before prompts are repeated."""
        tasks, places = (each.tolist() for each in self._places(step))
        prompts = [self._read[task][place] for task, place in zip(tasks, places, strict=True)]
        return [self._all[task].name for task in tasks], prompts

    def ids(self, step: int) -> Int[np.ndarray, " b"]:
        """The prompt's id of each row of one step's whole batch, see `Drawn`."""
        tasks, places = self._places(step)
        return np.repeat((self._first[tasks] + places).astype(np.int32), self.repeats)

    def drawn(self, step: int, *, merge_equal_prompts: bool = False) -> list[Drawn]:
        """All rows of one step's whole batch, prompts as rewards know them; nothing of it is put on devices.

        A draw is a group; where an epoch ends within a batch a prompt may be two of them. With `merge_equal_prompts`
        rows of a task with equal texts are one, as in programs that know prompts by their text.
        """
        groups: dict[tuple[int, str], int] = {}
        found = []
        for number, (k, place) in enumerate(zip(*(each.tolist() for each in self._places(step)), strict=True)):
            task = self._all[k]
            prompt = task.train[place]
            group = groups.setdefault((k, prompt), number) if merge_equal_prompts else number
            row = Drawn(task.name, prompt, self._beside[k][place], int(self._first[k]) + place, group)
            found += [row] * self.repeats
        return found

    def upto(self, steps: int) -> Iterator[str]:
        """The distinct prompts of the first `steps` batches, no more: in the order in which they first come, or if that
        takes too many draws to see, the last of them by task.
        """
        counts = self._curriculum.counts(steps, self.count).tolist()
        asked = (
            read[place]
            for read, walk, count in zip(self._read, self._walks, counts, strict=True)
            for place in walk(0, min(count, len(read))).tolist()
        )
        return foresee(lambda step: self.draw(step)[1], steps, asked, MOST_ORDERED)

    def describe(self, step: int, rows: Sequence[int]) -> list[str]:
        """Task and prompt of some rows of one step's whole batch."""
        tasks, prompts = self.draw(step)
        return [f"{tasks[row // self.repeats]}: {prompts[row // self.repeats]!r}" for row in rows]

    def batch(self, step: int) -> Batch:
        """This process's rows of one step's batch."""
        tasks, prompts = ([drawn[i] for i in self._mine] for drawn in self.draw(step))
        coordinates, mix = (None, None) if self.dials is None else self.dials(step, self._mine, tasks)
        if self.mixes is None:
            route = self.routes(tasks, prompts)
        else:
            mix = self.mixes(tasks, prompts)
            route = mix.bank[:, 0]
        batch = Batch(self.encode(prompts), route, mix, coordinates=coordinates)
        return jax.tree.map(lambda leaf: leaf[self._repeat], batch)


def _each(read: Callable[[str, str], str], task: Task) -> tuple[str, ...]:
    return tuple(read(task.name, prompt) for prompt in task.train)
