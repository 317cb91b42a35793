"""Which update is measured: a config in other sizes, and what it computes and holds by arithmetic."""

import jax
from jax.sharding import Mesh

from fopd_jax.backbones.registry import find_preset
from fopd_jax.config.identity import config_hash
from fopd_jax.config.schema import OPD, Config
from fopd_jax.config.stages import is_mixed
from fopd_jax.parallel.sharding import AnyMesh
from fopd_jax.performance.problem import AbstractUpdate, Fields, Problem
from fopd_jax.performance.program import Program
from fopd_jax.performance.report import flops_fields
from fopd_jax.performance.weights import held_bytes, shard_bytes
from fopd_jax.stages.abstract import abstract_update, encoding_programs
from fopd_jax.stages.forward import attention_of
from fopd_jax.stages.grouping import asked_flops
from fopd_jax.stages.opd_update import update_cost
from fopd_jax.steps.opd.spec import STACK


def make_problem(config: Config, mesh: Mesh) -> Problem:
    """Build the update that a run of the config would build; reads no file and makes no weight.

    Raises:
      ValueError: a field is out of range, or names another stage; names it.
    """
    if not isinstance(config, OPD):
        raise ValueError(f"stage: found {config.stage!r}, expected 'opd'")
    _refuse_mixed(config)
    if config.networks:
        raise ValueError("networks: found some, expected none: the phases that are timed are those of one network")
    update = abstract_update(config, mesh)
    flops = update_cost(config, update.pieces.spec, _text_tokens(update), update.model)
    held = {"flops_per_chip": flops_fields(flops, mesh.size), "held_bytes": held_bytes(update)}
    return Problem(mesh, update, flops, _about(config, update, mesh) | held)


def opd_programs(config: OPD, mesh: AnyMesh) -> list[Program]:
    """The update, and with resident encoders what encodes a batch's prompts for it.

    Raises:
      ValueError: as `make_problem`.
    """
    _refuse_mixed(config)
    update, (family, shape) = abstract_update(config, mesh), find_preset(config.model.preset)
    cost = update_cost(config, update.pieces.spec, _text_tokens(update), update.model)
    tokens = family.tokens(shape, update.pieces.spec.latent_shape, _text_tokens(update))
    attention = attention_of(family.flops(shape, tokens, config.adapter, config.run.remat), shape)
    whole = Program("update", update.step, update.arguments, cost, {}, _networks(config, update), attention)
    return [whole, *encoding_programs(config, update.arguments[2].conditioning, mesh)]


def _about(config: OPD, update: AbstractUpdate, mesh: Mesh) -> Fields:
    spec, (family, shape) = update.pieces.spec, find_preset(config.model.preset)
    tokens = family.tokens(shape, spec.latent_shape, _text_tokens(update))
    return {
        "config": config.name,
        "config_hash": config_hash(config),
        "preset": config.model.preset,
        "dtype": config.model.dtype,
        "attention": update.model.impl,
        "remat": config.run.remat,
        "trained": config.trained,
        "teachers": len(spec.teachers),
        "anchor": spec.anchored,
        "guidance": spec.guidance,
        "batch_size": config.batch_size,
        "trained_timesteps": 1 if spec.one_timestep else spec.window[1] - spec.window[0],
        "tokens": {"image": tokens.image, "text": tokens.text},
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
    }


def _networks(config: OPD, update: AbstractUpdate) -> dict[str, tuple[float, int]]:
    """FLOPs of what an update asks of each of several networks, and the bytes a device holds of it."""
    spec, (frozen, _, _) = update.pieces.spec, update.arguments
    if not spec.grouped:
        return {}
    asked = asked_flops(config, spec, _text_tokens(update), update.model, {})
    asks = spec.teacher_steps * (1 if spec.one_timestep else spec.window[1] - spec.window[0])
    trees = {"": frozen.variables, STACK: frozen.bank, **frozen.networks}
    held = {name: sum(map(shard_bytes, jax.tree.leaves(trees[name]))) for name in asked}
    return {name or "base": (asks * asked[name], held[name]) for name in asked}


def _refuse_mixed(config: OPD) -> None:
    if is_mixed(config):
        raise ValueError("objective.name: found 'mixed', expected 'direct' or 'clipped', whose update is one program")


def _text_tokens(update: AbstractUpdate) -> int:
    return update.arguments[2].conditioning.context.shape[1]
