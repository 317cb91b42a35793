"""T5 v1.1's encoder (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202), SD3's third text encoder.

transformers' `T5EncoderModel` is the oracle of the tests. Attention is not scaled by 1/√H, sees both ways, and masks no
padding, which SD3 attends as well. Positions enter only as a bias on the logits, one for all layers. Einsum letters:
B batch, S text tokens, N heads, H head dimension, D width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

Dtype = Any
Axes = tuple[str | None, str | None]


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of one encoder. Half of `num_buckets` serve each direction; from `max_distance` on, all share the last."""

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_buckets: int
    max_distance: int
    rms_norm_eps: float


T5_XXL = T5Config(
    vocab_size=32128, width=4096, depth=24, num_heads=64, head_dim=64, mlp_dim=10240,
    num_buckets=32, max_distance=128, rms_norm_eps=1e-6,
)  # fmt: skip


def relative_position_bucket(
    relative: Int[np.ndarray, "*s"], num_buckets: int, max_distance: int
) -> Int[np.ndarray, "*s"]:
    """Bucket of a key's position minus its query's: the lower half looks back, the upper half ahead.

    In each half, half of the buckets hold one distance each and the others widen logarithmically. Computed on the host,
    in float32 as transformers does, since a backend's own logarithm could round a distance into the next bucket.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    wide = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return np.where(distance < exact, distance, wide) + half * (relative > 0)


def _dense(features: int, axes: Axes, dtype: Dtype, name: str) -> nn.Dense:
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name=name)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale, in float32."""

    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        scale: Any = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (None,)), x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32)[None, None]).astype(self.dtype)


class RelativePositionBias(nn.Module):
    """What a query adds to its logit of a key, by their distance and the head, in float32."""

    config: T5Config

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "1 n s s"]:
        config, positions = self.config, np.arange(length)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "heads"))
        table: Any = self.param("embedding", init, (config.num_buckets, config.num_heads))
        relative = positions[None] - positions[:, None]  # key's minus query's
        buckets = relative_position_bucket(relative, config.num_buckets, config.max_distance)
        return rearrange(table.astype(jnp.float32)[buckets], "Q K N -> 1 N Q K")


class Attention(nn.Module):
    """Self-attention without 1/√H, plus `bias` on the logits; softmax in float32."""

    config: T5Config
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "1 n s s"]) -> Float[Array, "b s d"]:
        config, inner = self.config, self.config.num_heads * self.config.head_dim
        projected = (_dense(inner, ("embed", "heads"), self.dtype, name)(x) for name in ("q", "k", "v"))
        q, k, v = (rearrange(y, "B S (N H) -> B S N H", H=config.head_dim) for y in projected)
        with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes bfloat16 and float32 inside
            y = jax.nn.dot_product_attention(q, k, v, bias, scale=1.0, implementation="xla")
        return _dense(config.width, ("heads", "embed"), self.dtype, "o")(rearrange(y, "B S N H -> B S (N H)"))


class GatedMLP(nn.Module):
    """(gelu(x·wi_0) ⊙ x·wi_1)·wo with tanh-approximated GELU."""

    config: T5Config
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        gate, linear = (_dense(self.config.mlp_dim, ("embed", "mlp"), self.dtype, name)(x) for name in ("wi_0", "wi_1"))
        return _dense(self.config.width, ("mlp", "embed"), self.dtype, "wo")(nn.gelu(gate, approximate=True) * linear)


class Layer(nn.Module):
    """Pre-norm encoder layer."""

    config: T5Config
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "1 n s s"]) -> tuple[Float[Array, "b s d"], None]:
        eps, dtype = self.config.rms_norm_eps, self.dtype
        x = nn.spmd.with_logical_constraint(x, ("batch", None, None))
        normed = RMSNorm(eps, dtype, name="attention_norm")(x)
        x = x + Attention(self.config, dtype, name="attention")(normed, bias)
        normed = RMSNorm(eps, dtype, name="mlp_norm")(x)
        return x + GatedMLP(self.config, dtype, name="mlp")(normed), None


class T5Encoder(nn.Module):
    """The whole encoder: token ids → the last layer's normed states [B, S, D] in `dtype`.

    Layers live in one scanned stack, `layers`; the position bias outside of it is computed once. `dtype` is that of the
    computation, float32 or bfloat16; norms, position bias and softmax are in float32.
    """

    config: T5Config
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Encode texts of any length.

        Raises:
          ValueError: `dtype` is float16, in which T5's states overflow.
        """
        config, dtype = self.config, self.dtype
        if dtype == jnp.float16:
            raise ValueError("T5 overflows in float16; compute in bfloat16 or float32")
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        x = nn.Embed(config.vocab_size, config.width, dtype=dtype, embedding_init=init, name="shared")(ids)
        in_axes: Any = nn.broadcast  # flax types it as int
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, dtype, name="layers")
        x, _ = layers(x, RelativePositionBias(config, name="relative_attention_bias")(ids.shape[1]))
        return RMSNorm(config.rms_norm_eps, dtype, name="final_layer_norm")(x)
