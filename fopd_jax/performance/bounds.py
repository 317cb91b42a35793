"""How fast a program could be on a TPU at the very best, as utilisation (MFU) of a chip's nominal peak.

Two bounds, both of matrix products alone, with nothing between them and no waits:

- `width`: attention's products have heads' width H as a contraction or as columns, so that on a matrix unit of W
  columns they reach H/W of its peak at most; all others reach the peak. No program passes it.
- `compiled`: each at a rate that the TPU compiler was seen to reach by its own count: dense products of SD3.5-Medium's
  shapes, and an attention kernel on merged heads of width 64, forward and backward. A better kernel can pass it, and
  `models.kernels.merged_attention` is one by its schedule; it says what such programs may come to.
"""

import dataclasses

from fopd_jax.performance.flops import Update

FLOPS_PER_CYCLE = {"v5e": 131072, "v5p": 262144, "v6e": 524288}
"""Nominal, of a chip with all its cores, in bfloat16: the datasheet's peak at 1.5 (v5e) and 1.75 GHz."""
UNIT = {"v5e": 128, "v5p": 128, "v6e": 256}
"""Columns of a matrix unit."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """Shares of nominal peak: of dense products, of attention forward and backward."""

    dense: float
    forward: float
    backward: float


# libtpu 0.0.42.1. Attention: 8 rows, 24 heads, 1024 + 205 tokens in 854 / 690 / 1343 thousand cycles (v6e / v5p / v5e)
# forward, 1893 / 1653 / 3179 backward, where its gradient counts twice the forward's products.
COMPILED = {"v5e": Rates(0.975, 0.42, 0.356), "v5p": Rates(0.955, 0.41, 0.343), "v6e": Rates(0.89, 0.166, 0.15)}
HEADS = 64
"""The width of heads that these rates are of."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """`share` of a forward's FLOPs that are attention's, with heads of `width`."""

    share: float
    width: int


def bounds(flops: Update, attention: Attention | None, chip: str) -> dict[str, float | None]:
    """The most that a program of these FLOPs can reach; None where nothing is known of its attention."""
    if attention is None:
        return {"width": None, "compiled": None}
    unit = min(1.0, attention.width / UNIT[chip])
    compiled = _reached(flops, attention.share, COMPILED[chip]) if attention.width == HEADS else None
    return {"width": _reached(flops, attention.share, Rates(1.0, unit, unit)), "compiled": compiled}


def _reached(flops: Update, share: float, rates: Rates) -> float:
    """Useful FLOPs over those that the peak would do in the time. An attention's gradient has twice its products."""
    forwards = share * (flops.teachers + flops.rollout + flops.forward)
    backward = 2 * share * flops.forward if flops.backward else 0.0
    dense = flops.model - forwards - backward
    return flops.model / (dense / rates.dense + forwards / rates.forward + backward / rates.backward)
