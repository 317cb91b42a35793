"""What each of several processes does: `python distributed_program.py FOLDER COUNT PROCESS PORT`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from fopd_jax.adapters.lora import init_adapter, stack_bank
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import EMA, LoRAConfig, MeshShape, Objective, Optimizer
from fopd_jax.evaluation.sampler import Sampler
from fopd_jax.evaluation.score import EvalSet, evaluate, noise_keys
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import SDE, standard_normal
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from fopd_jax.parallel import distributed
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.parallel.mesh import AXES, make_mesh
from fopd_jax.parallel.sharding import batch_sharding, parameter_shardings, replicated
from fopd_jax.policy.velocity import make_velocity
from fopd_jax.rewards.reward import Reward, Scores, collect
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.opd.step import make_step
from fopd_jax.steps.state import init_state, make_optimizer
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.prompt_stream import Batch
from fopd_jax.worlds.world import World

TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=0, qk_norm=True, patch_size=2, channels=3,
    context_dim=5, pooled_dim=7, table_size=4, base_size=4,
)  # fmt: skip
LATENT, BATCH, UPDATES, SAMPLES = (4, 4, 3), 8, 20, 13
FIRST, CURVE = 1e-5, 1e-3  # relative: loss and gradient (L2) of the first update; each loss of the curve
LAYOUTS = (  # lengths of the mesh's axes, and the axes in the order in which they run over the devices
    ((2, 2, 2), (0, 1, 2)),
    ((2, 2, 2), (2, 1, 0)),  # the two halves of each tensor-parallel pair in two processes
    ((2, 2, 2), (1, 0, 2)),  # rows that are not next to each other
    ((1, 1, 8), (0, 1, 2)),
)
Found = dict[str, Any]


def _random(seed: int, shapes: Any) -> Any:
    """A tree of these shapes; nothing is compiled to draw it."""
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def _encode(prompts: Any) -> Conditioning:
    """Each prompt's own numbers, whatever others stand beside it."""
    rows = [np.random.default_rng(list(prompt.encode())).normal(size=27).astype(np.float32) for prompt in prompts]
    return Conditioning(np.stack([row[:20].reshape(4, 5) for row in rows]), np.stack([row[20:] for row in rows]))


def _train(mesh: Mesh, folder: Path) -> Found:
    """The first gradient of a tiny network's distillation (written to the folder) and the losses of 20 updates."""
    model, sharding, everywhere = MMDiT(TINY), batch_sharding(mesh), replicated(mesh)
    boxed = boxed_variables(model, LATENT)
    shapes = jax.eval_shape(
        lambda: init_adapter(jax.random.key(0), nn.unbox(boxed)["params"], LoRAConfig(2, 4.0), TARGETS)
    )
    bank = stack_bank({name: _random(seed, shapes) for seed, name in enumerate(("one", "two", "anchor"))})
    variables = jax.tree.map(distributed.put_replicated, _random(9, nn.unbox(boxed)), parameter_shardings(mesh, boxed))
    frozen = Frozen(variables, *distributed.put_replicated((bank, _encode([""])), everywhere))
    last_gradient = optax.trace(decay=0.0)  # its state holds what comes in
    optimizer = optax.chain(last_gradient, make_optimizer(Optimizer(1e-2, 1, (0.9, 0.99), 0.0, 1.0)))
    spec = OPDSpec(
        Objective(mar_beta=0.05), SDE(0.7), flow_match_sigmas(3), np.ones(3, bool), LATENT, ("one", "two"), 2.0,
        (2.0, 2.0, 2.0),
    )  # fmt: skip
    groups = GradientGroups(mesh, ("data", "fsdp"), P())
    step = make_step(Pieces(spec, make_velocity(model), groups=groups), optimizer, EMA(), everywhere)
    state, losses = distributed.put_replicated(init_state(_random(5, shapes), optimizer, 0), everywhere), []
    rows = distributed.rows_of(sharding, BATCH)
    for index in range(UPDATES):
        mine = Batch(_encode([f"prompt {index} {row}" for row in rows]), rows.astype(np.int32) % 2)
        state, metrics = step(frozen, state, distributed.put_batch(mine, sharding, BATCH))
        losses.append(float(metrics["loss"]))
        if index == 0:
            np.savez(folder / "gradient.npz", *jax.tree.leaves(distributed.fetch(state.opt_state[0].trace)))
    return {"losses": losses, "devices": [jax.device_count(), jax.local_device_count()]}


