"""MMDiT and MMDiT-X, the transformers of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206).

Latents are NHWC; the network predicts the rectified-flow velocity v = ε - x0. Parameter names follow diffusers'
`SD3Transformer2DModel`, which is the oracle of the tests. Einsum letters: B batch, T image tokens, S text tokens,
N heads, H head dimension, D width, R adapter rank, K adapters.

Every dense layer reads an optional low-rank update from the variable collection `adapter`: leaves `a [D_in, R]` and
`b [R, D_out]`, or a bank of them with a leading axis K from which `route [B]` gathers *inside the layer*, so that no
per-sample copy of a whole adapter ever exists. `b` carries the adapter's scale already. Kernels may be kept in float8:
then the collection `scales` holds a factor per output channel, `kernel [D_out]`, which multiplies the product.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from fopd_jax.models.attention import AttentionImpl, save_attention
from fopd_jax.models.coordinates import LAYER, Coordinates
from fopd_jax.models.dense import Dense, Layer, project
from fopd_jax.models.fences import fenced_gelu
from fopd_jax.models.kernels.choice import KernelImpl
from fopd_jax.models.kernels.merged_attention import whole_tiles
from fopd_jax.models.norms import norm_modulate
from fopd_jax.models.streams import Projected, RMSNorm, attend

Dtype = Any
LAYER_STACKS = ("dual_blocks", "blocks")  # the scanned modules, in the order in which they run
SHORT_STACK = 2  # layers; a loop over so few costs more in copies than it saves in compilation
# What a block keeps for the backward beside its input, from nothing to everything ("none": no rematerialisation).
# "dots" keeps attentions, too.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "attention": save_attention,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, save_attention
    ),
}


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Shape of one network. `dual_layers` counts the leading blocks that have a second, image-only attention."""

    depth: int
    num_heads: int
    head_dim: int
    dual_layers: int
    qk_norm: bool
    patch_size: int
    channels: int
    context_dim: int
    pooled_dim: int
    table_size: int  # rows and columns of the fixed position table, in patches
    base_size: int  # grid whose positions are 0, 1, 2, …: larger tables interpolate between them

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


_SD3 = {"patch_size": 2, "channels": 16, "context_dim": 4096, "pooled_dim": 2048, "base_size": 64, "head_dim": 64}
_MINIATURE = {"patch_size": 4, "channels": 3, "context_dim": 32, "pooled_dim": 24, "base_size": 6, "head_dim": 32}

PRESETS: dict[str, MMDiTConfig] = {
    "sd35_medium": MMDiTConfig(depth=24, num_heads=24, dual_layers=13, qk_norm=True, table_size=384, **_SD3),
    "sd35_large": MMDiTConfig(depth=38, num_heads=38, dual_layers=0, qk_norm=True, table_size=192, **_SD3),
    "sd3_medium": MMDiTConfig(depth=24, num_heads=24, dual_layers=0, qk_norm=False, table_size=192, **_SD3),
    "miniature": MMDiTConfig(depth=4, num_heads=4, dual_layers=2, qk_norm=True, table_size=6, **_MINIATURE),
    "miniature_large": MMDiTConfig(depth=6, num_heads=6, dual_layers=0, qk_norm=True, table_size=6, **_MINIATURE),
}


