"""How sure the numbers of an evaluation are: intervals, and p-values of paired differences, by resampling prompts.

Images of one prompt are no independent samples, so whole prompts are drawn, each with all of its images. How many
prompts a suite has of each kind is part of its design and is kept: prompts are drawn within their stratum. All draws
are functions of a fixed seed and of the strata's sizes, so that equal scores have equal intervals.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int8, UInt8

CONFIDENCE, RESAMPLES, SEED = 0.95, 10_000, 0
EXACT = 12
"""Up to so many prompts that differ all patterns of signs are tried, 4,096 at most; beyond, `RESAMPLES` random ones."""
_CHUNK = 100
_PRODUCTS = 400_000
"""Of numbers at once, so few that they stay in the cache and that BLAS starts no threads: on a machine whose cores are
taken those wait for one another, which takes twenty times as long.
"""
_ROUNDING = 1e-9  # by the sum of all sizes: differences that are equal but for rounding are equal


@dataclasses.dataclass(frozen=True)
class Sums:
    """A number made of prompts' values: Σ_t `weights[t]` · Σ_p `sums[p, t]` / Σ_p `counts[p, t]`.

    A term t is one mean: of all images, of those of a tag, of a suite. A prompt's row is 0 in the terms that it takes
    no part in; each prompt counts somewhere. `strata`: numbers from 0; prompts of one are drawn among themselves.
    """

    sums: Float[np.ndarray, "p t"]
    counts: Float[np.ndarray, "p t"]
    weights: Float[np.ndarray, " t"]
    strata: Int[np.ndarray, " p"]


class Interval(NamedTuple):
    """A number and where it lies with 95% confidence; None where that cannot be told."""

    value: float
    low: float | None
    high: float | None


def estimate(of: Sums) -> float:
    """The number; NaN where a term has no value at all."""
    return float(_combine(of.sums.sum(0)[None], of.counts.sum(0)[None], of.weights)[0])


def interval(of: Sums, confidence: float = CONFIDENCE) -> Interval:
    """Percentiles of the number over resampled prompts (Efron & Tibshirani 1993, section 13.3).

    There is no interval where a stratum has one prompt alone. Of prompts that are all equal it is a point, which says
    nothing of what was not seen.
    """
    value, sizes = estimate(of), np.bincount(of.strata)
    if np.isnan(value) or sizes.min() < 2:
        return Interval(value, None, None)
    both, terms = np.concatenate([of.sums, of.counts], axis=1), len(of.weights)
    drawn = np.zeros((RESAMPLES, 2 * terms))
    for stratum, size in enumerate(sizes):
        drawn += _times(_drawn(int(size), stratum), both[of.strata == stratum])
    values = _combine(drawn[:, :terms], drawn[:, terms:], of.weights)
    outside = (1 - confidence) / 2
    low, high = np.quantile(values[np.isfinite(values)], [outside, 1 - outside])  # a term may have drawn no value
    return Interval(value, float(low), float(high))


def p_value(differences: Sums) -> float:
    """Two-sided, of the hypothesis that two models do not differ; `differences` are of images that both have.

    A randomisation test: if it does not matter which of the two drew a prompt's images, the sign of all of that
    prompt's differences is a coin's. p is the share of patterns of signs whose difference is at least as large in size
    as the one seen: of all patterns up to `EXACT` prompts that differ, beyond that of random ones, the one seen being
    counted among them, (1 + k) / (1 + `RESAMPLES`), so that it is never 0 (Phipson & Smyth 2010). NaN where a term has
    no value.
    """
    counts = differences.counts.sum(0)
    if (counts == 0).any():
        return float("nan")
    shares = (differences.sums * (differences.weights / counts)[None]).sum(1)
    size = np.abs(shares).sum()
    shares = shares[np.abs(shares) > _ROUNDING * size]
    if len(shares) == 0:
        return 1.0
    least = abs(shares.sum()) - _ROUNDING * size
    if len(shares) <= EXACT:
        return float((np.abs(_patterns(len(shares)) @ shares) >= least).mean())
    hits = int((np.abs(_times(_signs(len(shares)), shares[:, None])[:, 0]) >= least).sum())
    return (1 + hits) / (1 + RESAMPLES)


def holm(p: Sequence[float]) -> list[float]:
    """The p-values of a family, corrected for their number (Holm 1979), in the given order.

    Those that stay below α are all true but with a probability of α, however they depend on one another.
    """
    corrected, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = largest
    return corrected


def _combine(
    sums: Float[np.ndarray, "r t"], counts: Float[np.ndarray, "r t"], weights: Float[np.ndarray, " t"]
) -> Float[np.ndarray, " r"]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (sums / counts) @ weights


def _times(drawn: UInt8[np.ndarray, "r p"] | Int8[np.ndarray, "r p"], rows: Float[np.ndarray, "p k"]) -> np.ndarray:
    """Their product `[r, k]`, part by part."""
    step = max(1, _PRODUCTS // max(1, rows.size))
    parts = range(0, len(drawn), step)
    return np.concatenate([drawn[start : start + step].astype(np.float64) @ rows for start in parts])


@functools.lru_cache(maxsize=32)
def _drawn(size: int, stratum: int) -> UInt8[np.ndarray, "r p"]:
    """How often each of so many prompts is drawn, that many being drawn with replacement."""
    rng, first = np.random.default_rng((SEED, stratum, size)), np.arange(_CHUNK)[:, None] * size
    return np.concatenate([
        np.bincount((rng.integers(size, size=(_CHUNK, size)) + first).ravel(), minlength=_CHUNK * size)
        .reshape(_CHUNK, size)
        .astype(np.uint8)  # one prompt more than 255 times is never drawn
        for _ in range(RESAMPLES // _CHUNK)
    ])  # fmt: skip


def _signs(size: int) -> Int8[np.ndarray, "r p"]:
    """Of so many prompts; the first of those of a power of two, which few sizes share a draw of."""
    return _all_signs(1 << (size - 1).bit_length())[:, :size]


@functools.lru_cache(maxsize=8)
def _all_signs(size: int) -> Int8[np.ndarray, "r p"]:
    rng = np.random.default_rng((SEED, size))
    return 2 * rng.integers(2, size=(RESAMPLES, size), dtype=np.int8) - 1


def _patterns(size: int) -> Float[np.ndarray, "r p"]:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=size)))
