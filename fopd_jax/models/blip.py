"""BLIP (Li et al. 2022, arXiv 2201.12086): a picture's ViT and a BERT that attends to it, for ImageReward and VQA.

transformers' `BlipVisionModel`, `BlipTextModel` and `BlipForQuestionAnswering` are the oracles of the tests, and
parameters are named after them. Einsum letters: B batch, T image tokens, S text tokens, N heads, H head dimension.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from fopd_jax.models.clip import LayerNorm, dense

Dtype = Any


@dataclasses.dataclass(frozen=True)
class BLIPVisionConfig:
    """Shape of the picture's tower: ViT-B/16 in VQA, ViT-L/16 in ImageReward."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    image_size: int
    patch_size: int
    layer_norm_eps: float


@dataclasses.dataclass(frozen=True)
class BLIPTextConfig:
    """Shape of a text's tower, BERT-base with cross-attention to states of width `encoder_width`."""

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    max_length: int
    encoder_width: int
    layer_norm_eps: float


@dataclasses.dataclass(frozen=True)
class BLIPConfig:
    """A picture's and a text's tower; VQA's decoder reads the question's states in place of the picture's."""

    vision: BLIPVisionConfig
    text: BLIPTextConfig


def _attend(q: Array, k: Array, v: Array, num_heads: int, mask: Bool[Array, "b 1 s t"] | None) -> Array:
    """Softmax attention in float32 over heads that lie side by side in the last axis."""
    q, k, v = (rearrange(y, "B S (N H) -> B S N H", N=num_heads) for y in (q, k, v))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes bfloat16 and float32 inside
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
    return rearrange(y, "B S N H -> B S (N H)")


# ---- the picture's tower


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with fused q, k, v and exact GELU."""

    config: BLIPVisionConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], None]:
        config, dtype = self.config, self.dtype
        x = nn.spmd.with_logical_constraint(x, ("batch", None, None))
        y = LayerNorm(config.layer_norm_eps, dtype, name="layer_norm1")(x)
        qkv = dense(3 * config.width, ("embed", "heads"), dtype, "qkv")(y)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        y = _attend(q, k, v, config.num_heads, None)
        x = x + dense(config.width, ("heads", "embed"), dtype, "projection")(y)
        y = LayerNorm(config.layer_norm_eps, dtype, name="layer_norm2")(x)
        y = nn.gelu(dense(config.mlp_dim, ("embed", "mlp"), dtype, "fc1")(y), approximate=False)
        return x + dense(config.width, ("mlp", "embed"), dtype, "fc2")(y), None


class BLIPVision(nn.Module):
    """Normalised pictures → states of the class token and of every patch, after the last norm."""

    config: BLIPVisionConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        """Raises ValueError where the pictures are of another size than the positions."""
        config, dtype, patch = self.config, self.dtype, self.config.patch_size
        if images.shape[1:3] != (config.image_size,) * 2:
            raise ValueError(f"pictures of {images.shape[1:3]} pixels, expected {config.image_size} a side")
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, None, "embed"))
        x = nn.Conv(
            config.width, (patch, patch), (patch, patch), "VALID", dtype=dtype, kernel_init=kernel,
            name="patch_embedding",
        )(images)  # fmt: skip
        x = rearrange(x, "B H W D -> B (H W) D")
        row = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, "embed"))
        first: Any = self.param("class_embedding", row, (1, 1, config.width))
        positions: Any = self.param("position_embedding", row, (1, x.shape[1] + 1, config.width))
        x = jnp.concatenate([jnp.broadcast_to(first.astype(dtype), (len(x), 1, config.width)), x], axis=1)
        x, _ = nn.scan(
            VisionLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, dtype, name="layers")(x + positions.astype(dtype))
        return LayerNorm(config.layer_norm_eps, dtype, name="post_layernorm")(x)


# ---- the text's tower


class TextAttention(nn.Module):
    """Attention of `x` to `states`, projected, added and normed after."""

    config: BLIPTextConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], states: Float[Array, "b t e"], mask: Bool[Array, "b 1 #s t"] | None
    ) -> Float[Array, "b s d"]:
        config, dtype, axes = self.config, self.dtype, ("embed", "heads")
        q = dense(config.width, axes, dtype, "query")(x)
        k, v = (dense(config.width, axes, dtype, name)(states) for name in ("key", "value"))
        y = dense(config.width, ("heads", "embed"), dtype, "output")(_attend(q, k, v, config.num_heads, mask))
        return LayerNorm(config.layer_norm_eps, dtype, name="norm")(x + y)


class TextLayer(nn.Module):
    """Post-norm transformer layer: attention to the text, to the encoder's states, two dense layers."""

    config: BLIPTextConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Bool[Array, "b 1 s s"],
        states: Float[Array, "b t e"],
        states_mask: Bool[Array, "b 1 1 t"] | None,
    ) -> tuple[Float[Array, "b s d"], None]:
        config, dtype = self.config, self.dtype
        x = nn.spmd.with_logical_constraint(x, ("batch", None, None))
        x = TextAttention(config, dtype, name="attention")(x, x, mask)
        x = TextAttention(config, dtype, name="crossattention")(x, states, states_mask)
        y = nn.gelu(dense(config.mlp_dim, ("embed", "mlp"), dtype, "intermediate")(x), approximate=False)
        y = dense(config.width, ("mlp", "embed"), dtype, "output")(y)
        return LayerNorm(config.layer_norm_eps, dtype, name="norm")(x + y), None


