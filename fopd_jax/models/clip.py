"""CLIP's text tower, twice in Stable Diffusion 3: CLIP-L (Radford et al. 2021, arXiv 2103.00020) and OpenCLIP's bigG.

transformers' `CLIPTextModelWithProjection` is the oracle of the tests, and parameters are named after it. Attention is
causal and masks no padding, so the states of padded positions depend on the prompt too, and a text's own states not on
its padding. The layers are the vision tower's as well (`clip_vision`). Einsum letters: B batch, S tokens, N heads,
H head dimension, D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

Dtype = Any
Axes = tuple[str | None, str | None]
Activation = Literal["quick_gelu", "gelu"]
LEGACY_EOS_TOKEN_ID = 2  # what published configurations say; no text ends with this id


@dataclasses.dataclass(frozen=True)
class CLIPTowerConfig:
    """What the two towers have in common: their layers, and the width of what they end in."""

    causal: ClassVar[bool]
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    projection_dim: int
    activation: Activation
    layer_norm_eps: float


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(CLIPTowerConfig):
    """Shape of a text tower. `eos_token_id` ends a text; the value 2 stands for the highest id of each text instead."""

    causal: ClassVar[bool] = True
    vocab_size: int
    max_length: int
    eos_token_id: int


_SD3 = {"vocab_size": 49408, "max_length": 77, "layer_norm_eps": 1e-5, "eos_token_id": LEGACY_EOS_TOKEN_ID}

CLIP_L = CLIPTextConfig(
    width=768, depth=12, num_heads=12, mlp_dim=3072, projection_dim=768, activation="quick_gelu", **_SD3
)
CLIP_G = CLIPTextConfig(
    width=1280, depth=32, num_heads=20, mlp_dim=5120, projection_dim=1280, activation="gelu", **_SD3
)


def quick_gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x·sigmoid(1.702·x), the GELU of OpenAI's own CLIP models."""
    return x * nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(nn.gelu, approximate=False),
}


def eos_position(ids: Int[Array, "b s"], eos_token_id: int) -> Int[Array, " b"]:
    """Where each text ends: the first `eos_token_id`, or with the legacy id 2 the first of the highest ids.

    The two agree with CLIP's own vocabulary, whose last entry is EOS. A text without `eos_token_id` gives 0.
    """
    return jnp.argmax(ids if eos_token_id == LEGACY_EOS_TOKEN_ID else ids == eos_token_id, axis=-1)


def dense(features: int, axes: Axes, dtype: Dtype, name: str, bias: bool = True) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


def embed(count: int, width: int, axes: Axes, dtype: Dtype, name: str) -> nn.Embed:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
    return nn.Embed(count, width, dtype=dtype, embedding_init=init, name=name)


class LayerNorm(nn.Module):
    """LayerNorm with affine parameters, two-pass variance in float32."""

    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale: Any = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (None,)), x.shape[-1:])
        bias: Any = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (None,)), x.shape[-1:])
        scale, bias = (leaf.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,)) for leaf in (scale, bias))
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(self.dtype)


class Attention(nn.Module):
    """Self-attention, causal in the text tower, softmax in float32."""

    config: CLIPTowerConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        width, dtype = self.config.width, self.dtype
        names = ("q_proj", "k_proj", "v_proj")
        projected = (dense(width, ("embed", "heads"), dtype, name)(x) for name in names)
        q, k, v = (rearrange(y, "B S (N H) -> B S N H", N=self.config.num_heads) for y in projected)
        with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes bfloat16 and float32 inside
            y = jax.nn.dot_product_attention(q, k, v, is_causal=self.config.causal, implementation="xla")
        y = rearrange(y, "B S N H -> B S (N H)")
        return dense(width, ("heads", "embed"), dtype, "out_proj")(y)


class MLP(nn.Module):
    """Two dense layers with the tower's own GELU between them."""

    config: CLIPTowerConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        hidden = dense(self.config.mlp_dim, ("embed", "mlp"), self.dtype, "fc1")(x)
        hidden = _ACTIVATIONS[self.config.activation](hidden)
        return dense(self.config.width, ("mlp", "embed"), self.dtype, "fc2")(hidden)


class Layer(nn.Module):
    """Pre-norm transformer layer. The carry pairs the states with the ones before them, (x, _) → (layer(x), x)."""

    config: CLIPTowerConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, states: tuple[Float[Array, "b s d"], Float[Array, "b s d"]]) -> tuple[tuple[Array, Array], None]:
        x = nn.spmd.with_logical_constraint(states[0], ("batch", None, None))
        eps, dtype = self.config.layer_norm_eps, self.dtype
        y = x + Attention(self.config, dtype, name="self_attn")(LayerNorm(eps, dtype, name="layer_norm1")(x))
        y = y + MLP(self.config, dtype, name="mlp")(LayerNorm(eps, dtype, name="layer_norm2")(y))
        return (y, x), None


def stack(config: CLIPTowerConfig, dtype: Dtype) -> nn.Module:
    """All layers of a tower as one scanned module, `layers`."""
    scanned = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=config.depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, dtype, name="layers")


class CLIPText(nn.Module):
    """The whole tower: token ids → what SD3 reads, `(hidden [B, S, D], pooled [B, P])`, both in `dtype`.

    `hidden` are the states that enter the last layer, without final norm (transformers' `hidden_states[-2]`); `pooled`
    is the last layer's state at the end of the text, normed and projected (`text_embeds`). Layers live in one scanned
    stack, `layers`. `dtype` is that of the computation, float32 or bfloat16; norms and softmax are in float32.
    """

    config: CLIPTextConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b s"]) -> tuple[Float[Array, "b s d"], Float[Array, "b p"]]:
        """Encode texts of up to `max_length` tokens.

        Raises:
          ValueError: the texts are longer.
        """
        config, dtype, length = self.config, self.dtype, ids.shape[1]
        if length > config.max_length:
            raise ValueError(f"texts of {length} tokens exceed the {config.max_length} positions of CLIP")
        tokens = embed(config.vocab_size, config.width, ("vocab", "embed"), dtype, "token_embedding")(ids)
        positions = embed(config.max_length, config.width, (None, "embed"), dtype, "position_embedding")
        x = tokens + positions(jnp.arange(length))[None]
        (x, hidden), _ = stack(config, dtype)((x, x))
        last = jnp.take_along_axis(x, eos_position(ids, config.eos_token_id)[:, None, None], axis=1)[:, 0]
        last = LayerNorm(config.layer_norm_eps, dtype, name="final_layer_norm")(last)
        return hidden, dense(config.projection_dim, ("embed", None), dtype, "text_projection", bias=False)(last)
