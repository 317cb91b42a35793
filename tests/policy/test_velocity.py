"""Binding a network to a velocity, with guidance."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import init_adapter, stack_bank
from fopd_jax.backbones.weights import init_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from fopd_jax.policy.velocity import guided_velocity, make_velocity

Tree = Any
TINY = MMDiTConfig(
    depth=1, num_heads=2, head_dim=8, dual_layers=0, qk_norm=True, patch_size=2, channels=3,
    context_dim=5, pooled_dim=7, table_size=4, base_size=4,
)  # fmt: skip
LATENT, BATCH, TOLERANCE = (4, 4, 3), 3, 1e-5


def _noisy(seed: int, tree: Tree, std: float) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [leaf + std * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noisy)


@functools.cache
def _variables() -> Tree:
    return _noisy(0, jax.jit(lambda: init_variables(MMDiT(TINY), LATENT, 0))(), 0.2)  # one compilation, not many


@functools.cache
def _bank() -> Tree:
    config = LoRAConfig(2, 4.0)
    fresh = [init_adapter(jax.random.key(k), _variables()["params"], config, TARGETS) for k in range(2)]
    return stack_bank({str(k): _noisy(k + 1, adapter, 0.3) for k, adapter in enumerate(fresh)})


def _conditioning(batch: int, seed: int) -> Conditioning:
    keys = jax.random.split(jax.random.key(seed))
    return Conditioning(jax.random.normal(keys[0], (batch, 4, 5)), jax.random.normal(keys[1], (batch, 7)))


X = jax.random.normal(jax.random.key(8), (BATCH, *LATENT))
TEXT, NULL = _conditioning(BATCH, 6), _conditioning(1, 7)
EMPTY = Conditioning(jnp.repeat(NULL.context, BATCH, axis=0), jnp.repeat(NULL.pooled, BATCH, axis=0))
SIGMA = jnp.float32(0.6)
ROUTE = jnp.array([1, 0, 1])

velocity = make_velocity(MMDiT(TINY))


_jitted = jax.jit(velocity)
_jitted_guided = jax.jit(functools.partial(guided_velocity, velocity))


def _plain(adapter: Tree, x: jax.Array, sigma: jax.Array, text: Conditioning, route: jax.Array | None = None) -> Any:
    return _jitted(_variables(), adapter, x, sigma, text, route)


def _guided(adapter: Tree, null: Conditioning | None, scale: Any, route: jax.Array | None) -> Any:
    return _jitted_guided(_variables(), adapter, X, SIGMA, TEXT, null, scale, route)


def _close(found: Any, expected: Any) -> bool:
    found, expected = np.asarray(found), np.asarray(expected)
    return bool(np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected))


def test_the_network_is_fed_a_thousand_sigma():
    expected = jax.jit(MMDiT(TINY).apply)(_variables(), X, jnp.full(BATCH, 600.0), TEXT.context, TEXT.pooled)
    assert _close(_plain({}, X, SIGMA, TEXT), expected)


def test_one_sigma_for_all_equals_the_same_sigma_for_each():
    np.testing.assert_array_equal(_plain({}, X, jnp.full(BATCH, SIGMA), TEXT), _plain({}, X, SIGMA, TEXT))


def test_a_sigma_per_sample_is_each_samples_own():
    sigmas = jnp.array([0.1, 0.5, 0.9])
    together = _plain({}, X, sigmas, TEXT)
    for i in range(BATCH):
        x, text = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (X, TEXT))
        assert _close(together[i : i + 1], _plain({}, x, sigmas[i], text))
        assert not _close(together[i : i + 1], _plain({}, x, SIGMA, text))


def test_without_an_empty_prompt_it_is_the_plain_velocity():
    np.testing.assert_array_equal(_guided(_bank(), None, None, ROUTE), _plain(_bank(), X, SIGMA, TEXT, ROUTE))


@pytest.mark.parametrize("routed", [False, True])
def test_guidance_equals_two_separate_forwards(routed: bool):
    adapter = _bank() if routed else jax.tree.map(lambda leaf: leaf[..., 0, :, :], _bank())
    route = ROUTE if routed else None
    v_text, v_null = (np.asarray(_plain(adapter, X, SIGMA, text, route)) for text in (TEXT, EMPTY))
    assert not _close(v_text, v_null)
    for scale in (4.5, 1.0, 0.0, (0.0, 1.0, 7.0)):
        factor = np.broadcast_to(np.float32(scale), BATCH).reshape(BATCH, 1, 1, 1)
        found = _guided(adapter, NULL, jnp.asarray(scale, jnp.float32), route)
        assert _close(found, v_null + factor * (v_text - v_null))
