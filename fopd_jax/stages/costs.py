"""What one step of a config costs, from shapes alone: nothing is read, made or compiled."""

import dataclasses

from jax.sharding import AbstractMesh

from fopd_jax.config.learning import GRPO, ForwardRL
from fopd_jax.config.schema import OPD, FlowMatching
from fopd_jax.config.stages import StageConfig
from fopd_jax.parallel.mesh import AXES
from fopd_jax.performance.flops import Update
from fopd_jax.stages import flow_matching_update, forward_rl_update, grpo_update, opd_update
from fopd_jax.stages.abstract import abstract_model, world_shapes


def step_cost(config: StageConfig) -> Update:
    """FLOPs of a step on all devices, by each stage's own `update_cost`.

    Raises:
      ValueError: a field is out of range; names it.
    """
    run = dataclasses.replace(config.run, attention="xla")  # costs the same, and nothing has to be chosen
    config = dataclasses.replace(config, run=run)
    latent_shape, encoded = world_shapes(config.model)
    model = abstract_model(config, AbstractMesh((1, 1, 1), AXES))
    tokens = encoded.context.shape[0]
    match config:
        case OPD():
            return opd_update.update_cost(config, opd_update.make_spec(config, latent_shape), tokens, model)
        case GRPO():
            return grpo_update.update_cost(config, grpo_update.make_spec(config, latent_shape), tokens, model)
        case ForwardRL():
            spec = forward_rl_update.make_spec(config, latent_shape)
            return forward_rl_update.update_cost(config, spec, tokens, model)
        case FlowMatching():
            return flow_matching_update.update_cost(config, latent_shape, tokens, model)
    raise AssertionError(config)
