"""Mask2Former (Cheng et al. 2022, arXiv 2112.01527) over Swin: a class and a mask of each of a fixed number of queries.

transformers' `Mask2FormerForUniversalSegmentation` is the oracle of the tests, and parameters are named after it.
Einsum letters: B batch, Q queries, S positions of a level, N heads, H head dimension, M width of a mask's product.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from fopd_jax.models.clip import LayerNorm
from fopd_jax.models.pixel_decoder import LEVELS, PIXEL_DECODER, PixelDecoder, PixelDecoderConfig, sine_positions
from fopd_jax.models.swin import EPS, SWIN_S, Swin, SwinConfig

Dtype = Any
STRIDE = 32
"""What divides both sides of a picture: the last stage's stride."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The transformer decoder of the queries."""

    depth: int
    num_heads: int
    mlp_dim: int
    num_queries: int
    num_classes: int


@dataclasses.dataclass(frozen=True)
class Mask2FormerConfig:
    """Shape of the whole network; its decoder is as wide as its pixel decoder."""

    backbone: SwinConfig
    pixel_decoder: PixelDecoderConfig
    decoder: DecoderConfig


MASK2FORMER_SWIN_S = Mask2FormerConfig(
    SWIN_S, PIXEL_DECODER, DecoderConfig(depth=9, num_heads=8, mlp_dim=2048, num_queries=100, num_classes=80)
)
"""GenEval's detector: the published Swin-S for COCO's instances."""


class Attention(nn.Module):
    """Attention of queries to keys where `attend` allows it; scores and softmax in float32."""

    num_heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b q d"],
        keys: Float[Array, "b s d"],
        values: Float[Array, "b s d"],
        attend: Bool[Array, "b q s"] | None = None,
    ) -> Float[Array, "b q d"]:
        width = queries.shape[-1]
        inputs = {"q_proj": queries, "k_proj": keys, "v_proj": values}
        projected = (nn.Dense(width, dtype=self.dtype, name=name)(x) for name, x in inputs.items())
        q, k, v = (rearrange(y, "B S (N H) -> B S N H", N=self.num_heads) for y in projected)
        scores = jnp.einsum("BQNH,BSNH->BNQS", q, k, preferred_element_type=jnp.float32)
        scores = scores * (width // self.num_heads) ** -0.5
        if attend is not None:
            scores = jnp.where(attend[:, None], scores, -jnp.inf)
        y = jnp.einsum("BNQS,BSNH->BQNH", nn.softmax(scores).astype(self.dtype), v)
        return nn.Dense(width, dtype=self.dtype, name="out_proj")(rearrange(y, "B Q N H -> B Q (N H)"))


class DecoderLayer(nn.Module):
    """Post-norm layer of the queries: masked attention to one level, attention to each other, MLP."""

    config: DecoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b q d"],
        place: Float[Array, "1 q d"],
        level: tuple[Float[Array, "b s d"], Float[Array, "1 s d"]],
        attend: Bool[Array, "b q s"],
    ) -> Float[Array, "b q d"]:
        heads, dtype, (features, positions) = self.config.num_heads, self.dtype, level
        cross = Attention(heads, dtype, name="cross_attn")(x + place, features + positions, features, attend)
        x = LayerNorm(EPS, dtype, name="cross_attn_layer_norm")(x + cross)
        x = x + Attention(heads, dtype, name="self_attn")(x + place, x + place, x)
        x = LayerNorm(EPS, dtype, name="self_attn_layer_norm")(x)
        y = nn.relu(nn.Dense(self.config.mlp_dim, dtype=dtype, name="fc1")(x))
        return LayerNorm(EPS, dtype, name="final_layer_norm")(x + nn.Dense(x.shape[-1], dtype=dtype, name="fc2")(y))


class MaskEmbedder(nn.Module):
    """Queries' normed states → what their masks' logits are products with."""

    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b q d"]) -> Float[Array, "b q m"]:
        for i, width in enumerate((x.shape[-1], x.shape[-1], self.width)):
            x = nn.Dense(width, dtype=self.dtype, name=f"layers_{i}")(nn.relu(x) if i else x)
        return x


