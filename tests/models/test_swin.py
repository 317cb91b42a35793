"""Swin against transformers' `SwinBackbone`: true structure, small widths, maps that windows do not divide.

Tolerance on ‖a - b‖/‖b‖, float32: 2e-5. In bfloat16, ten blocks of about eight roundings in series are a random walk of
80 steps of eps/2, which 5·eps bounds.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.models.swin import Swin, relative_positions, window_mask
from tests.models.mask2former_oracle import SMALL, channels_first, normal, oracle, relative_error, variables

TOLERANCE = 2e-5


@pytest.mark.parametrize("size", [(64, 160), (224, 32)])
def test_all_maps_are_transformers(size: tuple[int, int]):
    pixels = normal(0, 2, *size, 3)
    with torch.no_grad():
        expected = oracle(SMALL).model.pixel_level_module.encoder(channels_first(pixels)).feature_maps
    found = jax.jit(Swin(SMALL.backbone).apply)(variables(SMALL, "encoder"), pixels)
    half = jax.jit(Swin(SMALL.backbone, jnp.bfloat16).apply)(variables(SMALL, "encoder"), pixels)
    for stage, (ours, coarse, theirs) in enumerate(zip(found, half, expected, strict=True)):
        assert ours.shape == (2, size[0] >> stage + 2, size[1] >> stage + 2, 24 << stage)
        assert relative_error(np.moveaxis(ours, -1, 1), theirs) <= TOLERANCE
        assert coarse.dtype == jnp.bfloat16
        assert relative_error(coarse, ours) <= 5 * jnp.finfo(jnp.bfloat16).eps


def test_positions_of_equal_offset_share_a_bias():
    table, places = relative_positions(3), list(itertools.product(range(3), repeat=2))
    rows: dict[tuple[int, int], set[int]] = {}
    for (q, (qy, qx)), (k, (ky, kx)) in itertools.product(enumerate(places), repeat=2):
        rows.setdefault((qy - ky, qx - kx), set()).add(int(table[q, k]))
    assert sorted(rows) == list(itertools.product(range(-2, 3), repeat=2))
    assert [rows[offset] for offset in sorted(rows)] == [{row} for row in range(25)]


def test_what_is_rolled_over_is_masked():
    """Two positions of a window see each other if they are as near in the map as in the window."""
    height, width, window, shift = 6, 9, 3, 1
    mask = window_mask(height, width, window, shift)
    for y, x in itertools.product(range(height // window), range(width // window)):
        places = [
            ((y * window + p + shift) % height, (x * window + q + shift) % width)
            for p, q in itertools.product(range(window), repeat=2)
        ]
        for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
            near = all(abs(s - t) < window for s, t in zip(a, b, strict=True))
            assert mask[y * (width // window) + x, i, j] == (0 if near else -100)