class BLIPText(nn.Module):
    """Texts that attend to an encoder's states: ids → last states; `causal` in VQA's decoder."""

    config: BLIPTextConfig
    causal: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b s"],
        mask: Bool[Array, "b s"],
        states: Float[Array, "b t e"],
        states_mask: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b s d"]:
        """`mask` and `states_mask` are true where there is something to attend to.

        Raises:
          ValueError: the texts are longer than the positions.
        """
        config, dtype, length = self.config, self.dtype, ids.shape[1]
        if length > config.max_length:
            raise ValueError(f"texts of {length} tokens exceed the {config.max_length} positions of BLIP")
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        words = nn.Embed(config.vocab_size, config.width, dtype=dtype, embedding_init=init, name="word_embeddings")
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        places = nn.Embed(config.max_length, config.width, dtype=dtype, embedding_init=init, name="position_embeddings")
        x = words(ids) + places(jnp.arange(length))[None]
        x = LayerNorm(config.layer_norm_eps, dtype, name="norm")(x)
        seen = jnp.broadcast_to(mask[:, None, None, :], (len(ids), 1, length, length))
        if self.causal:
            seen = seen & jnp.tril(jnp.ones((1, 1, length, length), bool))
        others = None if states_mask is None else states_mask[:, None, None, :]
        x, _ = nn.scan(
            TextLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, dtype, name="layers")(x, seen, states, others)
        return x


# ---- what is asked of them


class ImageReward(nn.Module):
    """ImageReward (Xu et al. 2023, arXiv 2304.05977): how well people like a picture for a text, not standardised."""

    config: BLIPConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.vision = BLIPVision(self.config.vision, self.dtype)
        self.text = BLIPText(self.config.text, dtype=self.dtype)
        # five dense layers without activations between, folded into one when weights are converted
        self.head = nn.Dense(1, dtype=jnp.float32)

    def __call__(
        self, images: Float[Array, "b h w 3"], ids: Int[Array, "b s"], mask: Bool[Array, "b s"]
    ) -> Float[Array, " b"]:
        states = self.text(ids, mask, self.vision(images))
        return self.head(states[:, 0].astype(jnp.float32))[:, 0]


class BLIPVQA(nn.Module):
    """Visual question answering: what an answer's first token may be, as log-probabilities over the vocabulary."""

    config: BLIPConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        text = self.config.text
        self.vision = BLIPVision(self.config.vision, self.dtype)
        self.question = BLIPText(text, dtype=self.dtype)
        # the decoder reads states of the question's own width
        self.answer = BLIPText(dataclasses.replace(text, encoder_width=text.width), causal=True, dtype=self.dtype)
        self.transform = nn.Dense(text.width, dtype=jnp.float32)
        self.transform_norm = LayerNorm(text.layer_norm_eps)
        self.decoder = nn.Dense(text.vocab_size, dtype=jnp.float32)

    def __call__(
        self, images: Float[Array, "b h w 3"], ids: Int[Array, "b q s"], mask: Bool[Array, "b q s"], start: int
    ) -> Float[Array, "b q v"]:
        """Some questions about each picture, which is seen once; `start` is the token that an answer begins with."""
        count, each, _ = ids.shape
        states = jnp.repeat(self.vision(images), each, axis=0)
        ids, mask = (rearrange(rows, "B Q S -> (B Q) S") for rows in (ids, mask))
        question = self.question(ids, mask, states)
        first = jnp.full((len(ids), 1), start, ids.dtype)
        answer = self.answer(first, jnp.ones_like(first, bool), question, mask)[:, 0]
        hidden = nn.gelu(self.transform(answer.astype(jnp.float32)), approximate=False)
        words = nn.log_softmax(self.decoder(self.transform_norm(hidden)))
        return rearrange(words, "(B Q) V -> B Q V", B=count)
