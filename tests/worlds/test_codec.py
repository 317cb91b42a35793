"""The autoencoder of a converted folder: posterior samples by row, whatever the batch; what it decodes, it encoded."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fopd_jax.config.learning import Decoding
from fopd_jax.config.schema import MeshShape
from fopd_jax.interop.files.converted import load_sharded, read_manifest
from fopd_jax.models.autoencoder import Autoencoder
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.worlds.codec import POSTERIOR, Codec

SIDE, SEED, STEP = 32, 5, 7


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshShape())


@pytest.fixture(scope="module")
def codec(converted_pipeline: Path, mesh: Mesh) -> Codec:
    return Codec(converted_pipeline, read_manifest(converted_pipeline), mesh)


def _images(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, SIDE, SIDE, 3)).astype(np.float32)


def _draws(rows: list[int], step: int = STEP) -> np.ndarray:
    return np.asarray([(SEED, step, row) for row in rows], np.uint32)


def test_latents_are_the_posteriors_samples_in_the_flows_units(codec: Codec, converted_pipeline: Path, mesh: Mesh):
    network, images = Autoencoder(read_manifest(converted_pipeline).component("vae").config), _images(2)
    boxed = jax.eval_shape(network.init, jax.random.key(0), jnp.asarray(images))["params"]
    params = load_sharded(converted_pipeline, "vae", boxed, jnp.float32, mesh)
    mean, log_variance = jax.jit(lambda p, x: network.apply({"params": p}, x, method="encode"))(params, images)
    found = codec.encode(images, _draws([3, 4]))
    assert (found.shape, found.dtype) == ((2, SIDE // 8, SIDE // 8, 16), np.float32)
    key = jax.random.key(SEED)
    for data in (STEP, POSTERIOR, 4):
        key = jax.random.fold_in(key, data)
    noise = jax.random.normal(key, (1, *found.shape[1:]))[0]
    expected = mean[1] + jnp.exp(log_variance[1] / 2) * noise
    np.testing.assert_allclose(found[1], expected, rtol=0, atol=1e-5)
    assert np.abs(found[1] - mean[1]).max() > 1e-3  # it is a sample


def test_a_row_depends_on_its_image_and_its_number_alone(codec: Codec):
    images = _images(3)
    whole = codec.encode(images, _draws([0, 1, 2]))
    np.testing.assert_array_equal(codec.encode(images[2:], _draws([2])), whole[2:])
    assert np.abs(codec.encode(images[2:], _draws([1])) - whole[2:]).max() > 0
    assert np.abs(codec.encode(images[2:], _draws([2], STEP + 1)) - whole[2:]).max() > 0


def test_latents_become_images_again(codec: Codec):
    latents = codec.encode(_images(3), _draws([0, 1, 2]))
    found = codec.decode(latents)
    assert found.shape == (3, SIDE, SIDE, 3)
    np.testing.assert_array_equal(codec.decode(latents[1:2]), found[1:2])


def test_programs_decode_the_same_with_the_decoders_weights_alone(codec: Codec, mesh: Mesh):
    latents = codec.encode(_images(2), _draws([0, 1]))
    params = codec.decoder.params()
    found = jax.jit(codec.decoder.make(Decoding(), mesh))(params, latents)
    np.testing.assert_allclose(found, codec.decode(latents), rtol=0, atol=1e-5)
    assert list(params) == ["decoder"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, codec.decoder.shapes())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
