"""Decoders within a program: the whole batch's images, whatever is decoded at once."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fopd_jax.config.learning import Decoding
from fopd_jax.config.schema import MeshShape
from fopd_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.worlds.decoder import Decoder, autoencoder_decoder, pixels_as_latents

VAE = AutoencoderConfig((4, 8), 1, 4, 3, 2, 1.5, 0.1)
COUNT, SIDE = 5, 6


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshShape())


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    params: Any = nn.unbox(Autoencoder(VAE).init(jax.random.key(0), jnp.zeros((1, 2, 2, 3))))["params"]
    return autoencoder_decoder(VAE, lambda: params)


@pytest.fixture(scope="module")
def latents() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, SIDE, SIDE, 4), np.float32)


@pytest.fixture(scope="module")
def whole(decoder: Decoder, latents: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda params, rows: decoder.apply(params, rows, "float32"))(decoder.params(), latents))


def test_images_are_the_same_however_many_at_once(decoder: Decoder, latents: np.ndarray, whole: np.ndarray, mesh: Mesh):
    found = jax.jit(decoder.make(Decoding(batch_size=2), mesh))(decoder.params(), latents)
    assert (found.shape, found.dtype) == ((COUNT, 2 * SIDE, 2 * SIDE, 3), jnp.float32)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)


def test_bfloat16_is_another_computation_and_near(decoder: Decoder, latents: np.ndarray, whole: np.ndarray, mesh: Mesh):
    """About twenty roundings of 2⁻⁹ one after the other, as a random walk: 1%; twice that is allowed."""
    found = jax.jit(decoder.make(Decoding(batch_size=8, dtype="bfloat16"), mesh))(decoder.params(), latents)
    assert found.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(found - whole) / np.linalg.norm(whole) < 0.02


def test_its_weights_are_the_decoders_alone_and_known_without_files(decoder: Decoder):
    params, shapes = decoder.params(), autoencoder_decoder(VAE, dict).shapes()
    assert list(params) == ["decoder"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_pixels_are_their_own_images(mesh: Mesh):
    decoder, pixels = pixels_as_latents(), jnp.ones((3, 4, 4, 3))
    np.testing.assert_array_equal(decoder.make(Decoding(batch_size=2), mesh)(decoder.params(), pixels), pixels)
