"""Which parameter lives where, pinned; and eight simulated devices computing what one does."""

import json
import os
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from fopd_jax.adapters import LoRAConfig, effective, init_adapter, stack_bank
from fopd_jax.conditioning import Conditioning
from fopd_jax.evaluation.suite import make_sampler, noise_keys
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import SDE
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig
from fopd_jax.objectives.opd import Objective
from fopd_jax.parallel.mesh import AXES, MeshShape, make_mesh
from fopd_jax.parallel.sharding import RULES, batch_sharding, check_batch, parameter_shardings, replicated
from fopd_jax.pipeline import boxed_variables
from fopd_jax.policy import make_velocity
from fopd_jax.tasks.task import World
from fopd_jax.training.opd_step import Batch, Frozen, OPDSpec, OPDStep
from fopd_jax.training.state import EMA, init_state, make_optimizer

TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=0, qk_norm=True, patch_size=2, channels=3,
    context_dim=5, pooled_dim=7, table_size=4, base_size=4,
)  # fmt: skip


def _mesh(data: int, fsdp: int, tensor: int) -> Any:
    """A mesh without devices, which is enough to say where arrays would live."""
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def _specs(config: MMDiTConfig, latent: tuple[int, int, int], mesh: Any) -> dict[str, P]:
    shardings = parameter_shardings(mesh, boxed_variables(MMDiT(config), latent))
    return {path: sharding.spec for path, sharding in flatten_dict(shardings, sep="/").items()}


# ---- the table

UP = {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}  # into heads or hidden features
DOWN = {"kernel": P("tensor", "fsdp"), "bias": P("fsdp")}  # out of them
IN = {"kernel": P(None, "fsdp"), "bias": P("fsdp")}  # from something that is no width of the network
OUT = {"kernel": P("fsdp", None), "bias": P(None)}
NORM = {"scale": P(None)}

ENDS = {
    "patch_embed": IN, "context_embed": IN, "proj_out": OUT, "norm_out/linear": UP,
    "time_embed/linear_1": IN, "time_embed/linear_2": OUT, "pooled_embed/linear_1": IN, "pooled_embed/linear_2": OUT,
}  # fmt: skip
LAST_BLOCK = {
    "norm1/linear": UP, "norm1_context/linear": UP, "ff/up": UP, "ff/down": DOWN,
    "attn/to_q": UP, "attn/to_k": UP, "attn/to_v": UP, "attn/to_out": DOWN,
    "attn/add_q_proj": UP, "attn/add_k_proj": UP, "attn/add_v_proj": UP,
    "attn/norm_q": NORM, "attn/norm_k": NORM, "attn/norm_added_q": NORM, "attn/norm_added_k": NORM,
}  # fmt: skip
BLOCK = LAST_BLOCK | {"attn/to_add_out": DOWN, "ff_context/up": UP, "ff_context/down": DOWN}
DUAL_BLOCK = BLOCK | {
    "attn2/to_q": UP, "attn2/to_k": UP, "attn2/to_v": UP, "attn2/to_out": DOWN,
    "attn2/norm_q": NORM, "attn2/norm_k": NORM,
}  # fmt: skip


def _stack(name: str, modules: dict[str, dict[str, P]]) -> dict[str, dict[str, P]]:
    """A scanned stack: every device holds every layer of its part."""
    return {f"{name}/{path}": {leaf: P(None, *spec) for leaf, spec in each.items()} for path, each in modules.items()}


def test_every_parameter_of_sd35_medium_has_its_place():
    modules = (
        ENDS
        | {f"last_block/{path}": each for path, each in LAST_BLOCK.items()}
        | _stack("blocks", BLOCK)
        | _stack("dual_blocks", DUAL_BLOCK)
    )
    expected = {f"params/{path}/{leaf}": spec for path, each in modules.items() for leaf, spec in each.items()}
    found = _specs(PRESETS["sd35_medium"], (64, 64, 16), _mesh(2, 2, 2))
    assert found == expected | {"constants/pos_embed": P()}


def test_most_of_the_network_is_split_by_every_axis():
    """What a device holds of SD3.5-Medium: a quarter, but for embedders, biases and norms."""
    boxed = boxed_variables(MMDiT(PRESETS["sd35_medium"]), (64, 64, 16))
    shapes, shardings = nn.unbox(boxed)["params"], parameter_shardings(_mesh(1, 2, 2), boxed)["params"]
    whole = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    parts = jax.tree.map(lambda leaf, sharding: int(np.prod(sharding.shard_shape(leaf.shape))), shapes, shardings)
    assert whole / 4 <= sum(jax.tree.leaves(parts)) < 1.02 * whole / 4


@pytest.mark.parametrize("lengths", [(2, 3, 1), (1, 1, 3), (1, 7, 5)])
def test_a_dimension_that_its_axis_does_not_divide_stays_whole(lengths: tuple[int, int, int]):
    """Widths 16, 48, 64, … by 3: 48 and 96 are split, 16 and 64 stay whole; by 5 and 7 nothing is split."""
    mesh = _mesh(*lengths)
    boxed = boxed_variables(MMDiT(TINY), (4, 4, 3))
    shapes = flatten_dict(nn.unbox(boxed), sep="/")
    wanted = _specs(TINY, (4, 4, 3), _mesh(1, 1, 1))
    kept = 0
    for path, spec in _specs(TINY, (4, 4, 3), mesh).items():
        for size, axis, wish in zip(shapes[path].shape, (*spec, *(None,) * 9), (*wanted[path], *(None,) * 9)):  # noqa: B905
            assert axis == (wish if wish is None or size % mesh.shape[wish] == 0 else None)
            kept += axis is not None
    assert kept or 5 in lengths


