"""Decoders within a program: the host's own images, whatever is decoded at once, without the encoder's weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fopd_jax.config.learning import Decoding
from fopd_jax.config.schema import MeshShape
from fopd_jax.interop.files.converted import read_manifest
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.worlds.codec import Codec
from fopd_jax.worlds.decoder import autoencoder_decoder, pixels_as_latents

COUNT, SIDE = 5, 4


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshShape())


@pytest.fixture(scope="module")
def codec(converted_pipeline: Path, mesh: Mesh) -> Codec:
    return Codec(converted_pipeline, read_manifest(converted_pipeline), mesh)


@pytest.fixture(scope="module")
def latents() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, SIDE, SIDE, 16), np.float32)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_images_are_the_hosts_however_many_at_once(codec: Codec, latents: np.ndarray, mesh: Mesh, batch_size: int):
    decode = jax.jit(codec.decoder.make(Decoding(batch_size=batch_size), mesh))
    found = decode(codec.decoder.params(), latents)
    assert (found.shape, found.dtype) == ((COUNT, 8 * SIDE, 8 * SIDE, 3), jnp.float32)
    np.testing.assert_allclose(found, codec.decode(latents), rtol=0, atol=1e-5)


def test_bfloat16_is_another_computation_and_near(codec: Codec, latents: np.ndarray, mesh: Mesh):
    """Of images in [-1, 1], about thirty roundings of 2⁻⁹: a level or two of 256."""
    decode = jax.jit(codec.decoder.make(Decoding(batch_size=8, dtype="bfloat16"), mesh))
    found, exact = decode(codec.decoder.params(), latents), codec.decode(latents)
    assert found.dtype == jnp.float32
    assert 1e-4 < np.abs(found - exact).mean() < 0.02 * np.abs(exact).max()


def test_its_weights_are_the_decoders_alone_and_known_without_files(codec: Codec, converted_pipeline: Path):
    params, shapes = codec.decoder.params(), codec.decoder.shapes()
    assert list(params) == ["decoder"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    config = read_manifest(converted_pipeline).component("vae").config
    without = autoencoder_decoder(config, dict).shapes()
    assert jax.tree.map(jnp.shape, without) == jax.tree.map(jnp.shape, shapes)


def test_pixels_are_their_own_images(mesh: Mesh):
    decoder, pixels = pixels_as_latents(), jnp.ones((3, 4, 4, 3))
    np.testing.assert_array_equal(decoder.make(Decoding(batch_size=2), mesh)(decoder.params(), pixels), pixels)
