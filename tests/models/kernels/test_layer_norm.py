"""LayerNorm and modulation as one kernel against the plain form, forward and gradients, by XLA on the CPU.

Tolerances on ‖a - b‖/‖b‖ against the plain form in float32. Float32: 2e-6, sums over 1536 values in another order.
bfloat16: 1.5·2⁻⁹; every result is rounded once, which is at most 2⁻⁹ of each value.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.models.kernels.layer_norm import norm_modulate, token_block
from fopd_jax.models.norms import layer_norm, modulate
from tests.models.kernels.interpretation import errors, outcome

FLOAT32, BFLOAT16 = 2e-6, 1.5 * 2**-9


def plain(x: Any, pairs: Any) -> Any:
    normed = layer_norm(x, x.dtype)
    return x, tuple(modulate(normed, *pair) for pair in pairs)


def inputs(tokens: int, width: int, pairs: int, dtype: Any, mean: float = 0.0, batch: int = 2) -> Any:
    """x, modulations, and cotangents of x passed through and of each result."""
    rng = np.random.default_rng(tokens)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    x = (mean + 3 * draw(batch, tokens, width)).astype(dtype)
    modulations = tuple((draw(batch, width), draw(batch, width)) for _ in range(pairs))
    return x, modulations, (draw(batch, tokens, width), tuple(draw(batch, tokens, width) for _ in range(pairs)))


def test_a_large_mean_costs_no_digits():
    """Float32 holds 300 to 2⁻¹⁵, so that a one-pass variance E[x²] - E[x]² would be off by a hundredth."""
    x = (300 + inputs(40, 256, 1, jnp.float32)[0]).astype(jnp.float32)
    nothing = jnp.zeros((2, 256))
    _, (found,) = norm_modulate(x, [(nothing, nothing)])
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    assert errors(found, expected)[""] <= 2e-5


def test_frozen_modulations_have_no_sums():
    """Where nobody asks for gradients of shift and scale, the backward computes none."""
    x, pairs, cotangents = inputs(40, 128, 2, jnp.bfloat16)

    def sums(function: Any, *arguments: Any) -> int:
        return jax.jit(function).lower(*arguments).as_text().count("tensor<2x1x128xf32>")

    assert sums(lambda x: jax.vjp(lambda x: norm_modulate(x, pairs), x)[1](cotangents), x) == 0
    assert sums(lambda x, pairs: jax.vjp(norm_modulate, x, pairs)[1](cotangents), x, pairs) > 0


@pytest.mark.parametrize(
    ("tokens", "expected"), [(36, 36), (205, 205), (256, 256), (1000, 256), (1024, 256), (300, 160)]
)
def test_blocks_are_equal_and_of_whole_tiles(tokens: int, expected: int):
    assert token_block(tokens, 1536 * 2) == expected


@pytest.mark.parametrize(
    ("tokens", "width", "pairs"),
    [(36, 128, 1), (205, 256, 2), (600, 1536, 2), (300, 2432, 1)],
    ids=["miniature", "text", "blocks with a rest", "large"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_kernel_equals_the_plain_form(tokens: int, width: int, pairs: int, dtype: Any):
    given = inputs(tokens, width, pairs, dtype)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), given)
    found = jax.jit(functools.partial(outcome, norm_modulate))(*given)
    expected = jax.jit(functools.partial(outcome, plain))(*exact)
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == dtype, found))
    worst = errors(found, expected)
    assert max(worst.values()) <= (FLOAT32 if dtype == jnp.float32 else BFLOAT16), worst
