"""Swin Transformer (Liu et al. 2021, arXiv 2103.14030) as a backbone: the maps of all its stages, each with its norm.

transformers' `SwinBackbone` is the oracle of the tests, and parameters are named after it. Attention is within windows,
which every second block shifts by half a window. Einsum letters: B batch, W windows, Q and K positions of a window,
N heads, H head dimension.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from fopd_jax.models.clip import LayerNorm

Dtype = Any
EPS = 1e-5  # of all norms
PATCH = 4
_MASKED = -100.0  # the published network's: what other windows' keys still weigh is exp(-100)


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Shape of one backbone: `width` is the first stage's, and doubles with each; depths are even."""

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int
    mlp_ratio: int

    def stage_width(self, stage: int) -> int:
        """Width of a stage, from 0."""
        return self.width * 2**stage


SWIN_S = SwinConfig(width=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), window=7, mlp_ratio=4)


def relative_positions(window: int) -> np.ndarray:
    """Row of the bias table of each query and key of a window, `[w², w²]`: their offset in y, then in x."""
    y, x = np.divmod(np.arange(window**2), window)
    offset_y, offset_x = y[:, None] - y[None], x[:, None] - x[None]
    return (offset_y + window - 1) * (2 * window - 1) + offset_x + window - 1


def window_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """What is added to the scores of a map that was rolled by `shift`, `[windows, w², w²]`: 0 or -100.

    The last windows hold what was rolled over from the other side, which is no neighbour of what they hold besides.
    """

    def regions(length: int) -> np.ndarray:
        at = np.arange(length)
        return (at >= length - window).astype(np.int32) + (at >= length - shift)

    region = 3 * regions(height)[:, None] + regions(width)[None]
    flat = rearrange(region, "(y p) (x q) -> (y x) (p q)", p=window, q=window)
    return np.where(flat[:, :, None] == flat[:, None], 0, _MASKED).astype(np.float32)


class WindowAttention(nn.Module):
    """Self-attention within windows, with a bias by relative position; scores and softmax in float32."""

    num_heads: int
    window: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b w t d"], mask: Float[np.ndarray, "w t t"] | None) -> Float[Array, "b w t d"]:
        width = x.shape[-1]
        projected = (nn.Dense(width, dtype=self.dtype, name=name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (rearrange(y, "B W T (N H) -> B W T N H", N=self.num_heads) for y in projected)
        shape = (2 * self.window - 1) ** 2, self.num_heads
        table: Any = self.param("relative_position_bias_table", nn.initializers.normal(0.02), shape)
        bias = rearrange(table.astype(jnp.float32)[relative_positions(self.window)], "Q K N -> 1 1 N Q K")
        if mask is not None:
            bias = bias + jnp.asarray(mask)[None, :, None]
        scores = jnp.einsum("BWQNH,BWKNH->BWNQK", q, k, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores * (width // self.num_heads) ** -0.5 + bias).astype(self.dtype)
        y = rearrange(jnp.einsum("BWNQK,BWKNH->BWQNH", weights, v), "B W T N H -> B W T (N H)")
        return nn.Dense(width, dtype=self.dtype, name="o_proj")(y)


class Block(nn.Module):
    """Pre-norm transformer block on a map. What fills the map up to whole windows is attended to, as in training."""

    num_heads: int
    window: int
    mlp_ratio: int
    shift: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        width, dtype = x.shape[-1], self.dtype
        x = x + self._attend(LayerNorm(EPS, dtype, name="layernorm_before")(x))
        y = LayerNorm(EPS, dtype, name="layernorm_after")(x)
        y = nn.gelu(nn.Dense(self.mlp_ratio * width, dtype=dtype, name="fc1")(y), approximate=False)
        return x + nn.Dense(width, dtype=dtype, name="fc2")(y)

    def _attend(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        (height, width), size, shift = x.shape[1:3], self.window, self.shift
        x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
        rows, columns = x.shape[1] // size, x.shape[2] // size
        mask = window_mask(x.shape[1], x.shape[2], size, shift) if shift else None
        x = jnp.roll(x, (-shift, -shift), (1, 2))
        x = rearrange(x, "B (Y P) (X Q) D -> B (Y X) (P Q) D", P=size, Q=size)
        x = WindowAttention(self.num_heads, size, self.dtype, name="attention")(x, mask)
        x = rearrange(x, "B (Y X) (P Q) D -> B (Y P) (X Q) D", Y=rows, X=columns, P=size, Q=size)
        return jnp.roll(x, (shift, shift), (1, 2))[:, :height, :width]


class Pair(nn.Module):
    """A block and a shifted one; the carry is the map."""

    num_heads: int
    window: int
    mlp_ratio: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> tuple[Float[Array, "b h w d"], None]:
        x = nn.spmd.with_logical_constraint(x, ("batch", None, None, None))
        for name, shift in (("plain", 0), ("shifted", self.window // 2)):
            x = Block(self.num_heads, self.window, self.mlp_ratio, shift, self.dtype, name=name)(x)
        return x, None


class PatchMerging(nn.Module):
    """Four neighbours into one of twice the width: `(column row channel)`, column outermost."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h//2 w//2 2*d"]:
        width = x.shape[-1]
        x = rearrange(x, "B (Y R) (X C) D -> B Y X (C R D)", R=2, C=2)
        x = LayerNorm(EPS, self.dtype, name="norm")(x)
        return nn.Dense(2 * width, use_bias=False, dtype=self.dtype, name="reduction")(x)


class Swin(nn.Module):
    """Pixels, normalised, of sides that the last stage's stride divides → the stages' normed maps, `[B, H/4, W/4, D]`
    first and each next one of half the sides and twice the width.

    Blocks live in one scanned stack of pairs a stage, `stage1` and so on. `dtype` is that of the computation, float32
    or bfloat16; norms, scores and softmax are in float32.
    """

    config: SwinConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b _ _ _"], ...]:
        config, dtype = self.config, self.dtype
        embed = nn.Conv(config.width, (PATCH, PATCH), PATCH, "VALID", dtype=dtype, name="patch_embeddings")
        x, maps = LayerNorm(EPS, dtype, name="norm")(embed(pixels)), []
        for stage, (depth, num_heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
            if stage:
                x = PatchMerging(dtype, name=f"downsample{stage}")(x)
            pairs = nn.scan(
                Pair,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=depth // 2,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = pairs(num_heads, config.window, config.mlp_ratio, dtype, name=f"stage{stage + 1}")(x)
            maps.append(LayerNorm(EPS, dtype, name=f"norm{stage + 1}")(x))
        return tuple(maps)