def _score(images: np.ndarray, prompts: Any, metadata: Any) -> Scores:
    """In float64, which no device would keep; it fails for the prompt that is third of its task."""
    values = images.mean((1, 2, 3), np.float64) + np.array([len(prompt) / 3 for prompt in prompts])
    third = [ValueError("it is the third") if each["place"] == 2 else None for each in metadata]
    return collect([error or (float(value), {}) for value, error in zip(values, third, strict=True)])


def _evaluate(mesh: Mesh) -> Found:
    """Images and scores of a network that adds its prompt to its noise; how many prompts were encoded here."""
    encoded: list[str] = []

    def encode(prompts: Any) -> Conditioning:
        encoded.extend(prompts)
        return _encode(prompts)

    def draw(variables: Any, adapter: Any, conditioning: Conditioning, null: None, keys: jax.Array) -> jax.Array:
        return standard_normal(keys, LATENT) + variables * conditioning.pooled[:, :1, None, None]

    beside = tuple({"place": place} for place in range(3))
    task = Task("task", (), ("a", "bb", "ccc"), ("mean",), test_metadata=beside)
    rewards = {"mean": Reward("mean", _score, (None, None), "host")}
    world = World(LATENT, {"task": task}, encode, lambda latents: latents / 16, rewards=rewards)
    sampler = Sampler(jax.jit(draw, out_shardings=batch_sharding(mesh)), guided=False, mesh=mesh)
    weight = distributed.put_replicated(np.float32(3), replicated(mesh))
    found = evaluate(sampler, world, EvalSet(world.tasks, SAMPLES, BATCH, 0), weight, {})
    images = sampler(world, weight, {}, [f"prompt {row}" for row in range(BATCH)], noise_keys(0, "", np.arange(BATCH)))
    scores = [None if np.isnan(value) else value for value in found.values["mean"].tolist()]
    return {"scores": scores, "told": found.told(), "images": images.tolist(), "encoded": len(encoded)}


def _move() -> list[list[int]]:
    """Put and fetch on meshes of all layouts; this process's rows of each."""
    whole = {"a": np.arange(48.0, dtype=np.float32).reshape(16, 3), "b": np.arange(16)}
    double, keys, rows = np.pi * whole["b"], jax.random.split(jax.random.key(3), 16), []
    for lengths, order in LAYOUTS:
        grid = np.array(jax.devices()).reshape([lengths[axis] for axis in order])
        mesh = Mesh(np.moveaxis(grid, range(3), order), AXES, axis_types=(AxisType.Auto,) * 3)
        sharding = batch_sharding(mesh)
        mine = distributed.rows_of(sharding, 16)
        batch = distributed.put_batch({name: leaf[mine] for name, leaf in whole.items()}, sharding, 16)
        jax.tree.map(np.testing.assert_array_equal, distributed.fetch(batch), whole)
        np.testing.assert_array_equal(distributed.held_rows(batch["a"]), whole["a"][mine])
        np.testing.assert_array_equal(distributed.gather_rows(double[mine], sharding, 16), double)
        rows.append(mine.tolist())
    split = jax.random.key_data(distributed.put_replicated(keys, sharding))
    np.testing.assert_array_equal(distributed.fetch(split), jax.random.key_data(keys))
    assert distributed.local_mesh(mesh).shape == {"data": 1, "fsdp": jax.local_device_count(), "tensor": 1}
    return rows


def _wait() -> Found:
    """Process 0 gives up while the others are at a barrier; before that, the last process is late for all barriers but
    one, to which it does not come."""
    is_last, began = jax.process_index() == jax.process_count() - 1, time.monotonic()
    if is_last:
        time.sleep(0.5)
    distributed.barrier("all", 60.0)
    distributed.barrier("all", 60.0)
    waited = time.monotonic() - began
    missing = "" if is_last else _failure(lambda: distributed.barrier("not all", 1.0))

    def prepare() -> None:
        with distributed.failing_together():
            if distributed.is_main():
                time.sleep(3.0)  # until none waits for the last process any more, on a busy machine, too
                raise ValueError("workdir: no good")
            distributed.barrier("prepared", 60.0)

    return {"waited": waited, "missing": missing, "gave_up": _failure(prepare)}


def _failure(act: Any) -> str:
    try:
        act()
    except (ValueError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _program(folder: Path, count: int, process: int, port: int) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    if count > 1:
        distributed.initialize(f"localhost:{port}", count, process, timeout_s=120)
    folder = folder / f"{count}_{process}"
    folder.mkdir()
    mesh = make_mesh(MeshShape(2, 2, 2))
    found = _train(mesh, folder) | _evaluate(mesh)
    if count > 1:
        found |= {"rows": _move()} | _wait()
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _program(Path(sys.argv[1]), *map(int, sys.argv[2:]))
