"""Mask2Former's pixel decoder: deformable attention over three levels (Zhu et al. 2021, arXiv 2010.04159), then a map.

transformers' `Mask2FormerPixelDecoder` is the oracle of the tests, and parameters are named after it. Levels are the
backbone's last three maps, smallest first. Einsum letters: B batch, S positions of all levels, N heads, P points,
C corners of a cell, H head dimension, D width.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from fopd_jax.models.clip import LayerNorm
from fopd_jax.models.swin import EPS

Dtype = Any
LEVELS, POINTS, GROUPS = 3, 4, 32
_TEMPERATURE = 10_000.0


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
    """`width` of all levels, `mask_width` of the map that masks are products with."""

    width: int
    mask_width: int
    depth: int
    num_heads: int
    mlp_dim: int


PIXEL_DECODER = PixelDecoderConfig(width=256, mask_width=256, depth=6, num_heads=8, mlp_dim=1024)


def sine_positions(height: int, width: int, features: int) -> np.ndarray:
    """Sines and cosines of y, then of x, both scaled to (0, 2π], `[height, width, features]`."""
    half = features // 2
    frequencies = _TEMPERATURE ** (-2 * (np.arange(half) // 2) / half)

    def embed(length: int) -> np.ndarray:
        angles = np.arange(1, length + 1)[:, None] * (2 * math.pi / (length + 1e-6)) * frequencies
        return np.where(np.arange(half) % 2, np.cos(angles), np.sin(angles))

    y, x = embed(height)[:, None], embed(width)[None]
    full = (height, width, half)
    return np.concatenate([np.broadcast_to(y, full), np.broadcast_to(x, full)], -1).astype(np.float32)


def centres(height: int, width: int) -> np.ndarray:
    """(x, y) of the centres of a map's cells, the map being 1 x 1; `[height·width, 2]`."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return np.stack([x, y], -1).reshape(-1, 2).astype(np.float32)


def sample(
    value: Float[Array, "b h w n d"], at: Float[Array, "b s n p 2"], weights: Float[Array, "b s n p"]
) -> Float[Array, "b s n d"]:
    """Weighted sums of bilinear samples of a map at (x, y), in cells, the first one's centre being 0; 0 outside of it.

    The map's border of zeros makes the rule for what lies outside, once positions are clipped to it. The four corners
    of a cell stand side by side, so that one sample is one row: a quarter of the gathers, and at 32 channels a head
    just the 128 lanes of a TPU's register, which a gather fills anyway.
    """
    height, width = value.shape[1:3]
    padded = jnp.pad(value, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
    corners = [padded[:, y : y + height + 1, x : x + width + 1] for y in (0, 1) for x in (0, 1)]
    table = rearrange(jnp.concatenate(corners, -1), "B Y X N CH -> B (Y X N) CH")
    limits = np.array([width, height])
    at = jnp.clip(at, -1, jnp.asarray(limits, at.dtype)[None, None, None, None])
    low = jnp.minimum(jnp.floor(at), jnp.asarray(limits - 1, at.dtype)[None, None, None, None])
    (x, y), (fx, fy) = (jnp.moveaxis(each, -1, 0) for each in (low.astype(jnp.int32) + 1, at - low))
    heads = jnp.arange(value.shape[3])[None, None, :, None]
    index = (y * (width + 1) + x) * value.shape[3] + heads
    rows = jax.vmap(lambda table, index: jnp.take(table, index, axis=0, mode="clip"))(table, index)
    rows = rearrange(rows, "B S N P (C H) -> B S N P C H", C=4)
    shares = jnp.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], -1)
    shares = (shares * weights[..., None]).astype(value.dtype)
    return jnp.einsum("BSNPC,BSNPCH->BSNH", shares, rows)


