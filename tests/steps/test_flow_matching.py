"""The update of flow matching against its definition: the gradient of the mean loss, on one device and without groups.

Tolerance 1e-6 on ‖a - b‖/‖b‖, float32: sums are taken in another order, nothing else differs.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from fopd_jax.adapters.lora import adapter_shapes, effective
from fopd_jax.backbones.weights import init_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import EMA, LogitNormal, LoRAConfig, MeshShape
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from fopd_jax.objectives.flow_matching import flow_matching, interpolate, sample_levels
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.policy.velocity import make_velocity
from fopd_jax.steps.flow_matching import METRICS, make_flow_matching_step
from fopd_jax.steps.state import init_state
from fopd_jax.steps.student import ADAPTER, network

TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=1, qk_norm=True, patch_size=2, channels=3,
    context_dim=6, pooled_dim=8, table_size=4, base_size=4,
)  # fmt: skip
LATENT, BATCH, RATE, SEED, LIMIT = (4, 4, 3), 6, 0.5, 3, 1e-6
LEVELS, AVERAGE = LogitNormal(), EMA(decay=0.9, every=1)
VELOCITY = make_velocity(MMDiT(TINY))


def _noisy(tree: Any) -> Any:
    """A fresh network's gates are zero, and a fresh adapter's second factors."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    noisy = [np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, noisy)


@pytest.fixture(scope="module")
def variables() -> Any:
    return _noisy(nn.unbox(jax.jit(lambda: init_variables(MMDiT(TINY), LATENT, 0))()))


def _batch(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = (BATCH, *LATENT), (BATCH, 5, 6), (BATCH, 8)
    x0, context, pooled = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return {"x0": x0, "conditioning": Conditioning(context, pooled)}


def _start(trained: str, variables: Any) -> tuple[Any, Any, Any]:
    """What is frozen, what trains, and how it is read."""
    if trained == "params":
        return {"constants": variables["constants"]}, variables["params"], network(jnp.float32)
    shapes = adapter_shapes(LoRAConfig(2, 4.0), variables["params"], TARGETS)
    return variables, _noisy(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)), ADAPTER


def _mean_loss(trained: Any, frozen: Any, student: Any, batch: Any) -> jax.Array:
    """Rectified-flow matching at the step's own noise and levels, its mean over the batch, written down directly."""
    noise_key, level_key = jax.random.split(jax.random.fold_in(jax.random.key(SEED), 0))
    noise = jax.random.normal(noise_key, batch["x0"].shape)
    sigma = sample_levels(LEVELS, level_key, BATCH)
    params, adapter = (trained, {}) if student is not ADAPTER else (frozen["params"], effective(trained))
    x = interpolate(batch["x0"], noise, sigma)
    v = VELOCITY({"params": params, "constants": frozen["constants"]}, adapter, x, sigma, batch["conditioning"])
    return flow_matching(v, batch["x0"], noise).mean()


def _state(start: Any, optimizer: Any) -> Any:
    return jax.jit(lambda tree: init_state(tree, optimizer, SEED))(start)


def _step(student: Any, optimizer: Any, **target: str) -> Any:
    groups = GradientGroups(make_mesh(MeshShape(), jax.devices()[:1]), ("data", "fsdp"), PartitionSpec())
    return make_flow_matching_step(VELOCITY, student, groups, LEVELS, optimizer, AVERAGE, **target)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("trained", ["adapter", "params"])
def test_an_update_is_that_of_the_mean_losss_gradient(trained: str, variables: Any):
    frozen, start, student = _start(trained, variables)
    optimizer, batch = optax.sgd(RATE), _batch()
    state = _state(start, optimizer)
    loss, gradient = jax.jit(jax.value_and_grad(_mean_loss), static_argnums=2)(start, frozen, student, batch)
    after, metrics = _step(student, optimizer)(frozen, state, batch)
    assert abs(float(metrics["loss"]) / float(loss) - 1) < LIMIT
    assert abs(float(metrics["grad_norm"]) / np.linalg.norm(_flat(gradient)) - 1) < LIMIT
    moved, expected = (_flat(start) - _flat(after.trained)) / RATE, _flat(gradient)
    assert np.linalg.norm(moved - expected) / np.linalg.norm(expected) < 1e-5  # parameters of order 1 are rounded, too
    np.testing.assert_allclose(np.mean(metrics["samples/loss"]), loss, rtol=LIMIT)
    assert metrics["samples/loss"].shape == (BATCH,)
    assert metrics.keys() == {*METRICS, "samples/loss"}
    assert int(after.step) == 1
    assert float(metrics["skipped"]) == 0


@pytest.mark.parametrize("trained", ["adapter", "params"])
def test_teachers_velocities_are_regressed_on_at_their_states(trained: str, variables: Any):
    frozen, start, student = _start(trained, variables)
    optimizer, rng = optax.sgd(RATE), np.random.default_rng(7)
    x, v = (jnp.asarray(rng.normal(size=(BATCH, *LATENT)), jnp.float32) for _ in range(2))
    sigma = jnp.linspace(0.1, 1, BATCH)
    conditioning = jax.tree.map(jnp.asarray, _batch()["conditioning"])
    batch = {"x": x, "v": v, "sigma": sigma, "conditioning": conditioning}

    def mean(trained: Any) -> jax.Array:
        params, adapter = (trained, {}) if student is not ADAPTER else (frozen["params"], effective(trained))
        whole = {"params": params, "constants": jax.tree.map(jnp.asarray, frozen["constants"])}
        return jnp.square(VELOCITY(whole, adapter, x, sigma, conditioning) - v).mean()

    loss, gradient = jax.jit(jax.value_and_grad(mean))(start)
    after, metrics = _step(student, optimizer, target="velocity")(frozen, _state(start, optimizer), batch)
    assert abs(float(metrics["loss"]) / float(loss) - 1) < LIMIT
    assert abs(float(metrics["grad_norm"]) / np.linalg.norm(_flat(gradient)) - 1) < LIMIT
    moved, expected = (_flat(start) - _flat(after.trained)) / RATE, _flat(gradient)
    assert np.linalg.norm(moved - expected) / np.linalg.norm(expected) < 1e-5
    assert metrics.keys() == {*METRICS, "samples/loss"}


def test_what_is_not_finite_does_not_land(variables: Any):
    frozen, start, student = _start("adapter", variables)
    batch = _batch()
    batch["x0"][2] = np.nan
    optimizer = optax.sgd(RATE)
    after, metrics = _step(student, optimizer)(frozen, _state(start, optimizer), batch)
    assert float(metrics["skipped"]) == 1
    assert np.isnan(metrics["samples/loss"]).tolist() == [False, False, True, False, False, False]
    for tree in (after.trained, after.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, start)
    assert int(after.step) == 1
