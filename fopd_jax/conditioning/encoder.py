"""Prompts → the two text inputs of the network, as Stable Diffusion 3 makes them.

Two CLIP towers and T5 read the prompt. The towers' penultimate states are joined on features and zero-padded to T5's
width, and T5's states follow along the sequence; the towers' projected states at the end of the text, joined, are the
pooled input. No padding is masked anywhere: padded positions are attended and differ from prompt to prompt, so they
are kept.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

Tree = Any
Tokenize = Callable[[Sequence[str]], Int[np.ndarray, "b s"]]
"""Prompts → ids of a fixed length, padded and truncated."""


@struct.dataclass
class Conditioning:
    """Encoded prompts: `context [B, S, context_dim]` per token (padding included: it is attended), `pooled [B, P]`.

    `pooled` is None where the network has no such input. `coordinates [B, K]`: of the skills of an adapter that has
    some (`adapters.coordinates`), where each sample has its own.
    """

    context: Any  # float arrays, numpy or jax; Any because tree operations put anything into a leaf
    pooled: Any
    coordinates: Any = None


@struct.dataclass
class TokenIds:
    """Tokenised prompts: one array of ids `[B, S]` for each text encoder, in their order."""

    ids: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """One text network: `apply(params, ids)` with its parameters (arrays or shapes) and tokenizer."""

    apply: Callable[..., Any]
    params: Tree
    tokenize: Tokenize


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """All text networks of one pipeline: `clip` in the order in which the towers are joined, `t5` where it has one."""

    clip: Sequence[TextEncoder]
    t5: TextEncoder | None
    t5_length: int
    context_dim: int

    @property
    def each(self) -> tuple[TextEncoder, ...]:
        return (*self.clip, *(() if self.t5 is None else (self.t5,)))

    @property
    def params(self) -> tuple[Tree, ...]:
        return tuple(encoder.params for encoder in self.each)

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        return TokenIds(tuple(encoder.tokenize(prompts) for encoder in self.each))

    def encode(self, params: tuple[Tree, ...], tokens: TokenIds) -> Conditioning:
        """The encodings in the dtype in which the networks compute; pure, to be jitted."""
        outputs = [each.apply(p, ids) for each, p, ids in zip(self.each, params, tokens.ids, strict=True)]
        t5 = None if self.t5 is None else outputs[-1]
        return join(outputs[: len(self.clip)], t5, self.t5_length, self.context_dim)


def join(
    clip: Sequence[tuple[Float[Array, "b s _"], Float[Array, "b _"]]],
    t5: Float[Array, "b t c"] | None,
    t5_length: int,
    context_dim: int,
) -> Conditioning:
    """Join the towers' (states, pooled) and T5's states; without T5 its place is zeros, as in diffusers.

    Without towers T5's states are all, and nothing is pooled.

    Raises:
      ValueError: neither reads the prompt.
    """
    if not clip:
        if t5 is None:
            raise ValueError("text encoders: found none, expected CLIP towers or T5")
        return Conditioning(t5, None)
    states = jnp.concatenate([each for each, _ in clip], axis=-1)
    states = jnp.pad(states, ((0, 0), (0, 0), (0, context_dim - states.shape[-1])))
    if t5 is None:
        t5 = jnp.zeros((states.shape[0], t5_length, context_dim), states.dtype)
    context = jnp.concatenate([states, t5.astype(states.dtype)], axis=1)
    return Conditioning(context, jnp.concatenate([pooled for _, pooled in clip], axis=-1))


class PromptEncoder:
    """Text encoders behind one jitted program of a fixed batch size; a short batch is filled up, its surplus dropped.

    `sharding`: of the batch of ids.
    """

    def __init__(self, encoders: TextEncoders, batch_size: int, sharding: jax.sharding.Sharding | None = None) -> None:
        self._encoders, self._batch_size, self._sharding = encoders, batch_size, sharding
        self._encode = jax.jit(encoders.encode)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; arrays on the host, in the dtype in which the encoders compute."""
        parts = []
        for start in range(0, len(prompts), self._batch_size):
            batch = list(prompts[start : start + self._batch_size])
            filled = batch + [""] * (self._batch_size - len(batch))
            placed = jax.device_put(self._encoders.tokenize(filled), self._sharding)
            parts.append(jax.device_get(self._encode(self._encoders.params, placed)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(prompts)], *parts)
