"""Flow matching does not depend on the mesh: eight simulated devices compute what one does, each holding its shards."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh

from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.parse import override
from fopd_jax.config.schema import FlowMatching, Optimizer, Pairs
from fopd_jax.config.variants import smoke
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from fopd_jax.parallel.mesh import AXES
from fopd_jax.parallel.sharding import batch_sharding, parameter_shardings
from fopd_jax.performance.compilation import compile_program
from fopd_jax.stages.abstract import abstract_model
from fopd_jax.stages.flow_matching_update import flow_matching_programs, frozen_part, make_update, update_cost
from fopd_jax.stages.trained import float32
from fopd_jax.steps.state import make_optimizer
from tests.quick import environment

TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=1, qk_norm=True, patch_size=2, channels=3,
    context_dim=6, pooled_dim=8, table_size=4, base_size=4,
)  # fmt: skip
LATENT, BATCH, FIRST = (4, 4, 3), 8, 1e-5
FULL: dict[str, Any] = {"trained": "params", "run.reduce_once": ("data",)}
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "adapter 1": ((1, 1, 1), {}),
    "adapter 8": ((4, 2, 1), {}),
    "full 1": ((1, 1, 1), FULL),
    "full 8": ((2, 2, 2), FULL),
    "full 8 fsdp": ((1, 8, 1), FULL | {"run.reduce_once": ()}),
}


# ---- the program that eight devices run


def _random(seed: int, shapes: Any) -> Any:
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def _mesh(lengths: tuple[int, int, int]) -> Mesh:
    devices = np.asarray(jax.devices()[: np.prod(lengths)]).reshape(lengths)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def _outcome(name: str) -> dict[str, Any]:
    """The first update of a tiny network on the mesh of a case, and how its state was placed."""
    lengths, changes = CASES[name]
    mesh, model = _mesh(lengths), MMDiT(TINY)
    changes = {"batch_size": BATCH, "model.dtype": "float32", "adapter.rank": 2, "ema.every": 1} | changes
    config = override(FlowMatching(name="tiny"), changes)
    boxed, optimizer = boxed_variables(model, LATENT), make_optimizer(Optimizer(1e-2, 1, (0.9, 0.99), 0.0, 1.0))
    update = make_update(config, model, boxed, optimizer, mesh)
    variables = _random(9, float32(nn.unbox(boxed)))
    whole = config.trained == "params"
    start = variables["params"] if whole else _random(5, update.trained.state.trained)
    frozen = frozen_part(config, jax.device_put(variables, parameter_shardings(mesh, boxed)))
    state = update.trained.born(start, optimizer, 0)
    born = _kept(state, update.trained.places)
    x0, context, pooled = (_random(k, jax.ShapeDtypeStruct((BATCH, *shape), np.float32)) for k, shape in
                           enumerate((LATENT, (5, 6), (8,))))  # fmt: skip
    batch = jax.device_put({"x0": x0, "conditioning": Conditioning(context, pooled)}, batch_sharding(mesh))
    state, metrics = update.step(frozen, state, batch)
    moved = flatten_dict(state.trained if whole else state.trained.weights, sep="/")
    moments = optax.tree.get(state.opt_state, "mu")  # after one update the gradient, but for one factor
    return {
        "loss": float(metrics["loss"]),
        "norm": float(metrics["grad_norm"]),
        "samples": np.asarray(metrics["samples/loss"]).tolist(),
        "gradient": np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(moments)]).tolist(),
        "split": {path: [*leaf.shape, *leaf.addressable_shards[0].data.shape] for path, leaf in moved.items()},
        "kept": born and _kept(state, update.trained.places),
    }


def _kept(state: Any, places: Any) -> bool:
    return all(a.sharding == b for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True))


def _program() -> dict[str, Any]:
    """The abstract update of the miniature, compiled for eight devices."""
    config = smoke(FlowMatching(name="whole", trained="params", tasks={"text": Pairs()}))
    config = override(config, {"run.reduce_once": ()})
    mesh = _mesh((1, 8, 1))
    (program,) = flow_matching_programs(config, mesh)
    compilation, cost = compile_program(program), update_cost(config, (24, 24, 3), 8, abstract_model(config, mesh))
    phases = [cost.teachers, cost.rollout, cost.forward, cost.backward, cost.recomputed]
    return {"fits": compilation.fits, "flops": program.flops.model, "phases": phases}


# ---- the tests


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """This file, run as a program on eight simulated devices."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment(8), check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _off(found: Any, expected: Any) -> float:
    """Relative L2 difference."""
    a, b = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith(" 1")])
@pytest.mark.parametrize("what", ["loss", "norm", "samples", "gradient"])
def test_the_first_update_is_that_of_one_device(name: str, what: str, outcomes: dict[str, Any]):
    assert _off(outcomes[name][what], outcomes[f"{name.split()[0]} 1"][what]) < FIRST


@pytest.mark.parametrize("name", CASES)
def test_a_state_is_born_in_its_places_and_keeps_them(name: str, outcomes: dict[str, Any]):
    assert outcomes[name]["kept"]


def test_a_whole_network_trains_in_shards_and_an_adapter_on_every_device(outcomes: dict[str, Any]):
    assert outcomes["full 8"]["split"]["last_block/ff/up/kernel"] == [16, 64, 8, 32]
    assert outcomes["full 8 fsdp"]["split"]["last_block/ff/up/kernel"] == [16, 64, 2, 64]
    for shape in outcomes["adapter 8"]["split"].values():
        assert shape[: len(shape) // 2] == shape[len(shape) // 2 :]


def test_the_update_compiles_from_shapes_alone(outcomes: dict[str, Any]):
    found = outcomes["program"]
    teachers, rollout, forward, backward, recomputed = found["phases"]
    assert found["fits"]
    assert teachers == rollout == recomputed == 0  # nobody is asked, nothing is sampled, nothing thrown away
    assert backward > 1.5 * forward > 0
    assert found["flops"] == forward + backward


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    assert jax.device_count() == 8
    with ThreadPoolExecutor(2) as threads:
        program, made = threads.submit(_program), dict(zip(CASES, threads.map(_outcome, CASES), strict=True))
        print(json.dumps(made | {"program": program.result()}))
