"""A second family: a small transformer that shares nothing with SD3's but the dense layer and the attention.

Image tokens turn by rotary positions (RoPE, Su et al. 2021) along rows and columns, text is read by cross-attention and
has no pooled form, one modulation serves all blocks (adaLN-single, Chen et al. 2023), the MLP is gated (SwiGLU), and
the network predicts the image x0, of which the velocity is v = (x - x0)/sigma. It has no constants.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from fopd_jax.backbones import registry
from fopd_jax.backbones.record import Backbone, LatentShape, Pass, Tokens
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.models.attention import attention
from fopd_jax.models.dense import Dense
from fopd_jax.models.mmdit import REMAT_POLICIES, timestep_embedding
from fopd_jax.parallel import sharding
from fopd_jax.rewards.reward import Reward, Scores, collect
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.embedded import EMBEDDED
from fopd_jax.worlds.world import World

PRESET, SIDE, TEXT = "rope_tiny", 8, 6
TIME, EXPANSION, LEAST_SIGMA = 256, 2, 0.05


# ---- the network


@dataclasses.dataclass(frozen=True)
class RopeShape:
    depth: int
    num_heads: int
    head_dim: int
    patch_size: int
    channels: int
    text_dim: int

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


PRESETS = {PRESET: RopeShape(depth=3, num_heads=4, head_dim=8, patch_size=2, channels=3, text_dim=10)}


def angles(rows: int, columns: int, head_dim: int) -> np.ndarray:
    """By token, half of the head's pairs for its row, half for its column `[T, head_dim / 2]`."""
    frequencies = 100.0 ** -(np.arange(head_dim // 4) / (head_dim // 4))
    along_rows = np.repeat(np.arange(rows), columns)[:, None] * frequencies[None]
    along_columns = np.tile(np.arange(columns), rows)[:, None] * frequencies[None]
    return np.concatenate([along_rows, along_columns], axis=-1).astype(np.float32)


def rotate(x: Any, turn: Any) -> Any:
    """Turn the pairs of each head `[B, T, N, H]` by a token's angles `[T, H / 2]`."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(turn)[None, :, None], jnp.sin(turn)[None, :, None]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def rms(x: Any, dtype: Any) -> Any:
    y = x.astype(jnp.float32)
    return (y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)).astype(dtype)


class Attention(nn.Module):
    """Of `x` over `source`; with `turn` both are rotated."""

    shape: RopeShape
    impl: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, source: Any, turn: Any, route: Any) -> Any:
        def heads(name: str, tokens: Any) -> Any:
            y = Dense(self.shape.width, ("embed", "heads"), self.dtype, name=name)(tokens, route)
            return rearrange(y, "B T (N H) -> B T N H", H=self.shape.head_dim)

        q, k, v = heads("query", x), heads("key", source), heads("value", source)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        y = rearrange(attention(q, k, v, self.impl), "B T N H -> B T (N H)")
        return Dense(self.shape.width, ("heads", "embed"), self.dtype, name="out")(y, route)


class GatedMLP(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, route: Any) -> Any:
        width = x.shape[-1]
        gate = Dense(EXPANSION * width, ("embed", "gated"), self.dtype, name="gate")(x, route)
        up = Dense(EXPANSION * width, ("embed", "gated"), self.dtype, name="up")(x, route)
        return Dense(width, ("gated", "embed"), self.dtype, name="down")(nn.silu(gate) * up, route)


class Block(nn.Module):
    shape: RopeShape
    impl: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, modulation: Any, text: Any, turn: Any, route: Any) -> tuple[Any, None]:
        table: Any = self.param(
            "table", nn.with_logical_partitioning(nn.initializers.normal(0.3), (None, "embed")), (6, x.shape[-1])
        )
        chunks = (modulation + table.astype(self.dtype)[None])[:, :, None]  # [B, 6, 1, D]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (chunks[:, i] for i in range(6))
        normed = rms(x, self.dtype) * (1 + scale) + shift
        x = x + gate * Attention(self.shape, self.impl, self.dtype, name="self")(normed, normed, turn, route)
        x = x + Attention(self.shape, self.impl, self.dtype, name="cross")(rms(x, self.dtype), text, None, route)
        return x + gate_mlp * GatedMLP(self.dtype, name="mlp")(
            rms(x, self.dtype) * (1 + scale_mlp) + shift_mlp, route
        ), None


class RopeDiT(nn.Module):
    """`(x, sigma [B], context) → v`."""

    config: RopeShape
    impl: Any = "xla"
    dtype: Any = jnp.float32
    remat: str = "none"
    scan_layers: bool = True

    @nn.compact
    def __call__(self, x: Any, sigma: Any, context: Any, route: Any = None) -> Any:
        shape, dtype, p = self.config, self.dtype, self.config.patch_size
        rows, columns = x.shape[1] // p, x.shape[2] // p
        patches = rearrange(x, "B (h p) (w q) c -> B (h w) (p q c)", p=p, q=p)
        tokens = Dense(shape.width, (None, "embed"), dtype, name="patches")(patches)
        text = Dense(shape.width, (None, "embed"), dtype, name="text")(context)
        time = nn.silu(Dense(shape.width, (None, "embed"), dtype, name="time")(timestep_embedding(1000 * sigma, TIME)))
        modulation = Dense(6 * shape.width, ("embed", "gated"), dtype, name="modulation")(time)
        modulation = rearrange(modulation, "B (n D) -> B n D", n=6)
        turn = jnp.asarray(angles(rows, columns, shape.head_dim))
        tokens = self._blocks(tokens, modulation, text, turn, route)
        found = Dense(p * p * shape.channels, ("embed", None), dtype, name="image")(rms(tokens, dtype))
        image = rearrange(found, "B (h w) (p q c) -> B (h p) (w q) c", h=rows, p=p, q=p).astype(jnp.float32)
        return (x.astype(jnp.float32) - image) / jnp.maximum(sigma, LEAST_SIGMA)[:, None, None, None]

    def _blocks(self, tokens: Any, *inputs: Any) -> Any:
        block: Any = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=not self.scan_layers, policy=REMAT_POLICIES[self.remat])
        settings = self.config, self.impl, self.dtype
        if not self.scan_layers:
            for i in range(self.config.depth):
                tokens, _ = block(*settings, name=f"blocks_{i}")(tokens, *inputs)
            return tokens
        scanned: Any = nn.scan(
            block, variable_axes={"params": 0, "adapter": 0}, split_rngs={"params": True},
            in_axes=(nn.broadcast,) * 4, length=self.config.depth, metadata_params={nn.PARTITION_NAME: "layers"},
        )  # fmt: skip
        return scanned(*settings, name="blocks")(tokens, *inputs)[0]


# ---- FLOPs

TARGETS = {
    "self": tuple(f"self/{name}" for name in ("query", "key", "value", "out")),
    "cross": tuple(f"cross/{name}" for name in ("query", "key", "value", "out")),
    "mlp": tuple(f"mlp/{name}" for name in ("gate", "up", "down")),
}
_INNER = ("out", "down")  # layers that read what their own group computed; all others read the stream, or the text


@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense layer of a block: forward FLOPs of the matrix and of an adapter's two factors."""

    group: str
    name: str
    dense: float
    a: float
    b: float

    @property
    def reads_text(self) -> bool:
        return self.group == "cross" and self.name in ("key", "value")


def layers(shape: RopeShape, tokens: Tokens, lora: LoRAConfig | None) -> list[Layer]:
    found = []
    for group, name in (path.split("/") for paths in TARGETS.values() for path in paths):
        rows = tokens.text if group == "cross" and name in ("key", "value") else tokens.image
        d_in = shape.width * (EXPANSION if name == "down" else 1)
        d_out = shape.width * (EXPANSION if name in ("gate", "up") else 1)
        rank = lora.rank if lora is not None and group in lora.targets else 0
        found.append(Layer(group, name, 2.0 * rows * d_in * d_out, 2.0 * rows * d_in * rank, 2.0 * rows * rank * d_out))
    return found


def attentions(shape: RopeShape, tokens: Tokens) -> dict[str, float]:
    """Scores and weighted values of one block."""
    each = 4.0 * shape.width * tokens.image
    return {"self": each * tokens.image, "cross": each * tokens.text, "mlp": 0.0}


def ends(shape: RopeShape, tokens: Tokens) -> dict[str, float]:
    """The layers outside of the blocks, forward."""
    patch = shape.patch_size**2 * shape.channels
    return {
        "patches": 2.0 * tokens.image * patch * shape.width,
        "text": 2.0 * tokens.text * shape.text_dim * shape.width,
        "time": 2.0 * TIME * shape.width,
        "modulation": 2.0 * shape.width * 6 * shape.width,
        "image": 2.0 * tokens.image * shape.width * patch,
    }


def flops(shape: RopeShape, tokens: Tokens, lora: LoRAConfig | None, remat: str) -> Pass:
    block = sum(each.dense + each.a + each.b for each in layers(shape, tokens, lora))
    block += sum(attentions(shape, tokens).values())
    forward = shape.depth * block + sum(ends(shape, tokens).values())
    backward = _of_network(shape, tokens) if lora is None else _of_adapter(shape, tokens, lora)
    return Pass(forward, backward, shape.depth * _repeated(shape, tokens, lora, block, remat))


def _of_network(shape: RopeShape, tokens: Tokens) -> float:
    """To all matrices, and to all activations but the network's own inputs."""
    outside, inside = ends(shape, tokens), layers(shape, tokens, None)
    total = 2 * (sum(outside.values()) + shape.depth * sum(each.dense for each in inside))
    total += 2 * shape.depth * sum(attentions(shape, tokens).values())
    return total - sum(outside[name] for name in ("patches", "text", "time"))


def _of_adapter(shape: RopeShape, tokens: Tokens, lora: LoRAConfig) -> float:
    """To the factors, and to the activations that depend on them: no text, nor the stream before the first adapter."""
    order = list(TARGETS)
    first = min(order.index(group) for group in lora.targets)
    total = ends(shape, tokens)["image"]
    for block in range(shape.depth):
        for each in layers(shape, tokens, lora):
            position = order.index(each.group)
            fixed = each.reads_text or (
                block == 0 and (position < first or (each.name not in _INNER and position == first))
            )
            total += each.a + 2 * each.b + (0.0 if fixed else each.dense + each.a)
        for group, scores in attentions(shape, tokens).items():
            if block or order.index(group) >= first:
                total += scores if group == "cross" and group not in lora.targets else 2 * scores  # queries alone
    return total


def _repeated(shape: RopeShape, tokens: Tokens, lora: LoRAConfig | None, block: float, remat: str) -> float:
    """Of one block: its forward, without what nobody needs (a frozen block's last product) or what is kept."""
    if remat in ("none", "dots"):
        return 0.0
    down = layers(shape, tokens, lora)[-1]
    unneeded = 0.0 if lora is None else down.dense + down.b
    return block - unneeded - (sum(attentions(shape, tokens).values()) if remat == "attention" else 0.0)


# ---- the record


def inputs(x: Any, sigma: Any, conditioning: Any) -> tuple[Any, ...]:
    """The network is fed sigma itself."""
    return x, jnp.broadcast_to(sigma, x.shape[:1]), conditioning.context


def latent_shape(shape: RopeShape, size: tuple[int, int]) -> LatentShape:
    return *size, shape.channels


ROPE = Backbone(
    name="rope",
    presets=PRESETS,
    module=RopeDiT,
    build=RopeDiT,
    inputs=inputs,
    latent_shape=latent_shape,
    encoded=lambda shape, length: ((length, shape.text_dim), None),
    targets=TARGETS,
    flops=flops,
    tokens=lambda shape, latent, text: Tokens(latent[0] * latent[1] // shape.patch_size**2, text),
    rules=(("gated", "tensor"),),
)


# ---- its world


def encode(prompts: Sequence[str]) -> Conditioning:
    """Numbers that a prompt's text seeds; the empty prompt is zeros."""
    size = TEXT, PRESETS[PRESET].text_dim
    rows = [
        np.random.default_rng(zlib.crc32(prompt.encode())).normal(size=size) if prompt else np.zeros(size)
        for prompt in prompts
    ]
    return Conditioning(np.stack(rows).astype(np.float32), None)


def make_world() -> World:
    """Two tasks without meaning: how bright the first and the last channel are."""

    def brightness(images: np.ndarray, prompts: Any, metadata: Any, channel: int) -> Scores:
        return collect([(float(image[..., channel].mean()), {}) for image in images])

    channels = {"red": 0, "blue": 2}
    tasks = {
        name: Task(name, tuple(f"{name} {i}" for i in range(8)), tuple(f"{name} {i}" for i in range(8, 12)), (name,))
        for name in channels
    }
    rewards = {
        name: Reward(name, functools.partial(brightness, channel=channel), (0.0, 255.0), "host")
        for name, channel in channels.items()
    }
    return World((SIDE, SIDE, 3), tasks, encode, lambda latents: np.clip(latents, -1, 1), rewards=rewards)


def install(patch: pytest.MonkeyPatch) -> None:
    """Make family and world known until the patch is undone."""
    patch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    patch.setattr(sharding, "_known", dict(sharding._known))
    registry.register(ROPE)
    patch.setitem(EMBEDDED, PRESET, make_world)
