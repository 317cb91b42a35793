"""Text encoders that stay on the devices and encode each batch's prompts beside the step: nothing is kept.

A batch travels to the devices as token ids, 4 bytes a token, and is encoded where it lies. The encodings are rounded as
`ConditioningCache` rounds, so that a run may change from one to the other.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from fopd_jax.conditioning.cache import STORED
from fopd_jax.conditioning.encoder import Conditioning, TextEncoders, TokenIds, Tree
from fopd_jax.parallel.mesh import fold_data
from fopd_jax.parallel.sharding import activation_rules, batch_sharding


class ResidentPrompts:
    """Prompts by encoders on `mesh`; `load(mesh)` brings them, split over all its devices, when they are first asked.

    All processes must embed the same batches in the same order.
    """

    def __init__(self, load: Callable[[Mesh], TextEncoders], mesh: Mesh) -> None:
        self._load, self._mesh = load, mesh

    def prepare(self, prompts: Iterable[str]) -> None:
        """Load the encoders; no prompt needs to be known beforehand."""
        _ = self._program

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """None: nothing is encoded beforehand."""
        return []

    def encode(self, prompts: Sequence[str]) -> TokenIds:
        """Ids of prompts `[B, S]`, on the host; each process asks for its own rows."""
        return self._encoders.tokenize(prompts)

    def embed(self, placed: TokenIds) -> Conditioning:
        """The conditioning `[B, …]` of a batch of ids in `batch_sharding(mesh)`, in bfloat16 and in the same places."""
        return self._program(self._encoders.params, placed)

    @functools.cached_property
    def _encoders(self) -> TextEncoders:
        return self._load(fold_data(self._mesh))

    @functools.cached_property
    def _program(self) -> Any:
        return make_encode(self._encoders, self._mesh)


def make_encode(encoders: TextEncoders, mesh: Mesh) -> Any:
    """Jitted `(params, ids) → conditioning` of a batch split over `mesh`, parameters over `fold_data(mesh)`."""

    def encode_prompts(params: tuple[Tree, ...], tokens: TokenIds) -> Conditioning:
        with activation_rules(fold_data(mesh)):
            encoded = encoders.encode(params, tokens)
        return jax.tree.map(lambda leaf: leaf.astype(STORED), encoded)

    return jax.jit(encode_prompts, out_shardings=batch_sharding(mesh))
