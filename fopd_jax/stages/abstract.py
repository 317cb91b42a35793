"""The update of a config as shapes alone: to compile it for machines that are not there, or to time it."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fopd_jax.adapters.lora import Groups, adapter_shapes, stack_bank
from fopd_jax.backbones.float8 import FLOAT8, float8_shapes
from fopd_jax.backbones.record import Backbone, LatentShape
from fopd_jax.backbones.registry import find_preset
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import OPD, Config, LoRAConfig, Model
from fopd_jax.config.teaching import TeacherNetwork
from fopd_jax.parallel.sharding import (
    AnyMesh,
    bank_shardings,
    batch_sharding,
    parameter_shardings,
    replicated,
    stacked_shardings,
)
from fopd_jax.performance.problem import AbstractUpdate
from fopd_jax.performance.program import Program
from fopd_jax.performance.text import encode_program
from fopd_jax.policy.velocity import Tree, make_velocity
from fopd_jax.stages.coordinates import skills
from fopd_jax.stages.grouping import own_adapters
from fopd_jax.stages.networks import Known, answering, fitting_module
from fopd_jax.stages.offline import offline_shapes
from fopd_jax.stages.opd_update import make_spec, make_update
from fopd_jax.stages.pipeline import Pipeline, build_network
from fopd_jax.stages.routing import asked
from fopd_jax.stages.trained import place
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.state import make_optimizer
from fopd_jax.worlds.embedded import EMBEDDED
from fopd_jax.worlds.prompt_stream import Batch, Mix


def abstract_update(config: OPD, mesh: AnyMesh) -> AbstractUpdate:
    """The update that `main` would run, from the config's `model.preset`; no file is read, no weight made.

    Raises:
      ValueError: a field is out of range; names it.
    """
    model, dtype = abstract_model(config, mesh), jnp.dtype(config.model.dtype)
    latent_shape, encoded = world_shapes(config.model)
    boxed, (family, shape) = boxed_variables(model, latent_shape), find_preset(config.model.preset)
    spec = make_spec(config, latent_shape, mesh)
    others, modules = abstract_others(config, mesh, (family, shape, config.model.preset, latent_shape))
    update = make_update(
        config, model, boxed, spec, make_optimizer(config.optimizer), mesh,
        {name: make_velocity(each) for name, each in modules.items()},
    )  # fmt: skip
    split = batch_sharding(mesh)
    conditioning = encoded_rows(encoded, config.batch_size, dtype, split)
    offline = offline_shapes(config, latent_shape, lambda count: encoded_rows(encoded, count, dtype, split), split)
    batch = dataclasses.replace(abstract_batch(config, conditioning, split), offline=offline)
    null = encoded_rows(encoded, 1, dtype, replicated(mesh))
    bank = abstract_bank(config, boxed, spec, mesh, family.targets, config.adapter.rank)
    weighed = jax.ShapeDtypeStruct((len(spec.teachers),), jnp.float32, sharding=replicated(mesh))
    trust = weighed if config.health.noisy == "weigh" else None
    frozen = Frozen(abstract_base(boxed, dtype, mesh), bank, null, trust=trust, networks=others)
    return AbstractUpdate(
        update.step, (frozen, update.state, batch), model, update.pieces, update.optimizer, update.ema
    )


def abstract_batch(config: OPD, conditioning: Conditioning, split: jax.sharding.Sharding) -> Batch:
    """What the prompt stream would give, as shapes."""

    def rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=split)

    names = skills(config)
    count = len(names) + 1 if names else 0 if config.routing.method == "hard" else asked(config)
    mix = Mix(rows(count), rows(2, count, dtype=jnp.float32)) if count else None
    coordinates = rows(len(names), dtype=jnp.float32) if names else None
    return Batch(conditioning, rows(), mix, coordinates=coordinates)


def abstract_bank(config: OPD, boxed: Tree, spec: OPDSpec, mesh: AnyMesh, targets: Groups, rank: int) -> Tree:
    """Teachers and anchor as shapes with shardings; `rank`: of adapters, the largest of theirs."""
    dtype, params = jnp.dtype(config.model.dtype), nn.unbox(boxed["params"])
    count = len(spec.teachers) + 1 + (spec.table.base is not None and not spec.whole_teachers)
    if any(spec.networks):
        count = len(own_adapters(config)) if any(own_adapters(config)) else 0
    if spec.whole_teachers:
        bank = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), dtype), params)
        return place(bank, stacked_shardings(mesh, boxed["params"]))
    lora = LoRAConfig(rank, config.adapter.alpha, config.adapter.targets)
    return abstract_adapters(lora, boxed, targets, mesh, dtype, count)


def abstract_adapters(lora: LoRAConfig, boxed: Tree, targets: Groups, mesh: AnyMesh, dtype: Any, count: int) -> Tree:
    """A bank of so many adapters as shapes with shardings; {} of none."""
    if not count:
        return {}
    adapter = adapter_shapes(lora, nn.unbox(boxed["params"]), targets)
    bank = jax.eval_shape(stack_bank, {str(k): adapter for k in range(count)})
    bank = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), bank)
    return place(bank, bank_shardings(mesh, boxed["params"], bank))


def abstract_others(config: OPD, mesh: AnyMesh, known: Known) -> tuple[dict[str, Tree], dict[str, Any]]:
    """Of each network beside the base variables and bank as shapes with shardings, and its module; from presets alone.

    Raises:
      ValueError: as `fitting_module`.
    """
    named, trees, modules = answering(config), {}, {}
    files = {task: config.tasks[task].teacher if task else config.anchor.adapter for task in named}
    for name, settings in config.networks.items():
        family, shape = find_preset(settings.preset)
        module: Any = fitting_module(f"networks.{name}", settings, family, shape, config, mesh, known)
        adapted = [bool(files[task]) for task, network in named.items() if network == name]
        count = len(adapted) if any(adapted) else 0
        trees[name] = abstract_other(config, settings, family, module, mesh, known[-1], count)
        modules[name] = module
    return trees, modules


def abstract_other(
    config: OPD, settings: TeacherNetwork, family: Backbone, module: Any, mesh: AnyMesh, latent: LatentShape, count: int
) -> tuple[Tree, Tree]:
    """One of them, with so many adapters of the config's rank on it."""
    boxed, eighth = boxed_variables(module, latent), settings.dtype == FLOAT8
    variables = abstract_base(boxed, jnp.dtype("bfloat16" if eighth else settings.dtype), mesh)
    bank = abstract_adapters(config.adapter, boxed, family.targets, mesh, module.dtype, count)
    return float8_shapes(variables) if eighth else variables, bank


