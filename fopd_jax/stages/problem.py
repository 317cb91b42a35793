"""Which update is measured: a config in other sizes, and what it computes and holds by arithmetic."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from fopd_jax.backbones.registry import find_preset
from fopd_jax.config.identity import config_hash
from fopd_jax.config.schema import OPD, Config
from fopd_jax.performance.flops import Update
from fopd_jax.performance.report import flops_fields
from fopd_jax.performance.weights import held_bytes
from fopd_jax.stages.abstract import AbstractUpdate, abstract_update
from fopd_jax.stages.opd_update import update_cost

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """An update as shapes on a mesh, and its analytic FLOPs on all chips together."""

    config: OPD
    mesh: Mesh
    update: AbstractUpdate
    flops: Update


def make_problem(config: Config, mesh: Mesh) -> Problem:
    """Build the update that a run of the config would build; reads no file and makes no weight.

    Raises:
      ValueError: a field is out of range, or names another stage; names it.
    """
    if not isinstance(config, OPD):
        raise ValueError(f"stage: found {config.stage!r}, expected 'opd'")
    update = abstract_update(config, mesh)
    return Problem(config, mesh, update, update_cost(config, update.update.pieces.spec, _text_tokens(update)))


def problem_fields(problem: Problem) -> Fields:
    """What is computed, its FLOPs a chip, and the bytes that a chip holds for it."""
    config, update, mesh = problem.config, problem.update, problem.mesh
    spec, (family, shape) = update.update.pieces.spec, find_preset(config.model.preset)
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
        "flops_per_chip": flops_fields(problem.flops, mesh.size),
        "held_bytes": held_bytes(update),
    }


def _text_tokens(update: AbstractUpdate) -> int:
    return update.arguments[2].conditioning.context.shape[1]
