"""Means with intervals by the bootstrap over prompts: several images of one prompt are no independent samples."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES, SEED = 1000, 0
_BOUNDS = (2.5, 97.5)


class Interval(NamedTuple):
    """A mean and its 95 % interval, of so many images; an interval of one prompt alone is not known (None)."""

    mean: float
    low: float | None
    high: float | None
    images: int


def mean_interval(values: Float[np.ndarray, "prompts samples"]) -> Interval | None:
    """Of scores by prompt and sample, NaN where there is none; None: there is no score at all.

    Percentiles of the means of resampled prompts (Efron & Tibshirani 1993, chapter 13); every call resamples alike, so
    that equal scores have equal intervals.
    """
    there: Bool[np.ndarray, "prompts samples"] = ~np.isnan(values)
    sums, counts = np.where(there, values, 0.0).sum(1), there.sum(1)
    used = counts > 0
    sums, counts = sums[used], counts[used].astype(np.float64)
    if len(sums) == 0:
        return None
    total = int(counts.sum())
    mean = float(sums.sum() / total)
    if len(sums) == 1:
        return Interval(mean, None, None, total)
    weights = _weights(len(sums))
    low, high = np.percentile((weights @ sums) / (weights @ counts), _BOUNDS)
    return Interval(mean, float(low), float(high), total)


@functools.lru_cache(maxsize=4)
def _weights(prompts: int) -> Float[np.ndarray, "resamples prompts"]:
    """How often each prompt is drawn."""
    drawn = np.random.default_rng(SEED).multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    return drawn.astype(np.float64)