class DeformableAttention(nn.Module):
    """Each position of each level reads `POINTS` points of each level and head, where it says; positions in float32."""

    num_heads: int
    sizes: tuple[tuple[int, ...], ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], positions: Float[Array, "1 s d"]) -> Float[Array, "b s d"]:
        width, heads, dtype = x.shape[-1], self.num_heads, self.dtype
        value = nn.Dense(width, dtype=dtype, name="value_proj")(x)
        value = rearrange(value, "B S (N H) -> B S N H", N=heads)
        queries = x + positions
        offsets = nn.Dense(heads * LEVELS * POINTS * 2, dtype=dtype, name="sampling_offsets")(queries)
        weights = nn.Dense(heads * LEVELS * POINTS, dtype=dtype, name="attention_weights")(queries)
        offsets = rearrange(offsets.astype(jnp.float32), "B S (N L P Z) -> L B S N P Z", N=heads, L=LEVELS, Z=2)
        weights = nn.softmax(rearrange(weights.astype(jnp.float32), "B S (N LP) -> B S N LP", N=heads))
        weights = rearrange(weights, "B S N (L P) -> L B S N P", L=LEVELS)
        references = np.concatenate([centres(rows, columns) for rows, columns in self.sizes])
        y, start = jnp.zeros_like(value), 0
        for level, (rows, columns) in enumerate(self.sizes):
            end = start + rows * columns
            at = jnp.asarray(references * np.array([columns, rows], np.float32) - 0.5)[None, :, None, None]
            values = rearrange(value[:, start:end], "B (Y X) N H -> B Y X N H", X=columns)
            y, start = y + sample(values, at + offsets[level], weights[level]), end
        return nn.Dense(width, dtype=dtype, name="output_proj")(rearrange(y, "B S N H -> B S (N H)"))


class EncoderLayer(nn.Module):
    """Post-norm layer over the positions of all levels; the carry is their states."""

    config: PixelDecoderConfig
    sizes: tuple[tuple[int, ...], ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], positions: Float[Array, "1 s d"]
    ) -> tuple[Float[Array, "b s d"], None]:
        config, dtype = self.config, self.dtype
        x = nn.spmd.with_logical_constraint(x, ("batch", None, None))
        x = x + DeformableAttention(config.num_heads, self.sizes, dtype, name="self_attn")(x, positions)
        x = LayerNorm(EPS, dtype, name="self_attn_layer_norm")(x)
        y = nn.relu(nn.Dense(config.mlp_dim, dtype=dtype, name="fc1")(x))
        x = x + nn.Dense(config.width, dtype=dtype, name="fc2")(y)
        return LayerNorm(EPS, dtype, name="final_layer_norm")(x), None


class NormedConv(nn.Module):
    """A convolution and a norm over groups of channels, in float32."""

    width: int
    kernel: int
    bias: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w e"]:
        size = (self.kernel, self.kernel)
        x = nn.Conv(self.width, size, use_bias=self.bias, dtype=self.dtype, name="conv")(x)
        norm = nn.GroupNorm(GROUPS, epsilon=EPS, dtype=jnp.float32, use_fast_variance=False, name="norm")
        return norm(x.astype(jnp.float32)).astype(self.dtype)


class PixelDecoder(nn.Module):
    """The backbone's four maps → the map of 1/4 that masks are products with, and three levels, smallest first.

    Layers live in one scanned stack, `layers`.
    """

    config: PixelDecoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, maps: tuple[Float[Array, "b _ _ _"], ...]
    ) -> tuple[Float[Array, "b h w m"], tuple[Float[Array, "b _ _ d"], ...]]:
        config, dtype = self.config, self.dtype
        levels = [
            NormedConv(config.width, 1, True, dtype, name=f"input_projections_{i}")(each)
            for i, each in enumerate(maps[: -LEVELS - 1 : -1])
        ]
        levels = self._encode(levels)
        lateral = NormedConv(config.width, 1, False, dtype, name="adapter_1")(maps[0])
        wide = jax.image.resize(levels[-1].astype(jnp.float32), lateral.shape, "linear", antialias=False)
        y = nn.relu(NormedConv(config.width, 3, False, dtype, name="layer_1")(lateral + wide.astype(dtype)))
        return nn.Conv(config.mask_width, (1, 1), dtype=dtype, name="mask_projection")(y), tuple(levels)

    def _encode(self, levels: list[Float[Array, "b _ _ d"]]) -> list[Float[Array, "b _ _ d"]]:
        config, sizes = self.config, tuple(level.shape[1:3] for level in levels)
        embed: Any = self.param("level_embed", nn.initializers.normal(1.0), (LEVELS, config.width))
        positions = [
            jnp.asarray(sine_positions(rows, columns, config.width).reshape(-1, config.width)) + embed[i][None]
            for i, (rows, columns) in enumerate(sizes)
        ]
        in_axes: Any = nn.broadcast  # flax types it as int
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, sizes, self.dtype, name="layers")
        x = jnp.concatenate([rearrange(level, "B Y X D -> B (Y X) D") for level in levels], 1)
        x, _ = layers(x, jnp.concatenate(positions)[None].astype(self.dtype))
        ends = np.cumsum([rows * columns for rows, columns in sizes])[:-1]
        parts = jnp.split(x, ends, 1)
        return [rearrange(part, "B (Y X) D -> B Y X D", X=size[1]) for part, size in zip(parts, sizes, strict=True)]
