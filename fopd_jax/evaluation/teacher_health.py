"""Which teacher is not worth following: what a survey of fixed states says of each, against bands.

A teacher is the base and an update, and a damaged one gives itself away by what its update does. Of teacher k, whose
velocities at fixed states are v_k, the base's under the same guidance v_b, the update d_k = v_k - v_b:

  size     ‖d_k‖ / ‖v_b‖: how far it goes from the base
  anchor   ‖v_k - v_a‖ / ‖v_b‖: its disagreement with the anchor, where there is one
  apart    1 - the largest cos(d_k, d_j) of all others j: whether it goes where nobody else does
  spread   ‖v_k(x + δε) - v_k(x)‖ / ‖v_b(x + δε) - v_b(x)‖: how much a small perturbation of the state moves it

All norms are root mean squares over states and dimensions. No published work measures any of them on teachers. The
default bands leave the miniature's three teachers alone with a margin of at least a third of each limit; noise of 4
times its factors' size (tools/noisy_adapter.py), which takes all that a teacher learned, takes it out of `apart`, 5 out
of `size` and `anchor`, 8 out of `spread`. Of teachers that have nothing in common none is near another: other networks
need bands of their own, for which the statistics are logged.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from fopd_jax.evaluation.fixed_states import Survey

Band = tuple[float, float]
BASE = "base"


def statistics(
    seen: Survey, counted: Bool[np.ndarray, "l b"], anchor: int | None
) -> dict[str, Float[np.ndarray, " v"]]:
    """By name one value a voice, NaN where it cannot be taken.

    `counted`: which states there are; `anchor`: the anchor's voice.
    """
    at = counted[..., None]
    voices = seen.base.shape[-1]
    updates = np.einsum("l b i j, l b -> i j", seen.updates, counted.astype(np.float64))
    length = np.sqrt(np.diag(updates))
    base = (seen.base * at).sum((0, 1))
    with np.errstate(divide="ignore", invalid="ignore"):  # an update of nothing has no direction
        cosines = updates / np.outer(length, length)
        found = {
            "size": length / np.sqrt(base),
            "spread": np.sqrt((seen.moved * at).sum((0, 1)) / (seen.base_moved * at).sum((0, 1))),
        }
    if voices > 1:
        apart = np.where(np.eye(voices, dtype=bool) | ~np.isfinite(cosines), np.inf, 1 - cosines).min(1)
        found["apart"] = np.where(np.isfinite(apart), apart, np.nan)
    if anchor is not None:
        found["anchor"] = np.sqrt((seen.between[..., anchor] * at).sum((0, 1)) / base)
        found["anchor"][anchor] = np.nan
    return found


def outside(found: Mapping[str, float], bands: Mapping[str, Band]) -> dict[str, str]:
    """What leaves its band, in words, by statistic."""
    return {
        name: f"{name} {value:.2f}, expected {low:g} to {high:g}"
        for name, (low, high) in bands.items()
        if (value := found.get(name, np.nan)) == value and not low <= value <= high
    }


def matrix(seen: Survey, counted: Bool[np.ndarray, "l b"]) -> Float[np.ndarray, "n n"]:
    """Mean squares between every two voices, and in the last row and column to the base under their own guidance."""
    weights = counted / counted.sum()
    between = np.einsum("l b i j, l b -> i j", seen.between, weights)
    to_base = np.einsum("l b i i, l b -> i", seen.updates, weights)
    return np.block([[between, to_base[:, None]], [to_base[None], np.zeros((1, 1))]])


def disagreement(seen: Survey, counted: Bool[np.ndarray, "l b"], names: Sequence[str]) -> dict[str, float]:
    """`disagreement/A/B`: the same by name, each two once, the base last."""
    found, everybody = matrix(seen, counted), (*names, BASE)
    return {
        f"disagreement/{a}/{b}": float(found[i, j])
        for i, a in enumerate(everybody)
        for j, b in enumerate(everybody)
        if i < j
    }
