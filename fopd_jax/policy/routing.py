"""Soft routing: which teachers' weighted sum each prompt is taught by."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from fopd_jax.worlds.prompt_stream import Mix

Weights = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class TaskMixes:
    """By task: `weights` of its prompts' teachers at the image and at pure noise, each in proportion.

    `teachers`: the bank's entries that are routed to, in its order. A task that names no weights has its own teacher.

    Raises:
      ValueError: a weight is of a teacher that is not there; names the field and the teachers there are.
    """

    teachers: tuple[str, ...]
    weights: Mapping[str, tuple[Weights, Weights]]

    def __post_init__(self) -> None:
        for task, ends in self.weights.items():
            for field, named in zip(("mix", "noisy_mix"), ends, strict=True):
                if unknown := sorted(named.keys() - set(self.teachers)):
                    raise ValueError(f"tasks.{task}.{field}: found {unknown}, expected some of {self.teachers}")

    def __call__(self, tasks: Sequence[str], prompts: Sequence[str]) -> Mix:
        """Every teacher's weight at each prompt."""
        table = {
            task: np.stack([self._row(task, clean), self._row(task, noisy or clean)])
            for task, (clean, noisy) in self.weights.items()
        }
        bank = np.broadcast_to(np.arange(len(self.teachers), dtype=np.int32), (len(tasks), len(self.teachers)))
        return Mix(bank, np.stack([table[task] for task in tasks]))

    def _row(self, task: str, named: Weights) -> Float[np.ndarray, " k"]:
        found = named or {task: 1.0}
        row = np.asarray([found.get(name, 0.0) for name in self.teachers], np.float32)
        return row / row.sum()
