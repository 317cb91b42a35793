"""Several rewards into one number a sample: their weighted sum, or advantages within the groups of one prompt.

What failed takes no part: not in a mean, not in a deviation, not in the update. Flow-GRPO (2505.05470) compares the
weighted sum of the rewards, GDPO (2601.05242) each reward by itself, so that one of small spread is still heard.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from fopd_jax.rewards.reward import Metadata, Scores

Normalise = Literal["global", "group", "each"]
"""By what the distance to the group's mean is divided: 'global' is the deviation over the batch (Flow-GRPO), 'group'
the group's own; 'each' divides every reward by its own in the group, sums, and divides by the batch's (GDPO).

A batch of several tasks has one deviation for all samples that the same rewards score with the same weights. Flow-GRPO
knows one task; the released multi-task code takes the tasks by turns, so that its batches are of one. Over samples of
different rewards the deviation would be the distance between their levels: of PickScore, about 22, beside GenEval, from
0 to 1, both tasks' advantages come out tens of times too small.
"""
EPSILON = 1e-4  # beside a deviation, as Flow-GRPO has it
FEWEST = 2
"""Valid samples that a group needs: one alone is its own mean."""


@dataclasses.dataclass(frozen=True)
class Advantages:
    """`values[i]` counts only where `valid[i]` and is 0 elsewhere; it is never NaN.

    `flat`: valid samples whose group is all equal, so that their value is 0 and teaches nothing; they keep their place.
    `dropped`: groups with fewer than `FEWEST` valid samples. `flat_share`: of the groups that are left.
    """

    values: Float[np.ndarray, " n"]
    valid: Bool[np.ndarray, " n"]
    flat: Bool[np.ndarray, " n"]
    dropped: int
    flat_share: float


def group_keys(*parts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """One number a sample for what `parts` say together, such as prompt id and slot: 0 … groups - 1."""
    return np.unique(np.stack(parts, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def merge_equal_prompts(prompts: Sequence[str]) -> Int[np.ndarray, " n"]:
    """The same by the prompt's text, as Flow-GRPO has it: whoever draws a prompt twice gets one larger group."""
    return np.unique(np.array(prompts, dtype=object), return_inverse=True)[1].reshape(-1)


def combine(
    scores: Mapping[str, Scores],
    weights: Mapping[str, float | Float[np.ndarray, " n"]],
    groups: Int[np.ndarray, " n"],
    normalise: Normalise = "global",
    clip: float = 5.0,
) -> Advantages:
    """Advantages of samples, limited to ±`clip`. `weights`: of each reward, or of each reward for each sample.

    A sample is valid if no reward that it needs, one whose weight is not 0, has failed, and its group has two such.

    Raises:
      ValueError: a weighted reward has no scores, numbers of samples differ, a weight is not finite, or all are 0.
    """
    weighed = _weigh(scores, weights, len(groups))
    index = np.unique(groups, return_inverse=True)[1].reshape(-1)
    usable = np.ones(len(groups), bool)
    for name, weight in weighed.items():
        usable &= ~scores[name].failed | (weight == 0)
    counts = np.bincount(index, usable)
    valid = usable & (counts >= FEWEST)[index]
    terms = [(np.where(valid & (w != 0), scores[name].values, 0.0), w) for name, w in weighed.items()]
    values = _each(terms, valid, index) if normalise == "each" else _sum(terms, valid, index, normalise)
    lively = np.bincount(index, values != 0) > 0
    kept = counts >= FEWEST
    return Advantages(
        values=np.clip(values, -clip, clip),
        valid=valid,
        flat=valid & ~lively[index],
        dropped=int((~kept).sum()),
        flat_share=float((kept & ~lively).sum() / max(kept.sum(), 1)),
    )


def weighted_sum(found: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """Σ weight · value over `weights`, one reward at least; it fails where one of them does, and says which."""
    details: list[Metadata] = [{} for _ in next(iter(found.values())).values]
    for name in weights:
        for i in np.flatnonzero(found[name].failed):
            details[i] = details[i] or {"error": f"{name}: {found[name].details[i]['error']}"}
    values = np.sum([weight * found[name].values for name, weight in weights.items()], axis=0)
    return Scores(values, np.isnan(values), tuple(details))


Terms = Sequence[tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]
"""Values, 0 where they do not count, and weights of every reward."""


def _weigh(
    scores: Mapping[str, Scores], weights: Mapping[str, float | Float[np.ndarray, " n"]], count: int
) -> dict[str, Float[np.ndarray, " n"]]:
    """The weights of every sample."""
    weighed = {}
    for name, weight in weights.items():
        if name not in scores:
            raise ValueError(f"weights: found the reward {name!r}, expected some of {', '.join(scores) or 'none'}")
        if len(scores[name]) != count:
            raise ValueError(f"rewards.{name}: found {len(scores[name])} scores of {count} samples")
        weighed[name] = np.broadcast_to(np.asarray(weight, float), (count,))
        if not np.isfinite(weighed[name]).all():
            raise ValueError(f"weights.{name}: found {weight}, expected finite numbers")
    if count and not any(weight.any() for weight in weighed.values()):
        raise ValueError("weights: found none but 0, expected at least one reward that counts")
    return weighed


def _sum(
    terms: Terms, valid: Bool[np.ndarray, " n"], index: Int[np.ndarray, " n"], normalise: Normalise
) -> Float[np.ndarray, " n"]:
    """The weighted sum first, then the comparison."""
    total = sum((weight * values for values, weight in terms), np.zeros(len(index)))
    distance = _distance(total, valid, index)
    if normalise == "group":
        return distance / (_deviation(distance, valid, index)[index] + EPSILON)
    weights = np.stack([weight for _, weight in terms], axis=1)
    kinds = np.unique(weights, axis=0, return_inverse=True)[1].reshape(-1)
    spreads = np.array([_spread(total[valid & (kinds == kind)]) for kind in range(kinds.max(initial=-1) + 1)])
    return distance / (spreads[kinds] + EPSILON)


def _each(terms: Terms, valid: Bool[np.ndarray, " n"], index: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Each reward's comparison first, then the weighted sum."""
    total = np.zeros(len(index))
    for values, weight in terms:
        counted = valid & (weight != 0)
        distance = _distance(values, counted, index)
        total += weight * distance / (_deviation(distance, counted, index)[index] + EPSILON)
    return total / (_spread(total[valid]) + EPSILON)


def _distance(
    values: Float[np.ndarray, " n"], counted: Bool[np.ndarray, " n"], index: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """To the mean of the group's counted samples; exactly 0 where they are equal, and of what does not count."""
    size = index.max(initial=-1) + 1
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, index[counted], values[counted])
    np.maximum.at(high, index[counted], values[counted])
    sums = np.bincount(index, np.where(counted, values, 0.0))
    means = sums / np.maximum(np.bincount(index, counted), 1)
    return np.where(counted & (low < high)[index], values - means[index], 0.0)


def _deviation(
    distance: Float[np.ndarray, " n"], counted: Bool[np.ndarray, " n"], index: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " groups"]:
    """Standard deviation of each group's counted samples."""
    return np.sqrt(np.bincount(index, distance**2) / np.maximum(np.bincount(index, counted), 1))


def _spread(values: Float[np.ndarray, " k"]) -> float:
    return float(values.std()) if len(values) else 0.0
