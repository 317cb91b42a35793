"""Which teachers each prompt is taught by, where its task alone does not say it.

A `Mix` lists a prompt's teachers by their weight, the chief one first: it is the one that metrics count the prompt
under. Everything here is a function of a prompt, its task and the settings, whatever the batch, step or process.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from fopd_jax.tasks.classifier import PromptClassifier
from fopd_jax.tasks.sampling import chance
from fopd_jax.worlds.prompt_stream import Mix

Weights = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Mistakes:
    """Of all prompts the `share` that are taken for another task's among `teachers`, to study what that does.

    Whether, and for which, is drawn by (seed, prompt): the same at every step.
    """

    teachers: tuple[str, ...]
    share: float = 0.0
    seed: int = 0

    def of(self, task: str, prompt: str) -> str:
        """What a task is taken for at a prompt; one without a teacher stays."""
        if not self.share or task not in self.teachers or chance(self.seed, "wrong route", prompt) >= self.share:
            return task
        others = [name for name in self.teachers if name != task]
        return others[int(chance(self.seed, "which route", prompt) * len(others))]

    def __call__(self, tasks: Sequence[str], prompts: Sequence[str]) -> list[str]:
        """Of several."""
        return [self.of(*pair) for pair in zip(tasks, prompts, strict=True)]


NONE = Mistakes(())


@dataclasses.dataclass(frozen=True)
class TaskMixes:
    """By task: `weights` of its prompts' teachers at the image and at pure noise, each in proportion.

    `teachers`: the bank's entries that are routed to, in its order. A task that names no weights has its own teacher.
    Of equal weights the task's own teacher counts as the larger one.

    Raises:
      ValueError: a weight is of a teacher that is not there; names the field and the teachers there are.
    """

    teachers: tuple[str, ...]
    weights: Mapping[str, tuple[Weights, Weights]]
    mistakes: Mistakes = NONE

    def __post_init__(self) -> None:
        for task, ends in self.weights.items():
            for field, named in zip(("mix", "noisy_mix"), ends, strict=True):
                if unknown := sorted(named.keys() - set(self.teachers)):
                    raise ValueError(f"tasks.{task}.{field}: found {unknown}, expected some of {self.teachers}")

    @property
    def asked(self) -> int:
        """Of how many teachers a prompt is asked about: as many as any task has."""
        return max(len({name for end in ends for name, weight in end.items() if weight}) for ends in self._named())

    def __call__(self, tasks: Sequence[str], prompts: Sequence[str]) -> Mix:
        """The teachers of each prompt, and their weights at both ends."""
        found = {task: self._row(task, ends) for task, ends in zip(self.weights, self._named(), strict=True)}
        rows = [found[task] for task in self.mistakes(tasks, prompts)]
        return Mix(np.stack([bank for bank, _ in rows]), np.stack([weights for _, weights in rows]))

    def _named(self) -> list[tuple[Weights, Weights]]:
        own = {task: clean or {task: 1.0} for task, (clean, _) in self.weights.items()}
        return [(own[task], noisy or own[task]) for task, (_, noisy) in self.weights.items()]

    def _row(self, task: str, ends: tuple[Weights, Weights]) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, "2 m"]]:
        table = np.asarray([[end.get(name, 0.0) for name in self.teachers] for end in ends])
        table = table / table.sum(1, keepdims=True)
        own = np.asarray([name == task for name in self.teachers])
        order = np.lexsort((~own, -table.sum(0)))[: self.asked]
        return order.astype(np.int32), table[:, order].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ClassifiedMixes:
    """By prompt: what a classifier finds likely, whatever the prompt's task; its classes are the bank's first entries.

    `top`: of the likeliest so many teachers alone, their weights in proportion; 0: all. A mistaken prompt's likeliest
    teacher and another one change places. Weights are the same at all noise levels.
    """

    classifier: PromptClassifier
    temperature: float = 1.0
    top: int = 0
    mistakes: Mistakes = NONE

    @property
    def asked(self) -> int:
        """Of how many teachers a prompt is asked about."""
        count = len(self.classifier.classes)
        return min(self.top, count) or count

    def __call__(self, tasks: Sequence[str], prompts: Sequence[str]) -> Mix:
        """The teachers of each prompt, and their weights, twice."""
        found, names = self.classifier.probabilities(prompts, self.temperature), self.classifier.classes
        for row, prompt in zip(found, prompts, strict=True):
            chief = int(row.argmax())
            other = names.index(self.mistakes.of(names[chief], prompt))
            row[[chief, other]] = row[[other, chief]]
        order = np.argsort(-found, axis=1, kind="stable")[:, : self.asked]
        weights = np.take_along_axis(found, order, axis=1)
        weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        return Mix(order.astype(np.int32), np.stack([weights, weights], axis=1))
