"""Results do not depend on the mesh: eight simulated devices, arranged in every way, compute what one does."""

import json
import subprocess
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh

from fopd_jax.adapters.lora import adapter_shapes, effective, stack_bank
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.parse import override
from fopd_jax.config.schema import OPD, Objective, Optimizer
from fopd_jax.evaluation.sampler import make_sampler
from fopd_jax.evaluation.score import noise_keys
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import SDE
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from fopd_jax.parallel.mesh import AXES
from fopd_jax.parallel.sharding import (
    bank_shardings,
    batch_sharding,
    parameter_shardings,
    replicated,
    stacked_shardings,
)
from fopd_jax.performance.hlo import REDUCTIONS, Collective, collectives
from fopd_jax.policy.velocity import make_velocity
from fopd_jax.stages.opd_update import make_update
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.state import init_state, make_optimizer
from fopd_jax.worlds.prompt_stream import Batch
from fopd_jax.worlds.world import World
from tests.quick import environment

TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=1, qk_norm=True, patch_size=2, channels=3,
    context_dim=6, pooled_dim=8, table_size=4, base_size=4,
)  # fmt: skip
LATENT, BATCH, STEPS = (4, 4, 3), 8, 20
FIRST, CURVE = 1e-5, 1e-3  # relative L2 of loss and gradient of the first update; of the loss over 20 updates
ONCE = ("data", "fsdp")
CONFIG: dict[str, Any] = {
    "batch_size": BATCH, "reduce_once": ONCE, "model.dtype": "float32", "adapter.rank": 2, "adapter.alpha": 4.0,
    "ema.every": 1,
}  # fmt: skip
FULL: dict[str, Any] = {"trained": "params", "reduce_once": ("data",)}
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "adapter 1": ((1, 1, 1), {}),
    "adapter 2": ((2, 1, 1), {}),
    "adapter 4": ((2, 2, 1), {}),
    "adapter 8": ((8, 1, 1), {}),
    "adapter 8 in three ways": ((2, 2, 2), {}),
    "full 1": ((1, 1, 1), FULL),
    "full 8": ((2, 2, 2), FULL),
    "full 8 once": ((2, 4, 1), FULL | {"reduce_once": ONCE}),
    "full 8 every timestep": ((1, 8, 1), FULL | {"reduce_once": ()}),
    "networks 1": ((1, 1, 1), FULL | {"whole_teachers": True}),
    "networks 8": ((2, 4, 1), FULL | {"whole_teachers": True}),
}
LONG = ("adapter 1", "adapter 8", "adapter 8 in three ways", "full 1", "full 8")
"""Those that train on; the default run has these alone, since it is compiling an update each that takes long."""
IMAGES = ("adapter 1", "adapter 8 in three ways")


# ---- the program that eight devices run


def _random(seed: int, shapes: Any) -> Any:
    """A tree of these shapes; nothing is compiled to draw it."""
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def _conditioning(count: int) -> Conditioning:
    rng = np.random.default_rng(count)
    return Conditioning(*(rng.normal(size=(count, *shape)).astype(np.float32) for shape in ((4, 6), (8,))))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.device_put(tree, shardings)


