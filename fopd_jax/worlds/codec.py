"""The autoencoder of a converted folder, on the devices of a mesh: images ↔ flow latents."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt32

from fopd_jax.config.learning import Decoding
from fopd_jax.interop.files.converted import Manifest, load_sharded
from fopd_jax.models.autoencoder import Autoencoder, sample_posterior
from fopd_jax.parallel.parts import in_parts
from fopd_jax.worlds.decoder import autoencoder_decoder

POSTERIOR = 2**32 - 3  # what a step's key is folded with for draws of latents, apart from the step's own
Tree = Any


class Codec:
    """One image a device at a time: what a larger batch gains, its activations cost in memory.

    Weights are loaded when they are first needed, and stay. `decoder` is for programs that decode by themselves.
    """

    def __init__(self, folder: Path, manifest: Manifest, mesh: Mesh) -> None:
        self._folder, self._mesh = folder, mesh
        self._network = Autoencoder(manifest.component("vae").config)
        self.decoder = autoencoder_decoder(self._network.config, lambda: self._params)
        self._decode = jax.jit(self.decoder.make(Decoding(batch_size=1), mesh))

    def decode(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n height width 3"]:
        """Latents → images in about [-1, 1]."""
        params = self.decoder.params()
        return in_parts(lambda rows: self._decode(params, rows), latents, self._mesh)

    def encode(
        self, images: Float[np.ndarray, "n height width 3"], draws: UInt32[np.ndarray, "n 3"]
    ) -> Float[np.ndarray, "n h w c"]:
        """Images in [-1, 1] → one sample of each one's posterior, as SD3's trainers take; `draws`: seed, step, row."""
        return in_parts(lambda rows: self._encoder(self._params, *rows), (images, draws), self._mesh)

    @functools.cached_property
    def _params(self) -> Tree:
        side = self._network.config.downsampling
        boxed = jax.eval_shape(self._network.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
        return load_sharded(self._folder, "vae", boxed, jnp.float32, self._mesh)

    @functools.cached_property
    def _encoder(self) -> Callable[..., Array]:
        def encode(params: Tree, images: Array, draws: Array) -> Array:
            mean, log_variance = self._network.apply({"params": params}, images, method="encode")
            return jax.vmap(lambda draw, *row: sample_posterior(_key(draw), *(each[None] for each in row))[0])(
                draws, mean, log_variance
            )

        return jax.jit(encode)


def _key(draw: UInt32[Array, " 3"]) -> Array:
    """The key of one row: a function of (seed, step, row) alone."""
    step = jax.random.fold_in(jax.random.key(draw[0]), draw[1])
    return jax.random.fold_in(jax.random.fold_in(step, POSTERIOR), draw[2])
