"""The layer of coordinates: silent where it starts, and what it adds against float64."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.backbones.sd3.flops import coordinates_backward, forward_flops, pass_flops
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.models.coordinates import LAYER, Coordinates
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from tests.performance.test_flops import MEDIUM, SHALLOW, TOKENS, _counted

TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=1, qk_norm=True, patch_size=2, channels=3,
    context_dim=6, pooled_dim=8, table_size=4, base_size=4,
)  # fmt: skip
LATENT, BATCH, SKILLS, RANK = (4, 4, 3), 3, 2, 5


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@functools.cache
def variables() -> Any:
    leaves, structure = jax.tree.flatten(nn.unbox(boxed_variables(MMDiT(TINY), LATENT)))
    return jax.tree.unflatten(structure, [0.3 * normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])


def layer(b: float = 1.0) -> dict[str, np.ndarray]:
    return {"a": normal(1, SKILLS, RANK), "b": b * normal(2, RANK, TINY.width)}


@functools.cache
def velocity() -> Any:
    inputs = normal(3, BATCH, *LATENT), np.full(BATCH, 700.0, np.float32), normal(4, BATCH, 4, 6), normal(5, BATCH, 8)
    inputs = tuple(map(jnp.asarray, inputs))
    return jax.jit(lambda adapter: MMDiT(TINY).apply({**variables(), "adapter": adapter}, *inputs))


def test_a_fresh_layer_changes_no_bit_of_a_velocity():
    plain = np.asarray(velocity()({}))
    for at in ({}, {"at": np.asarray([0.3, 1.5], np.float32)}, {"at": normal(6, BATCH, SKILLS)}):
        np.testing.assert_array_equal(velocity()({LAYER: layer(b=0.0) | at}), plain)


def test_coordinates_are_of_all_samples_or_of_each_and_1_where_nobody_chose_them():
    same = [np.asarray(velocity()({LAYER: layer() | at})) for at in ({}, {"at": np.ones(SKILLS, np.float32)})]
    np.testing.assert_allclose(*same, rtol=1e-6, atol=1e-6)
    each = normal(7, BATCH, SKILLS)
    found = np.asarray(velocity()({LAYER: layer() | {"at": each}}))
    for i, at in enumerate(each):
        alone = np.asarray(velocity()({LAYER: layer() | {"at": at}}))[i]
        np.testing.assert_allclose(found[i], alone, rtol=1e-5, atol=1e-5)
    assert np.abs(found - same[0]).max() > 0.01


def test_it_is_silu_of_c_a_times_b():
    embedding, at, own = jnp.asarray(normal(8, BATCH, TINY.width)), np.float64(normal(9, BATCH, SKILLS)), layer()
    found = Coordinates().apply({"adapter": own | {"at": np.float32(at)}}, embedding)
    hidden = at @ own["a"]
    expected = np.float64(embedding) + (hidden / (1 + np.exp(-hidden))) @ np.float64(own["b"])
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-5)
    silent = Coordinates().apply({"adapter": own | {"at": jnp.zeros(SKILLS)}}, embedding)
    np.testing.assert_array_equal(np.asarray(silent), embedding)


def test_its_backward_is_counted():
    """XLA's count, with and without; the layer itself is below a thousandth of a percent of a forward."""
    lora = LoRAConfig()

    def wrap(total: Any) -> Any:
        def with_layer(own: Any, params: Any, adapter: Any, *rest: Any) -> Any:
            return total(params, {**adapter, LAYER: own}, *rest)

        def gradient(params: Any, adapter: Any, *rest: Any) -> Any:
            own = {"a": jnp.ones((3, 32)), "b": jnp.ones((32, SHALLOW.width))}
            both = lambda trained: with_layer(trained[0], params, trained[1], *rest)  # noqa: E731
            return jax.value_and_grad(both)((own, adapter))

        return gradient

    each = pass_flops(SHALLOW, TOKENS, lora, "none")
    expected = each.forward + each.backward + coordinates_backward(SHALLOW, TOKENS, lora)
    assert expected == pytest.approx(_counted("none", lora, wrap), rel=0.005)
    assert 2 * (3 * 32 + 32 * MEDIUM.width) < 1e-5 * forward_flops(MEDIUM, TOKENS)