def _outcome(name: str) -> dict[str, Any]:
    """Updates of a tiny network on the mesh of a case, the first one's gradient, and how everything was placed."""
    lengths, overrides = CASES[name]
    mesh = Mesh(np.asarray(jax.devices()[: np.prod(lengths)]).reshape(lengths), AXES, axis_types=(AxisType.Auto,) * 3)
    config, model = override(OPD(name="tiny"), CONFIG | overrides), MMDiT(TINY)
    boxed, optimizer = boxed_variables(model, LATENT), make_optimizer(Optimizer(1e-2, 1, (0.9, 0.99), 0.0, 1.0))
    sigmas, whole = flow_match_sigmas(3), config.whole_teachers
    spec = OPDSpec(
        Objective(mar_beta=0.05), SDE(0.7), sigmas, np.ones(3, bool), LATENT, ("one", "two"), 2.0, (2.0, 2.0, 1.0),
        whole_teachers=whole,
    )  # fmt: skip
    update = make_update(config, model, boxed, spec, optimizer, mesh)
    variables, adapter = _random(9, nn.unbox(boxed)), adapter_shapes(config.adapter, nn.unbox(boxed)["params"], TARGETS)
    if whole:
        networks = [_random(k, nn.unbox(boxed)["params"]) for k in range(3)]
        bank = jax.tree.map(lambda *leaves: np.stack(leaves), *networks)
        bank = _placed(bank, stacked_shardings(mesh, boxed["params"]))
    else:
        bank = stack_bank({str(k): _random(k, adapter) for k in range(3)})
        bank = _placed(bank, bank_shardings(mesh, boxed["params"], bank))
    everywhere = replicated(mesh)
    placed = _placed(variables, parameter_shardings(mesh, boxed))
    frozen = Frozen(placed, bank, _placed(_conditioning(1), everywhere))
    start = variables["params"] if config.trained == "params" else _random(5, adapter)
    places = jax.tree.map(lambda leaf: leaf.sharding, update.state)
    state = _placed(init_state(start, optimizer, 0), places)
    batch = _placed(Batch(_conditioning(BATCH), np.arange(BATCH, dtype=np.int32) % 2), batch_sharding(mesh))
    compiled = update.step.lower(frozen, state, batch).compile()

    losses, first, metrics = [], None, {}
    for _ in range(STEPS if name in LONG else 1):
        state, metrics = compiled(frozen, state, batch)
        losses.append(float(metrics["loss"]))
        first = first or _first(state, metrics)
    reductions = [each for each in collectives(compiled.as_text()) if each.kind in REDUCTIONS and _backward(each)]
    moved = flatten_dict(state.trained if config.trained == "params" else state.trained.weights, sep="/")
    return {
        "losses": losses,
        "first": first,
        "looped": sorted({axis for each in reductions if each.depth for axis in each.axes(dict(mesh.shape))}),
        "reductions": len(reductions),
        "split": {path: [*leaf.shape, *leaf.addressable_shards[0].data.shape] for path, leaf in moved.items()},
        "kept": all(a.sharding == b for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True)),
        "images": _images(mesh, placed, state) if name in IMAGES else None,
    }


def _backward(collective: Collective) -> bool:
    """Whether it may belong to a gradient: it is no part of a forward pass."""
    return "jvp(student)" not in collective.op_name or "transpose" in collective.op_name


def _first(state: Any, metrics: Any) -> dict[str, Any]:
    """What the first update did. Adam's first moment is then the gradient, but for one factor."""
    moments = optax.tree.get(state.opt_state, "mu")
    return {
        "norm": float(metrics["grad_norm"]),
        "samples": np.asarray(metrics["samples/loss"]).tolist(),
        "gradient": np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(moments)]).tolist(),
    }


def _images(mesh: Mesh, placed: Any, state: Any) -> list[Any]:
    def encode(prompts: Any) -> Conditioning:  # a row depends on its prompt alone, however many are asked for
        return jax.tree.map(lambda leaf: np.repeat(leaf, len(prompts), 0), _conditioning(1))

    world = World(LATENT, {}, encode, lambda latents: latents)
    sampler = make_sampler(make_velocity(MMDiT(TINY)), SDE(0.7), flow_match_sigmas(3), 2.0, LATENT, mesh)
    start = effective(_random(5, state.trained))  # some adapter; the trained one differs by rounding
    return sampler(world, placed, start, [""] * BATCH, noise_keys(0, "", np.arange(BATCH))).tolist()


# ---- the tests