def attended(embedded: Float[Array, "b q m"], pixels: Float[Array, "b s m"]) -> Bool[Array, "b q s"]:
    """Where each query may look: where its mask's logit is not negative, or everywhere if that is nowhere.

    Resizing is linear, so a mask at a level's size is a product with `pixels` of that size, which all layers share.
    """
    inside = jnp.einsum("BQM,BSM->BQS", embedded, pixels, preferred_element_type=jnp.float32) >= 0
    return inside | ~inside.any(-1, keepdims=True)


class Decoder(nn.Module):
    """The pixel decoder's maps → logits of classes, "no object" last, and of masks of 1/4, both in float32.

    Layer i reads level i modulo 3 where the masks of the states before it allow; `layers_i` are few and not scanned.
    """

    config: DecoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b h w m"], levels: tuple[Float[Array, "b _ _ d"], ...]
    ) -> tuple[Float[Array, "b q c"], Float[Array, "b q h w"]]:
        config, dtype, width = self.config, self.dtype, levels[0].shape[-1]
        norm = LayerNorm(EPS, dtype, name="layernorm")
        embedder = MaskEmbedder(pixels.shape[-1], dtype, name="mask_embedder")
        level_embed = self.param("level_embed", nn.initializers.normal(1.0), (LEVELS, width))
        features, place = (
            self.param(name, nn.initializers.normal(1.0), (config.num_queries, width)).astype(dtype)[None]
            for name in ("queries_features", "queries_embedder")
        )
        keys = [_keys(level, embed, dtype) for level, embed in zip(levels, level_embed, strict=True)]
        masks = [_resized(pixels, level.shape[1:3]) for level in levels]
        x = jnp.broadcast_to(features, (pixels.shape[0], *features.shape[1:]))
        for i in range(config.depth):
            attend = attended(embedder(norm(x)), masks[i % LEVELS])
            x = DecoderLayer(config, dtype, name=f"layers_{i}")(x, place, keys[i % LEVELS], attend)
        x = norm(x)
        classes = nn.Dense(config.num_classes + 1, dtype=dtype, name="class_predictor")(x).astype(jnp.float32)
        return classes, jnp.einsum("BQM,BYXM->BQYX", embedder(x), pixels, preferred_element_type=jnp.float32)


def _keys(
    level: Float[Array, "b h w d"], embed: Float[Array, " d"], dtype: Dtype
) -> tuple[Float[Array, "b s d"], Float[Array, "1 s d"]]:
    """A level's features, marked as its own, and their positions."""
    positions = jnp.asarray(sine_positions(*level.shape[1:])).reshape(1, -1, level.shape[-1])
    features = rearrange(level, "B Y X D -> B (Y X) D") + embed.astype(dtype)[None, None]
    return features, positions.astype(dtype)


def _resized(pixels: Float[Array, "b h w m"], size: tuple[int, ...]) -> Float[Array, "b s m"]:
    shape = (pixels.shape[0], *size, pixels.shape[-1])
    small = jax.image.resize(pixels.astype(jnp.float32), shape, "linear", antialias=False)
    return rearrange(small.astype(pixels.dtype), "B Y X M -> B (Y X) M")


class Mask2Former(nn.Module):
    """Normalised pixels → logits `(classes [B, Q, C + 1], masks [B, Q, H/4, W/4])` in float32, "no object" last.

    `dtype` is that of the computation, float32 or bfloat16; norms, scores, softmax and sampled positions are in
    float32. As in the published network nothing is told of padding.
    """

    config: Mask2FormerConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b q c"], Float[Array, "b q h//4 w//4"]]:
        """Of pictures whose sides are multiples of 32.

        Raises:
          ValueError: they are not.
        """
        if pixels.shape[1] % STRIDE or pixels.shape[2] % STRIDE:
            raise ValueError(f"pixels: found {pixels.shape[1]} x {pixels.shape[2]}, expected multiples of {STRIDE}")
        config, dtype = self.config, self.dtype
        maps = Swin(config.backbone, dtype, name="encoder")(pixels.astype(dtype))
        mask_map, levels = PixelDecoder(config.pixel_decoder, dtype, name="pixel_decoder")(maps)
        return Decoder(config.decoder, dtype, name="decoder")(mask_map, levels)
