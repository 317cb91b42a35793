"""Stage `forward_rl`: a policy by reinforcement on the forward process, on rewards of what an older one draws."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config import learning as settings
from fopd_jax.parallel.sharding import batch_sharding
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.stage import Metrics
from fopd_jax.stages.abstract import abstract_base, encoded_tokens
from fopd_jax.stages.cards import Origin
from fopd_jax.stages.forward_rl_update import ForwardUpdate, make_spec, make_update, update_cost
from fopd_jax.stages.plan import trained_parts
from fopd_jax.stages.reinforced import (
    METRICS,
    ReinforcedPlan,
    ReinforcementLearning,
    make_stream,
    read_beginning,
    trained_rewards,
)
from fopd_jax.stages.setup import make_setup
from fopd_jax.steps.forward_rl import metric_names
from fopd_jax.steps.grpo.spec import Base, Credit
from fopd_jax.steps.state import TrainState
from fopd_jax.tasks.prompts import read_tasks


class ForwardProcess:
    """Both programs of `steps.forward_rl`; what is rolled out is final latents."""

    def __init__(self, update: ForwardUpdate, base: Base) -> None:
        self._programs, self._base = update.programs, base

    def roll_out(self, state: TrainState, conditioning: Conditioning) -> tuple[TrainState, Array]:
        """By the state's old policy."""
        return state, self._programs.roll_out(self._base, state, conditioning)

    def latents(self, rolled: Array) -> Array:
        """What was rolled out."""
        return rolled

    def learn(
        self, state: TrainState, rolled: Array, conditioning: Conditioning, credit: Credit
    ) -> tuple[TrainState, Metrics]:
        """All updates on a rollout."""
        return self._programs.learn(self._base, state, rolled, conditioning, credit)


def plan_forward_rl(config: settings.ForwardRL) -> ReinforcedPlan:
    """Everything that a run needs but its prompts' encodings and its weights.

    Raises:
      ValueError: names the field, file or key that is wrong.
    """
    setup = make_setup(config, partial(read_tasks, config.tasks))
    given = read_beginning(config, setup)
    pipeline, mesh = setup.pipeline, setup.pipeline.mesh
    latent_shape = pipeline.world.latent_shape
    boxed, spec = boxed_variables(pipeline.model, latent_shape), make_spec(config, latent_shape)
    update = make_update(config, pipeline.model, boxed, spec, setup.optimizer, mesh)
    stream = make_stream(config, pipeline.world, mesh)

    def held() -> dict[str, Tree]:
        base = abstract_base(boxed, jnp.dtype(config.model.dtype), mesh)
        shape, places = (config.batch_size, *latent_shape), batch_sharding(mesh)
        rollout = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=places)
        return {"base": base, **trained_parts(update.trained.state), "rollout": rollout}

    tokens = partial(encoded_tokens, pipeline, config.model)
    names = metric_names(spec)
    return ReinforcedPlan(
        setup, update.trained, lambda: stream.upto(config.run.steps), (*names, *METRICS), held,
        lambda: update_cost(config, spec, tokens(), pipeline.model), stream,
        lambda base: ForwardProcess(update, base), given=given,
    )  # fmt: skip


class ForwardRL(ReinforcementLearning):
    """The stage."""

    def __init__(self, config: settings.ForwardRL, workdir: Path, run: Path | None = None) -> None:
        super().__init__(config, workdir, plan_forward_rl(config), origin, run)


ALGORITHMS = {"nft": "diffusion_nft", "awm": "awm", "crd": "crd"}


def origin(config: settings.ForwardRL) -> Origin:
    """A policy is for use under the scale of its rollouts."""
    name = ALGORITHMS[config.objective.name]
    return Origin(name, config.guidance, trained_rewards(config), config.rollouts.num_steps)
