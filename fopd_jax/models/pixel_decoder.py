"""Mask2Former's pixel decoder: deformable attention over three levels (Zhu et al. 2021, arXiv 2010.04159), then a map.

transformers' `Mask2FormerPixelDecoder` is the oracle of the tests, and parameters are named after it. Levels are the
backbone's last three maps, smallest first. Letters: B batch, S positions of all levels, L levels, N heads, P points,
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
    value: Float[Array, "b h w n d"],
    x: Float[Array, "b n p s"],
    y: Float[Array, "b n p s"],
    weights: Float[Array, "b n p s"],
) -> Float[Array, "b n d s"]:
    """Weighted sums of bilinear samples of a map at (x, y), in cells, the first one's centre being 0; 0 outside of it.

    The map's border of zeros makes the rule for what lies outside, once positions are clipped to it. Laid out for TPUs:
    the four corners of a cell stand side by side, so that a sample is one row to gather and, at 32 channels a head,
    just the 128 lanes of a register; then positions become the lanes, where weights are no broadcasts (a third of the
    cycles that the compiler estimates for rows times their weights).
    """
    height, width = value.shape[1:3]
    padded = jnp.pad(value, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
    corners = [padded[:, j : j + height + 1, i : i + width + 1] for j in (0, 1) for i in (0, 1)]
    table = rearrange(jnp.concatenate(corners, -1), "B Y X N CH -> B N (Y X) CH")
    (left, right), (above, below) = _taps(x, width), _taps(y, height)
    cell = (above[0] + 1) * (width + 1) + left[0] + 1
    take = jax.vmap(jax.vmap(lambda table, cell: jnp.take(table, cell, axis=0, mode="clip")))
    rows = rearrange(take(table, cell), "B N P S (C H) -> B N P C H S", C=4)
    shares = jnp.stack([vertical * horizontal for vertical in (above[1], below) for horizontal in (left[1], right)], 3)
    shares = (shares * weights[:, :, :, None]).astype(value.dtype)
    return (rows * shares[:, :, :, :, None]).sum((2, 3))


def _taps(at: Float[Array, "b n p s"], length: int) -> tuple[tuple[Array, Array], Array]:
    """((the lower of two neighbours, its share), the upper one's share), both within a border of one."""
    at = jnp.clip(at, -1, length)
    lower = jnp.minimum(jnp.floor(at), length - 1)
    return (lower.astype(jnp.int32), lower + 1 - at), at - lower


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
        offsets = rearrange(offsets.astype(jnp.float32), "B S (N L P Z) -> L Z B N P S", N=heads, L=LEVELS, Z=2)
        weights = nn.softmax(rearrange(weights.astype(jnp.float32), "B S (N LP) -> B N LP S", N=heads), axis=2)
        weights = rearrange(weights, "B N (L P) S -> L B N P S", L=LEVELS)
        places = np.concatenate([centres(rows, columns) for rows, columns in self.sizes])
        starts = np.cumsum([0, *(rows * columns for rows, columns in self.sizes)])
        sums = []
        for level, (rows, columns) in enumerate(self.sizes):
            own = rearrange(value[:, starts[level] : starts[level + 1]], "B (Y X) N H -> B Y X N H", X=columns)
            x_at, y_at = (
                jnp.asarray(places[:, axis] * length - 0.5)[None, None, None] + offsets[level, axis]
                for axis, length in enumerate((np.float32(columns), np.float32(rows)))
            )
            sums.append(sample(own, x_at, y_at, weights[level]))
        y = rearrange(sum(sums[1:], sums[0]), "B N H S -> B S (N H)")
        return nn.Dense(width, dtype=dtype, name="output_proj")(y)


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
