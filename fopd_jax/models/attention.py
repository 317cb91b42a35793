"""Scaled dot-product attention with a named implementation."""

from typing import Literal, get_args

import jax
from jaxtyping import Array, Float

AttentionImpl = Literal["xla", "cudnn"]


def check_attention_impl(impl: str) -> None:
    """Refuse an implementation that does not exist or cannot run on the default backend.

    Raises:
      ValueError: `impl` is unknown, or is `cudnn` where the default backend is no GPU. There is no silent fallback.
    """
    if impl not in get_args(AttentionImpl):
        raise ValueError(f"attention: found {impl!r}, expected one of {get_args(AttentionImpl)}")
    if impl == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(f"attention: 'cudnn' needs a GPU, but the backend is {jax.default_backend()!r}; use 'xla'")


def attention(
    q: Float[Array, "b t n h"], k: Float[Array, "b s n h"], v: Float[Array, "b s n h"], impl: AttentionImpl
) -> Float[Array, "b t n h"]:
    """softmax(q·kᵀ/√h)·v over all positions, softmax in float32. SD3 masks nothing: padded text is attended."""
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes bfloat16 and float32 inside
        return jax.nn.dot_product_attention(q, k, v, implementation=impl)
