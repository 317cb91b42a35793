"""What the peer is checked with: one update in float32 of a small network, as files, and the problem beside them.

    python benchmarks/our_check.py --config=configs/miniature.py --folder=FOLDER

FOLDER gets `problem.json`, for the timing, and `check/`: weights, prompts, noise, loss and gradient. The network of the
check is of the config's kind; sampler, objective, guidance and teachers are the config's own; the step is the one that
a run builds.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from our_step import make_problem, parse
from peer_problem import Problem

from fopd_jax.adapters.lora import Adapter, adapter_shapes, stack_bank
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import OPD, MeshShape
from fopd_jax.files import write_tensors
from fopd_jax.flow.rollout import sample_keys
from fopd_jax.flow.transition import standard_normal
from fopd_jax.interop.lora.modules import modules_from_adapter
from fopd_jax.interop.sd3.diffusers import transformer_to_diffusers
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig, position_table
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.performance.weights import random_tree
from fopd_jax.stages.opd_update import make_spec, make_update
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.state import init_state
from fopd_jax.worlds.prompt_stream import Batch

LARGEST = {"depth": 4, "dual_layers": 2, "num_heads": 4, "head_dim": 32, "context_dim": 64, "pooled_dim": 64,
           "table_size": 8, "base_size": 8}  # fmt: skip
"""Of the network of the check; the miniature's own is within."""
CHECK_TOKENS = 8
RATE = 2.0**20
"""Of the check's plain gradient descent: so large that what the weights become is the gradient."""
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
Tree = Any


def shrink(network: MMDiTConfig) -> MMDiTConfig:
    """A network of the same kind, small enough for every machine."""
    found = dataclasses.asdict(network)
    return dataclasses.replace(network, **{name: min(found[name], limit) for name, limit in LARGEST.items()})


def write_check(config: OPD, network: MMDiTConfig, folder: Path) -> None:
    """One update in float32 of a small network, as files: everything that went in, loss and gradients.

    The step is built as a run builds it, but for an optimizer from whose result the gradient can be read.
    """
    sizes = {"model.dtype": "float32", "batch_size": 2 * len(config.tasks), "run.mesh": MeshShape(1)}
    config = resolve(override(config, sizes))
    side = min(network.table_size, 2 * network.base_size) * network.patch_size
    latent = (side, side, network.channels)
    model, mesh = MMDiT(network), make_mesh(MeshShape(1), jax.devices()[:1])
    boxed, spec = boxed_variables(model, latent), make_spec(config, latent)
    update = make_update(config, model, boxed, spec, optax.sgd(RATE), mesh)
    problem = make_problem(config, network, latent, CHECK_TOKENS)

    shapes = nn.unbox(boxed)
    variables = random_tree({"params": shapes["params"]}, 1) | {"constants": constants(model, latent)}
    student, *bank = (
        random_adapter(adapter_shapes(config.adapter, shapes["params"], TARGETS), 10 + k)
        for k in range(len(spec.teachers) + 2)
    )
    frozen = Frozen(variables, stack_bank({str(k): each for k, each in enumerate(bank)}), prompts(problem, 1, 2))
    batch = Batch(prompts(problem, problem.batch, 3), jnp.asarray(problem.route(), jnp.int32))
    state = init_state(student, optax.sgd(RATE), config.seed)
    noise = drawn_noise(state, problem)
    jitted: Any = update.step
    with jax.default_matmul_precision("highest"):
        step = jitted.lower(frozen, state, batch).compile(QUICK_COMPILE)
    after, metrics = step(frozen, state, batch)
    gradients = jax.tree.map(lambda before, moved: (before - moved) / RATE, student, after.trained)

    names = ["student", *map(str, range(len(spec.teachers))), "anchor"]
    weights = transformer_to_diffusers(jax.device_get(variables), network)
    for name, adapter in zip(names, (student, *bank), strict=True):
        weights |= {f"{name}/{key}": each for key, each in factors(adapter, network).items()}
    save(folder / "weights.safetensors", weights)
    save(folder / "gradients.safetensors", factors(gradients, network))
    save(folder / "inputs.safetensors", inputs(batch.conditioning, frozen.null, noise))
    expected = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    problem.write(folder / "problem.json")


def random_adapter(shapes: Adapter, seed: int) -> Adapter:
    return Adapter(random_tree(shapes.weights, seed), shapes.scale)


def constants(model: MMDiT, latent: tuple[int, int, int]) -> Tree:
    """The position table."""
    return {
        "pos_embed": jnp.asarray(
            position_table(model.config, *(side // model.config.patch_size for side in latent[:2]))
        )
    }


def prompts(problem: Problem, rows: int, seed: int) -> Conditioning:
    shapes = (problem.text_tokens, problem.network["joint_attention_dim"]), (problem.network["pooled_projection_dim"],)
    return random_tree(Conditioning(*(jax.ShapeDtypeStruct((rows, *shape), jnp.float32) for shape in shapes)), seed)


def drawn_noise(state: Any, problem: Problem) -> np.ndarray:
    """The start and the noise of every trained step, as the update draws them, `[T, B, h, w, c]`."""
    keys = sample_keys(state.rng(), problem.trained_steps + 1, problem.batch)
    return np.stack([np.asarray(standard_normal(each, problem.latent)) for each in keys])


def inputs(conditioning: Conditioning, null: Conditioning, noise: np.ndarray) -> dict[str, Any]:
    """As the peer's batch names them, channels first."""
    return {
        "context": conditioning.context,
        "pooled": conditioning.pooled,
        "null_context": null.context,
        "null_pooled": null.pooled,
        "noise": noise.transpose(0, 1, 4, 2, 3),
    }


def factors(adapter: Adapter, network: MMDiTConfig) -> dict[str, np.ndarray]:
    """`MODULE/{a,b}` by diffusers' names and in its layout."""
    modules = modules_from_adapter(adapter, network)
    return {f"{name}/{leaf}": getattr(module, leaf) for name, module in modules.items() for leaf in ("a", "b")}


def save(path: Path, tensors: dict[str, Any]) -> None:
    write_tensors(path, {name: np.asarray(each, np.float32) for name, each in tensors.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, required=True)
    args, config, problem = parse(parser)
    (args.folder / "check").mkdir(parents=True, exist_ok=True)
    problem.write(args.folder / "problem.json")
    write_check(config, shrink(PRESETS[config.model.preset]), args.folder / "check")


if __name__ == "__main__":
    main()
