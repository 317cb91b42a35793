"""What a reward is: values *or failures* for images of prompts. Every reward, wherever it runs, keeps this contract.

A failure is never a number: it is masked out of every mean and every advantage, counted, and past a stated share it
ends a run. What a value rests on (the text that was read, the objects that were found) is kept beside it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from fopd_jax.exits import spell_error

Tree = Any
Metadata = Mapping[str, Any]
"""What stands beside a prompt in its set, as JSON: GenEval's record, an OCR target; {} where there is nothing."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """`values[i]` is NaN exactly where `failed[i]`; `details[i]` is JSON: what a value rests on, or `{"error": …}`.

    Raises:
      ValueError: lengths differ, a value that has not failed is not finite, or a failure does not say why.
    """

    values: Float[np.ndarray, " n"]
    failed: Bool[np.ndarray, " n"]
    details: tuple[Metadata, ...]

    def __post_init__(self) -> None:
        if not len(self.values) == len(self.failed) == len(self.details):
            lengths = len(self.values), len(self.failed), len(self.details)
            raise ValueError(f"scores: found values, failures and details of lengths {lengths}, expected equal ones")
        if not np.array_equal(np.isfinite(self.values), ~self.failed):
            raise ValueError(f"scores: found values {self.values} of failures {self.failed}, expected NaN just there")
        if wrong := [i for i in np.flatnonzero(self.failed) if not self.details[i].get("error")]:
            raise ValueError(f"scores: the failure of image {wrong[0]} does not say its reason under 'error'")

    def __len__(self) -> int:
        return len(self.values)


def collect(results: Sequence[tuple[float, Metadata] | Exception]) -> Scores:
    """Scores of single images: a value with its details each, or what went wrong; values that are not finite fail."""
    values, details = np.full(len(results), np.nan), []
    for i, result in enumerate(results):
        if isinstance(result, Exception):
            details.append({"error": spell_error(result)})
        elif not np.isfinite(result[0]):
            details.append({**result[1], "error": f"the value is {result[0]}"})
        else:
            values[i] = result[0]
            details.append(result[1])
    return Scores(values, np.isnan(values), tuple(details))


def all_failed(count: int, reason: str) -> Scores:
    """Scores of a batch that could not be scored at all."""
    return Scores(np.full(count, np.nan), np.ones(count, bool), ({"error": reason},) * count)


Score = Callable[[UInt8[np.ndarray, "n h w 3"], Sequence[str], Sequence[Metadata]], Scores]
"""`(images, prompts, metadata of each) → scores`: RGB, uint8, lossless. It does not raise for what one image does."""
Check = Callable[[Sequence[str], Sequence[Metadata]], None]
"""Raises ValueError, naming prompt and reason, for a prompt that can never be scored: before anything is sampled."""


def _accept(prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    """Any prompt can be scored."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A reward as part of a jitted program, for stages that roll out, score and update in one.

    `prepare(prompts, metadata)`, on the host: what `score` needs of prompts, a tree of numpy arrays `[n, …]` whose
    other lengths are the same for all prompts. `score(params, images, rows)`: pure, one value an image, NaN where it
    fails; no image's value depends on the others of its batch. `params()`: arrays on this process's devices, loaded
    when they are first asked for, {} where there are none; a program over more devices has them put there
    (`distributed.spread`).
    """

    prepare: Callable[[Sequence[str], Sequence[Metadata]], Tree]
    score: Callable[[Tree, UInt8[Array, "b h w 3"], Tree], Float[Array, " b"]]
    params: Callable[[], Tree] = dict


@dataclasses.dataclass(frozen=True)
class Reward:
    """One reward, ready to score. `limits`: its range, None where it has no end; larger is better.

    `runs`: "device" on the accelerator, so that it competes with the training program, "host" on CPU cores, "remote"
    on servers; the pool runs the latter two in the background. `close` ends what it started. `traced`: the same reward
    within a program, where there is such a form.
    """

    name: str
    score: Score
    limits: tuple[float | None, float | None]
    runs: Literal["device", "host", "remote"]
    check: Check = _accept
    close: Callable[[], None] = lambda: None
    traced: Traced | None = None
