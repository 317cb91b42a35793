"""LayerNorm without affine parameters and the modulation that follows it, with a named implementation.

- `xla`: plain operations, which XLA fuses as it likes. Runs everywhere, and is what the other is held to.
- `pallas`: one kernel for both, on TPUs (`kernels.layer_norm`).
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fopd_jax.models.kernels import layer_norm as kernel

NormImpl = Literal["xla", "pallas"]
AUTO = "auto"
Pair = kernel.Pair


def resolve_norms(name: str, width: int, platform: str | None = None) -> NormImpl:
    """The implementation that a config's `run.norms` names; `auto` is `pallas` where it can run, else `xla`.

    `platform`: of the devices that the program is for (default: those of the default backend).

    Raises:
      ValueError: there is no such implementation, or it cannot run there. There is no silent fallback.
    """
    if name not in (AUTO, *get_args(NormImpl)):
        raise ValueError(f"norms: found {name!r}, expected one of {(AUTO, *get_args(NormImpl))}")
    refusal = _refusal(width, platform or jax.default_backend())
    if name == "pallas" and refusal:
        raise ValueError(f"norms: 'pallas' {refusal}; use 'xla' or 'auto'")
    return "xla" if name == "xla" or refusal else "pallas"


def _refusal(width: int, platform: str) -> str:
    """Why the kernel cannot run, or nothing."""
    if platform != "tpu":
        return f"needs a TPU, but the backend is {platform!r}"
    if width % kernel.LANES:
        return f"needs a width that is a multiple of {kernel.LANES}, but the network's is {width}"
    return ""


def norm_modulate(
    x: Float[Array, "b t d"], modulations: Sequence[Pair], impl: NormImpl, dtype: Any
) -> tuple[Float[Array, "b t d"], tuple[Float[Array, "b t d"], ...]]:
    """x, which what else reads it should be given, and its norm under each pair (shift, scale) `[B, D]`."""
    if impl == "pallas":
        return kernel.norm_modulate(x.astype(dtype), modulations)
    normed = layer_norm(x, dtype)
    return x, tuple(modulate(normed, shift, scale) for shift, scale in modulations)


def layer_norm(x: Float[Array, "*b d"], dtype: Any) -> Float[Array, "*b d"]:
    """LayerNorm without affine parameters, eps 1e-6, two-pass variance in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + kernel.EPSILON)).astype(dtype)


def modulate(x: Array, shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Array:
    """x·(1 + scale) + shift, one shift and scale per sample."""
    return x * (1 + scale[:, None]) + shift[:, None]
