"""From latents to images within a traced program, some of them at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fopd_jax.config.learning import Decoding
from fopd_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from fopd_jax.parallel.parts import in_chunks
from fopd_jax.parallel.sharding import AnyMesh

Tree = Any
Decode = Callable[[Tree, Float[Array, "b h w c"]], Float[Array, "b height width 3"]]
"""`(params, latents) → images` in about [-1, 1], float32; pure, each image a function of its own latents."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A world's decoder. `apply(params, latents, dtype)`: a whole batch at once, computed in `dtype`.

    `params()`: its weights in float32, whole on each of this process's devices, loaded when they are first asked for;
    a program over the devices of several has them put there (`distributed.spread`). `shapes()`: the same as shapes.
    """

    apply: Callable[[Tree, Float[Array, "b h w c"], str], Float[Array, "b height width 3"]]
    params: Callable[[], Tree] = dict
    shapes: Callable[[], Tree] = dict

    def make(self, how: Decoding, mesh: AnyMesh) -> Decode:
        """The decoder for batches that are split over `mesh`: each device decodes its own, `how.batch_size` at once."""

        def decode(params: Tree, latents: Float[Array, "b h w c"]) -> Float[Array, "b height width 3"]:
            return in_chunks(lambda rows: self.apply(params, rows, how.dtype), latents, mesh, how.batch_size)

        return decode


def pixels_as_latents() -> Decoder:
    """Of worlds whose latents are images already."""
    return Decoder(lambda params, latents, dtype: latents)


def autoencoder_decoder(config: AutoencoderConfig, params: Callable[[], Tree]) -> Decoder:
    """An autoencoder's; of `params()` the encoder is left out."""

    def apply(params: Tree, latents: Float[Array, "b h w c"], dtype: str) -> Float[Array, "b height width 3"]:
        images: Any = Autoencoder(config, jnp.dtype(dtype)).apply({"params": params}, latents, method="decode")
        return images

    def shapes() -> Tree:
        latents = jnp.zeros((1, 1, 1, config.latent_channels))
        network = Autoencoder(config)
        return nn.unbox(jax.eval_shape(lambda: network.init(jax.random.key(0), latents, method="decode")))["params"]

    return Decoder(apply, lambda: {"decoder": params()["decoder"]}, shapes)
