"""Several products with low-rank updates as one kernel against plain products, forward and gradients, on the CPU.

Tolerances on ‖a - b‖/‖b‖ against float32: 1e-5 in float32 (sums in another order). bfloat16: 2⁻⁷, since h and dh are
rounded once more on the way, and what reads them has gradients of its own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.models.kernels.adapted import adapted_products
from tests.models.kernels.interpretation import errors, outcome

FLOAT32, BFLOAT16 = 1e-5, 2**-7
RANKS = (4, 8, 4)


def plain(x: Any, kernels: Any, biases: Any, factors: Any) -> Any:
    spell = "BTI,IO->BTO" if factors[0][0].ndim == 2 else "BTI,BIO->BTO"
    return [
        x @ w + bias[None, None] + jnp.einsum(spell, jnp.einsum(spell, x, a), b)
        for w, bias, (a, b) in zip(kernels, biases, factors, strict=True)
    ]


def ours(x: Any, kernels: Any, biases: Any, factors: Any) -> Any:
    a, b = zip(*(pair if pair[0].ndim == 3 else (pair[0][None], pair[1][None]) for pair in factors), strict=True)
    return list(adapted_products(x, kernels, biases, jnp.concatenate(a, axis=-1), b))


def inputs(tokens: int, width: int, widths: tuple[int, ...], each: bool, dtype: Any) -> Any:
    """x, matrices, biases and factors, of all samples or of each, and a cotangent of every result."""
    rng, batch = np.random.default_rng(tokens), 3

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    lead = (batch,) if each else ()
    factors = [
        (draw(*lead, width, r, scale=width**-0.5), draw(*lead, r, out)) for r, out in zip(RANKS, widths, strict=False)
    ]
    kernels = tuple(draw(width, out, scale=width**-0.5) for out in widths)
    arguments = (draw(batch, tokens, width), kernels, tuple(map(draw, widths)), factors)
    return *arguments, [draw(batch, tokens, out) for out in widths]


@pytest.mark.parametrize("each", [False, True], ids=["one for all", "each its own"])
@pytest.mark.parametrize(
    ("tokens", "widths"), [(37, (128, 128, 128)), (300, (256,))], ids=["three of text", "one with a rest"]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_kernel_equals_plain_products(tokens: int, widths: tuple[int, ...], each: bool, dtype: Any):
    given = inputs(tokens, 128, widths, each, dtype)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), given)
    found, expected = (
        jax.jit(functools.partial(outcome, ours))(*given),
        jax.jit(functools.partial(outcome, plain))(*exact),
    )
    worst = errors(found, expected)
    assert max(worst.values()) <= (FLOAT32 if dtype == jnp.float32 else BFLOAT16), worst