def position_table(config: MMDiTConfig, rows: int, columns: int) -> Float[np.ndarray, "rows columns d"]:
    """Centre crop of the fixed sine-cosine table, computed in float64 without building the whole of it.

    Half of the features encode the column, half the row; sines come before cosines.

    Raises:
      ValueError: the grid is larger than the table.
    """
    if rows > config.table_size or columns > config.table_size:
        raise ValueError(f"grid of {rows}x{columns} patches exceeds the position table of {config.table_size} a side")

    def encode(count: int) -> np.ndarray:
        start = (config.table_size - count) // 2
        # Checkpoints' tables round the positions, and only them, to float32: up to 2e-6 of angle.
        positions = np.arange(start, start + count, dtype=np.float32) / np.float32(config.table_size / config.base_size)
        frequencies = 10000.0 ** -(np.arange(config.width // 4) / (config.width / 4))
        angles = np.outer(positions.astype(np.float64), frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    along_columns = np.broadcast_to(encode(columns)[None], (rows, columns, config.width // 2))
    along_rows = np.broadcast_to(encode(rows)[:, None], (rows, columns, config.width // 2))
    return np.concatenate([along_columns, along_rows], axis=-1).astype(np.float32)


def timestep_embedding(timestep: Float[Array, " b"], dim: int = 256) -> Float[Array, "b dim"]:
    """Sinusoidal embedding, cosines first, in float32 (diffusers' `Timesteps(flip_sin_to_cos=True)`)."""
    frequencies = jnp.exp(-np.log(10000.0) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angles = timestep.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Modulation(nn.Module):
    """adaLN: `chunks` vectors of width D from the conditioning embedding, in diffusers' order.

    Each forward computes its own, although teachers, anchor and student read the same weights and embedding of a
    sample. In SD3.5-Medium all blocks' modulations are 650·D² = 1.5 GFLOP a row, 0.07% of a forward at 512 px. Reading
    their 1.5 GB of bfloat16 weights once a timestep instead of three times would save below 1% of it from four images
    a chip on, and would hold 1 MB a row meanwhile.
    """

    chunks: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, embedding: Float[Array, "b d"]) -> tuple[Float[Array, "b d"], ...]:
        width = embedding.shape[-1]
        init = nn.initializers.zeros  # adaLN-zero: blocks start as the identity
        linear = Dense(self.chunks * width, ("embed", "mlp"), self.dtype, init, name="linear")
        return tuple(jnp.split(linear(nn.silu(embedding)), self.chunks, axis=-1))


class FeedForward(nn.Module):
    """D → 4D → D with tanh-approximated GELU."""

    dtype: Dtype = jnp.float32
    kernels: KernelImpl = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], route: Int[Array, " b"] | None) -> Float[Array, "b t d"]:
        width = x.shape[-1]
        hidden = Dense(4 * width, ("embed", "mlp"), self.dtype, name="up")(x, route)
        hidden = fenced_gelu(hidden) if self.kernels == "pallas" else nn.gelu(hidden, approximate=True)
        return Dense(width, ("mlp", "embed"), self.dtype, name="down")(hidden, route)


class Names(NamedTuple):
    """What the layers of one stream are called in a `JointAttention`."""

    projections: tuple[str, str, str]
    norms: tuple[str, str]


IMAGE = Names(("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
TEXT = Names(("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))


def _project(module: "JointAttention", x: Array, route: Array | None, names: Names) -> Projected:
    """Queries, keys and values of one stream as children of the calling module.

    Three matrix products, not one: at this width each fills a chip, and what one product gives has to be split again.
    By the TPU compiler's estimate (v6e, 8 images of 512 px) one costs 1.7 times as much, 2.8 times with its matrix
    joined on the way; benchmarks/kernels.py measures it anywhere.
    """
    config, dtype = module.config, module.dtype
    layer = Layer(config.width, ("embed", "heads"), dtype, module.kernels)
    q, k, v = project(module, names.projections, x, route, layer)
    if not config.qk_norm:
        return Projected(q, k, v, None, None)
    return Projected(q, k, v, *(RMSNorm(config.head_dim, dtype, name=name) for name in names.norms))


class JointAttention(nn.Module):
    """One attention over image and text tokens, image first; without text it is the image-only `attn2`.

    `text_tokens`: how many of the text's tokens are real, None for all; what lies behind is padding.
    """

    config: MMDiTConfig
    impl: AttentionImpl
    text_output: bool = True
    dtype: Dtype = jnp.float32
    text_tokens: int | None = None
    kernels: KernelImpl = "xla"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], context: Float[Array, "b s d"] | None, route: Int[Array, " b"] | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"] | None]:
        head_dim, width = self.config.head_dim, self.config.width
        streams = (_project(self, x, route, IMAGE),)
        if context is not None:
            streams = (*streams, _project(self, context, route, TEXT))
        both = context is not None and self.text_output
        tokens = (x.shape[1],) if context is None else (x.shape[1], self.text_tokens or context.shape[1])
        outs = attend(streams, head_dim, self.impl, 1 + both, tokens)
        layer = Layer(width, ("heads", "embed"), self.dtype, self.kernels)
        (out,) = project(self, ("to_out",), outs[0], route, layer)
        if not both:
            return out, None
        (text_out,) = project(self, ("to_add_out",), outs[1], route, layer)
        return out, text_out


class Block(nn.Module):
    """Joint transformer block. `dual`: a second attention of the image with itself. `last`: text is only read.

    `text_tokens`: how many of the text's tokens are real, None for all.
    """

    config: MMDiTConfig
    impl: AttentionImpl
    dual: bool = False
    last: bool = False
    dtype: Dtype = jnp.float32
    kernels: KernelImpl = "xla"
    text_tokens: int | None = None

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], embedding: Float[Array, "b d"], route: Int[Array, " b"] | None
    ) -> tuple[tuple[Array, Array], None]:
        x, context = (nn.spmd.with_logical_constraint(stream, ("batch", None, None)) for stream in streams)
        dtype, kernels = self.dtype, self.kernels
        modulation = Modulation(9 if self.dual else 6, dtype, name="norm1")(embedding)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation[:6]
        text = Modulation(2 if self.last else 6, dtype, name="norm1_context")(embedding)
        # The context-pre-only norm orders its chunks (scale, shift); every other modulation is (shift, scale, …).
        text_pair = (text[1], text[0]) if self.last else (text[0], text[1])

        pairs = [(shift, scale), *([modulation[6:8]] if self.dual else [])]
        x, (normed, *normed2) = norm_modulate(x, pairs, kernels, dtype)
        context, (text_normed,) = norm_modulate(context, [text_pair], kernels, dtype)
        attn = JointAttention(self.config, self.impl, not self.last, dtype, self.text_tokens, kernels, name="attn")
        image_out, text_out = attn(normed, text_normed, route)
        x = x + gate[:, None] * image_out
        for each in normed2:
            attn2 = JointAttention(self.config, self.impl, False, dtype, kernels=kernels, name="attn2")
            x = x + modulation[8][:, None] * attn2(each, None, route)[0]
        x, (normed,) = norm_modulate(x, [(shift_mlp, scale_mlp)], kernels, dtype)
        x = x + gate_mlp[:, None] * FeedForward(dtype, kernels, name="ff")(normed, route)
        if text_out is not None:
            text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = text[2:]
            context = context + text_gate[:, None] * text_out
            context, (normed,) = norm_modulate(context, [(text_shift_mlp, text_scale_mlp)], kernels, dtype)
            context = context + text_gate_mlp[:, None] * FeedForward(dtype, kernels, name="ff_context")(normed, route)
        return (x, context), None


class Embedder(nn.Module):
    """Two-layer SiLU network, of the timestep's sinusoids or of the pooled text."""

    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b d"]:
        x = nn.spmd.with_logical_constraint(x, ("batch", None))
        hidden = nn.silu(Dense(self.width, (None, "embed"), self.dtype, name="linear_1")(x))
        hidden = nn.spmd.with_logical_constraint(hidden, ("batch", None))
        return Dense(self.width, ("embed", None), self.dtype, name="linear_2")(hidden)


class MMDiT(nn.Module):
    """The whole network: `(x, timestep = 1000·sigma, context, pooled) → v`.

    Blocks live in two scanned stacks, `dual_blocks` and `blocks`, and one `last_block`; with `scan_layers=False` they
    are `dual_blocks_0 …`, `blocks_0 …` (`convert_layers` maps one parameter tree to the other). Scans of up to
    `SHORT_STACK` layers are unrolled, parameters stacked all the same. The stacks are rematerialised, the last block is
    not: the backward begins with it, so what it keeps is gone before any other block makes its own again. The cropped
    position table is a constant of the collection `constants`, outside of optimizer, EMA and sharding.
    """

    config: MMDiTConfig
    impl: AttentionImpl = "xla"
    dtype: Dtype = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    kernels: KernelImpl = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b height width c"],
        timestep: Float[Array, " b"],
        context: Float[Array, "b s context_dim"],
        pooled: Float[Array, "b pooled_dim"],
        route: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b height width c"]:
        config, dtype = self.config, self.dtype
        p, rows, columns = config.patch_size, x.shape[1] // config.patch_size, x.shape[2] // config.patch_size
        tokens = rearrange(x, "B (h p) (w q) c -> B (h w) (p q c)", p=p, q=p)
        tokens = Dense(config.width, (None, "embed"), dtype, name="patch_embed")(tokens)
        table = self.variable("constants", "pos_embed", lambda: jnp.asarray(position_table(config, rows, columns)))
        tokens = tokens + centre_crop(table.value, rows, columns).reshape(1, -1, config.width).astype(dtype)

        embedding = Embedder(config.width, jnp.float32, name="time_embed")(timestep_embedding(timestep))
        embedding = embedding.astype(dtype) + Embedder(config.width, dtype, name="pooled_embed")(pooled)
        embedding = nn.spmd.with_logical_constraint(Coordinates(name=LAYER)(embedding), ("batch", None))
        text = Dense(config.width, (None, "embed"), dtype, name="context_embed")(context)
        if self.impl in ("merged", "cudnn"):
            text = whole_tiles(text)  # once, here: nothing is padded further on

        block = {"dtype": dtype, "kernels": self.kernels, "text_tokens": context.shape[1]}
        streams = (tokens, text)
        streams = self._stack("dual_blocks", config.dual_layers, {**block, "dual": True}, streams, embedding, route)
        streams = self._stack("blocks", config.depth - 1 - config.dual_layers, block, streams, embedding, route)
        last = Block(config, self.impl, last=True, **block, name="last_block")
        (tokens, _), _ = last(streams, embedding, route)

        scale, shift = Modulation(2, dtype, name="norm_out")(embedding)  # in this order, unlike the blocks
        _, (tokens,) = norm_modulate(tokens, [(shift, scale)], self.kernels, dtype)
        out = Dense(p * p * config.channels, ("embed", None), dtype, name="proj_out")(tokens)
        out = rearrange(out, "B (h w) (p q c) -> B (h p) (w q) c", h=rows, p=p, q=p)
        return out.astype(jnp.float32)

    def _block_class(self, looped: bool) -> type[Block]:
        """What a stack is made of. Outside a loop XLA would merge a block with its repetition, and keep all of it."""
        if self.remat == "none":
            return Block
        return nn.remat(Block, prevent_cse=not looped, policy=REMAT_POLICIES[self.remat])

    def _stack(
        self,
        name: str,
        length: int,
        fields: dict[str, Any],
        streams: tuple[Array, Array],
        embedding: Array,
        route: Array | None,
    ) -> tuple[Array, Array]:
        looped = self.scan_layers and length > SHORT_STACK
        block_class = self._block_class(looped)
        if not self.scan_layers:
            for i in range(length):
                block = block_class(self.config, self.impl, **fields, name=f"{name}_{i}")
                streams, _ = block(streams, embedding, route)
            return streams
        if length == 0:
            return streams
        in_axes: Any = (nn.broadcast, nn.broadcast)  # flax types it as int
        scanned = nn.scan(
            block_class,
            variable_axes={"params": 0, "adapter": 0, "scales": 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=length,
            unroll=1 if looped else length,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        streams, _ = scanned(self.config, self.impl, **fields, name=name)(streams, embedding, route)
        return streams


def centre_crop(
    table: Float[Array | np.ndarray, "r c d"], rows: int, columns: int
) -> Float[Array | np.ndarray, "rows columns d"]:
    """The middle `rows`x`columns` of a position table, on the host or not.

    Raises:
      ValueError: the table is smaller than that.
    """
    if rows > table.shape[0] or columns > table.shape[1]:
        raise ValueError(
            f"pos_embed holds {table.shape[0]}x{table.shape[1]} patches, but the input has {rows}x{columns}"
        )
    top, left = (table.shape[0] - rows) // 2, (table.shape[1] - columns) // 2
    return table[top : top + rows, left : left + columns]


def convert_layers(tree: dict[str, Any], *, scan: bool) -> dict[str, Any]:
    """Convert a parameter or adapter tree between stacked (`scan=True`) and per-layer form. Leaves may be numpy or jax.

    `{"blocks": leaf[L, …]}` ↔ `{"blocks_0": leaf[…], …, "blocks_L-1": leaf[…]}`. Other entries are kept.
    """
    out = dict(tree)
    for name in LAYER_STACKS:
        if scan:
            layers = [out.pop(f"{name}_{i}") for i in range(sum(k.rpartition("_")[0] == name for k in tree))]
            if layers:
                on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(layers))
                stack: Any = np.stack if on_host else jnp.stack
                out[name] = jax.tree.map(lambda *leaves, stack=stack: stack(leaves), *layers)
        elif name in out:
            stack = out.pop(name)
            length = len(jax.tree.leaves(stack)[0])
            out |= {f"{name}_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(length)}
    return out