# ---- of every stage


def abstract_model(config: Config, mesh: AnyMesh) -> Any:
    """The network that a run of the config would build on a mesh."""
    family, shape = find_preset(config.model.preset)
    return build_network(family, shape, config.run, config.model.dtype, config.run.remat, mesh)


def abstract_base(boxed: Tree, dtype: Any, mesh: AnyMesh) -> Tree:
    """A base's variables as shapes with shardings, parameters in `dtype`; `boxed`: with logical axes."""
    variables, places = nn.unbox(boxed), parameter_shardings(mesh, boxed)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), variables["params"])
    return {"params": place(params, places["params"]), "constants": place(variables["constants"], places["constants"])}


def encoded_rows(encoded: Conditioning, count: int, dtype: Any, sharding: jax.sharding.Sharding) -> Conditioning:
    """Encoded prompts as shapes, so many of them; `encoded`: the shapes of one."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), dtype, sharding=sharding), encoded)


def encoding_programs(config: Config, encoded: Conditioning, mesh: AnyMesh) -> list[Program]:
    """With resident encoders what encodes a batch's prompts; `encoded`: the shapes of one."""
    if not config.run.encoding.resident or config.model.preset in EMBEDDED or not isinstance(mesh, Mesh):
        return []
    width = encoded.context.shape[-1]
    return [encode_program(mesh, config.batch_size, config.model.t5_length, width, config.model.dtype)]


def world_shapes(model: Model) -> tuple[LatentShape, Conditioning]:
    """Shape of one latent image, and of one encoded prompt.

    Raises:
      ValueError: the network has no images of `model.resolution`.
    """
    if model.preset in EMBEDDED:
        world = EMBEDDED[model.preset]()
        encoded = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), world.encode([""]))
        return world.latent_shape, encoded
    family, shape = find_preset(model.preset)
    shapes = family.encoded(shape, model.t5_length)
    encoded = (None if each is None else jax.ShapeDtypeStruct(each, jnp.float32) for each in shapes)
    return family.latent_shape(shape, model.size), Conditioning(*encoded)


def encoded_tokens(pipeline: Pipeline, config: Model) -> int:
    """Text tokens of one prompt's conditioning in a pipeline's world."""
    if pipeline.manifest is None:
        return world_shapes(config)[1].context.shape[0]
    return pipeline.family.encoded(pipeline.model.config, config.t5_length)[0][0]