def _run(names: Collection[str]) -> dict[str, Any]:
    """This file, run as a program on eight simulated devices."""
    command = [sys.executable, __file__, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(8), check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    return _run(LONG)


@pytest.fixture(scope="module")
def others(outcomes: dict[str, Any]) -> dict[str, Any]:
    """Those that are slow, and what they are compared with."""
    return outcomes | _run(CASES.keys() - set(LONG))


def _off(found: Any, expected: Any) -> float:
    """Relative L2 difference."""
    a, b = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _check_first(name: str, outcomes: dict[str, Any]) -> None:
    found, one = outcomes[name], outcomes[f"{name.split()[0]} 1"]
    assert _off(found["losses"][0], one["losses"][0]) < FIRST
    assert _off(found["first"]["norm"], one["first"]["norm"]) < FIRST
    assert _off(found["first"]["gradient"], one["first"]["gradient"]) < FIRST
    assert found["kept"]  # the state stays in its places
    assert one["kept"]


MANY = [name for name in CASES if not name.endswith(" 1")]


@pytest.mark.parametrize("name", [name for name in MANY if name in LONG])
def test_updates_are_those_of_one_device(name: str, outcomes: dict[str, Any]):
    """The first one's gradient, and the loss over twenty."""
    _check_first(name, outcomes)
    found, one = outcomes[name], outcomes[f"{name.split()[0]} 1"]
    assert _off(found["losses"], one["losses"]) < CURVE
    assert one["losses"][-1] < 0.9 * one["losses"][0]  # it trained


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MANY if name not in LONG])
def test_the_first_update_is_that_of_one_device(name: str, others: dict[str, Any]):
    _check_first(name, others)


def test_adapter_gradients_are_reduced_once_an_update(outcomes: dict[str, Any]):
    assert outcomes["adapter 8"]["looped"] == []
    assert outcomes["adapter 8"]["reductions"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter 2", "adapter 4"])
def test_so_they_are_on_fewer_devices(name: str, others: dict[str, Any]):
    assert others[name]["looped"] == []
    assert others[name]["reductions"] >= 1


def test_all_of_a_network_is_reduced_over_data_once_and_over_parts_in_the_loop(outcomes: dict[str, Any]):
    assert outcomes["full 8"]["looped"] == ["fsdp", "tensor"]


@pytest.mark.slow
def test_where_reductions_are_is_a_choice(others: dict[str, Any]):
    """All once at the price of memory; all in the loop."""
    assert others["full 8 once"]["looped"] == []
    assert others["full 8 every timestep"]["looped"] == ["fsdp"]
    assert others["full 8 every timestep"]["split"]["last_block/ff/up/kernel"] == [16, 64, 2, 64]


def test_a_whole_network_trains_in_shards_and_an_adapter_on_every_device(outcomes: dict[str, Any]):
    assert outcomes["full 8"]["split"]["last_block/ff/up/kernel"] == [16, 64, 8, 32]
    for shape in outcomes["adapter 8 in three ways"]["split"].values():
        assert shape[: len(shape) // 2] == shape[len(shape) // 2 :]


def test_images_do_not_depend_on_the_mesh(outcomes: dict[str, Any]):
    one = np.asarray(outcomes["adapter 1"]["images"])
    assert np.std(one) > 0.1
    found = outcomes["adapter 8 in three ways"]["images"]
    np.testing.assert_allclose(found, one, rtol=0, atol=1e-5 * np.abs(one).max())


def test_losses_by_sample_come_in_the_order_of_the_batch(outcomes: dict[str, Any]):
    one = outcomes["adapter 1"]["first"]["samples"]
    assert len(set(one)) == BATCH
    np.testing.assert_allclose(outcomes["adapter 8"]["first"]["samples"], one, rtol=1e-4)


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    assert jax.device_count() == 8
    with ThreadPoolExecutor(2) as threads:  # it is compiling that takes long, and that does not hold Python's lock
        print(json.dumps(dict(zip(sys.argv[1:], threads.map(_outcome, sys.argv[1:]), strict=True))))