def test_rules_name_axes_of_the_mesh_and_the_logical_axes_of_the_network():
    assert {axis for _, axis in RULES} <= {*AXES, None}
    specs = nn.get_partition_spec(boxed_variables(MMDiT(TINY), (4, 4, 3)))
    named = {name for spec in jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P)) for name in spec}
    assert named - {None} <= dict(RULES).keys()


@pytest.mark.parametrize("size", [4, 8, 128])
def test_a_batch_is_split_over_data_and_fsdp(size: int):
    mesh = _mesh(2, 2, 2)
    check_batch("batch_size", size, mesh)
    assert batch_sharding(mesh).shard_shape((size, 5)) == (size // 4, 5)
    assert replicated(mesh).shard_shape((size, 5)) == (size, 5)


@pytest.mark.parametrize("size", [-4, 0, 1, 6])
def test_a_batch_that_cannot_be_split_evenly_is_refused(size: int):
    with pytest.raises(ValueError, match=rf"batch_size: found {size}, expected a multiple of 4 \(mesh axes data x"):
        check_batch("batch_size", size, _mesh(2, 2, 2))


# ---- eight devices

LATENT, BATCH, STEPS = (4, 4, 3), 4, 3


def _random(seed: int, shapes: Any) -> Any:
    """A tree of these shapes; nothing is compiled to draw it."""
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def _conditioning(count: int) -> Conditioning:
    rng = np.random.default_rng(count)
    return Conditioning(*(rng.normal(size=(count, *shape)).astype(np.float32) for shape in ((4, 5), (7,))))


def _outcome(mesh: Mesh) -> dict[str, Any]:
    """Three distillation updates and four sampled images of a tiny network on a mesh, and how they were placed."""
    model = MMDiT(TINY)
    velocity, sigmas = make_velocity(model), flow_match_sigmas(3)
    boxed = boxed_variables(model, LATENT)
    shapes = jax.eval_shape(lambda: init_adapter(jax.random.key(0), nn.unbox(boxed)["params"], LoRAConfig(2, 4.0)))
    bank = stack_bank({name: _random(seed, shapes) for seed, name in enumerate(("one", "two", "anchor"))})
    placed = jax.device_put(_random(9, nn.unbox(boxed)), parameter_shardings(mesh, boxed))
    everywhere = replicated(mesh)
    frozen = Frozen(placed, jax.device_put(bank, everywhere), jax.device_put(_conditioning(1), everywhere))
    optimizer = make_optimizer(1e-2, 1, (0.9, 0.99), 0.0, 1.0)
    spec = OPDSpec(
        Objective(mar_beta=0.05), SDE(0.7), sigmas, np.ones(3, bool), LATENT, ("one", "two"), 2.0, (2.0, 2.0, 2.0)
    )
    step = OPDStep(spec, velocity, optimizer, EMA()).make(everywhere)
    state = jax.device_put(init_state(_random(5, shapes), optimizer, 0), everywhere)
    batch = jax.device_put(Batch(_conditioning(BATCH), np.arange(BATCH, dtype=np.int32) % 2), batch_sharding(mesh))
    metrics = []
    for _ in range(STEPS):
        state, found = step(frozen, state, batch)
        metrics.append({name: float(value) for name, value in found.items()})
    world = World(LATENT, {}, lambda prompts: _conditioning(len(prompts)), lambda latents: latents)
    sampler = make_sampler(velocity, SDE(0.7), sigmas, 2.0, LATENT, mesh)
    images = sampler(world, placed, effective(state.ema), [""] * BATCH, noise_keys(0, "", np.arange(BATCH)))
    kernel = placed["params"]["blocks"]["ff"]["up"]["kernel"]
    return {
        "metrics": metrics,
        "images": images.tolist(),
        "compiled": step._cache_size(),
        "replicated": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)),
        "kernel": [kernel.shape, kernel.addressable_shards[0].data.shape],
    }


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """This file, run as a program on eight simulated devices."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # the latter compiles fast
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_compute_what_one_does(outcomes: dict[str, Any]):
    one, eight = outcomes["one"], outcomes["eight"]
    np.testing.assert_allclose(eight["images"], one["images"], rtol=0, atol=1e-5 * np.abs(one["images"]).max())
    assert np.std(one["images"]) > 0.1
    for found, expected in zip(eight["metrics"], one["metrics"], strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    losses = [each["loss"] for each in one["metrics"]]
    assert len(set(losses)) == STEPS  # it trained


def test_a_network_on_a_mesh_is_split_and_what_trains_is_not(outcomes: dict[str, Any]):
    assert outcomes["eight"]["kernel"] == [[1, 16, 64], [1, 8, 32]]
    assert outcomes["eight"]["replicated"]


def test_a_step_on_a_mesh_is_compiled_once(outcomes: dict[str, Any]):
    assert outcomes["eight"]["compiled"] == outcomes["one"]["compiled"] == 1


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    assert jax.device_count() == 8
    alone = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    print(json.dumps({"one": _outcome(alone), "eight": _outcome(make_mesh(MeshShape(2, 2, 2)))}))
