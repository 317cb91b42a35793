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
    """Encoded prompts: `context [B, S, context_dim]` per token (padding included: it is attended), `pooled [B, P]`."""

    context: Any  # float arrays, numpy or jax; Any because tree operations put anything into a leaf
    pooled: Any


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """One text network: `apply(params, ids)` with its parameters and tokenizer."""

    apply: Callable[..., Any]
    params: Tree
    tokenize: Tokenize


def join(
    clip: Sequence[tuple[Float[Array, "b s _"], Float[Array, "b _"]]],
    t5: Float[Array, "b t c"] | None,
    t5_length: int,
    context_dim: int,
) -> Conditioning:
    """Join the towers' (states, pooled) and T5's states; without T5 its place is zeros, as in diffusers."""
    states = jnp.concatenate([each for each, _ in clip], axis=-1)
    states = jnp.pad(states, ((0, 0), (0, 0), (0, context_dim - states.shape[-1])))
    if t5 is None:
        t5 = jnp.zeros((states.shape[0], t5_length, context_dim), states.dtype)
    context = jnp.concatenate([states, t5.astype(states.dtype)], axis=1)
    return Conditioning(context, jnp.concatenate([pooled for _, pooled in clip], axis=-1))


class PromptEncoder:
    """Text encoders behind one jitted program of a fixed batch size; a short batch is filled up, its surplus dropped.

    `clip`: the towers in the order in which they are joined. `sharding`: of the batch of ids.
    """

    def __init__(
        self,
        clip: Sequence[TextEncoder],
        t5: TextEncoder | None,
        *,
        t5_length: int,
        context_dim: int,
        batch_size: int,
        sharding: jax.sharding.Sharding | None = None,
    ) -> None:
        self._encoders = (*clip, *(() if t5 is None else (t5,)))
        self._params = tuple(encoder.params for encoder in self._encoders)
        self._batch_size, self._sharding = batch_size, sharding

        def encode(params: tuple[Tree, ...], ids: tuple[Array, ...]) -> Conditioning:
            outputs = [each.apply(p, i) for each, p, i in zip(self._encoders, params, ids, strict=True)]
            return join(outputs[: len(clip)], None if t5 is None else outputs[-1], t5_length, context_dim)

        self._encode = jax.jit(encode)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; arrays on the host, in the dtype in which the encoders compute."""
        parts = []
        for start in range(0, len(prompts), self._batch_size):
            batch = list(prompts[start : start + self._batch_size])
            filled = batch + [""] * (self._batch_size - len(batch))
            ids = tuple(encoder.tokenize(filled) for encoder in self._encoders)
            parts.append(jax.device_get(self._encode(self._params, jax.device_put(ids, self._sharding))))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(prompts)], *parts)
