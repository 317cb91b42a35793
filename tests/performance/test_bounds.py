"""Bounds of utilisation, against what was worked out by hand for a forward of SD3.5-Medium, and in limits."""

import dataclasses

import pytest

from fopd_jax.backbones.record import Tokens
from fopd_jax.backbones.sd3.flops import pass_flops
from fopd_jax.models.mmdit import PRESETS
from fopd_jax.performance.bounds import COMPILED, UNIT, Attention, bounds
from fopd_jax.performance.flops import NOTHING

CHIPS = ("v6e", "v5p", "v5e")


@pytest.mark.parametrize(("chip", "width", "compiled"), [("v6e", 0.71, 0.56), ("v5p", 0.88, 0.81), ("v5e", 0.88, 0.83)])
def test_a_forward_of_sd35_medium(chip: str, width: float, compiled: float):
    """By hand, in whole percents: heads of 64 on units of 256 and 128 columns; attention's kernels by their cycles."""
    network = PRESETS["sd35_medium"]
    cost = pass_flops(network, Tokens(1024, 205), None, "none")
    found = bounds(
        dataclasses.replace(NOTHING, forward=cost.forward), Attention(cost.attention / cost.forward, 64), chip
    )
    assert found == pytest.approx({"width": width, "compiled": compiled}, abs=0.01)


@pytest.mark.parametrize("chip", CHIPS)
def test_limits(chip: str):
    """Without attention products reach the peak, or their best rate; of attention alone its own."""
    flops = dataclasses.replace(NOTHING, forward=2.0, backward=4.0, teachers=1.0)
    assert bounds(flops, Attention(0.0, 64), chip) == pytest.approx({"width": 1.0, "compiled": COMPILED[chip].dense})
    alone = bounds(flops, Attention(1.0, 64), chip)
    assert alone["width"] == pytest.approx(64 / UNIT[chip])
    rates = COMPILED[chip]
    assert alone["compiled"] == pytest.approx(7 / (3 / rates.forward + 4 / rates.backward))


def test_nothing_is_said_of_what_is_not_known():
    assert bounds(NOTHING, None, "v6e") == {"width": None, "compiled": None}
    narrow = bounds(dataclasses.replace(NOTHING, forward=1.0), Attention(0.5, 32), "v6e")
    assert narrow["compiled"] is None  # kernels of other heads were not seen
    assert narrow["width"] == pytest.approx(1 / (0.5 + 0.5 * 8))
