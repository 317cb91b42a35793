"""Stage `grpo`: a policy by Flow-GRPO, on rewards of the images that it draws."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config import learning as settings
from fopd_jax.parallel.distributed import put_replicated
from fopd_jax.parallel.sharding import batch_sharding, replicated
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.stage import Metrics
from fopd_jax.stages.abstract import abstract_base, encoded_tokens
from fopd_jax.stages.cards import Origin
from fopd_jax.stages.grpo_update import GRPOUpdate, make_spec, make_update, rollout_shapes, update_cost
from fopd_jax.stages.opd_update import MixedUpdate
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
from fopd_jax.stages.traced_scoring import TracedScoring
from fopd_jax.steps.grpo.spec import Base, Credit, Rollout
from fopd_jax.steps.grpo.step import Step, make_step, metric_names
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.state import TrainState
from fopd_jax.steps.visits import Pass, Sums, make_passes
from fopd_jax.tasks.prompts import read_tasks


class FlowGRPO:
    """The passes of `steps.grpo`, or others of their kind, driven one by one; `base`: what does not train."""

    def __init__(self, update: GRPOUpdate | MixedUpdate, base: Base | Frozen, batch_size: int) -> None:
        spec, mesh = update.pieces.spec, update.pieces.groups.mesh
        passes = make_passes(spec.updates_per_rollout, spec.minibatches, spec.micro_batches)
        whole = [jax.tree.map(lambda leaf, k=k: leaf[k], passes) for k in range(len(passes.part))]
        placed: list[Pass] = [put_replicated(each, replicated(mesh)) for each in whole]
        self._rolling, self._learning = placed[: spec.parts], placed[spec.parts :]
        self._programs, self._base = update.programs, base
        self._unscored = put_replicated(
            jax.tree.map(np.asarray, Credit.none(len(spec.rewards), batch_size, len(spec.tasks))), replicated(mesh)
        )

    def roll_out(self, state: TrainState, conditioning: Any) -> tuple[TrainState, tuple[Rollout, Sums]]:
        """Every part, by the state's policy."""
        progress = (state, *self._programs.begin(self._base, state, conditioning))
        for each in self._rolling:
            progress, _ = self._programs.go(self._base, progress, conditioning, self._unscored, each)
        return progress[0], progress[1:]

    def latents(self, rolled: tuple[Rollout, Sums]) -> Array:
        """Where the rollout ended."""
        return rolled[0].x

    def learn(
        self, state: TrainState, rolled: tuple[Rollout, Sums], conditioning: Any, credit: Credit
    ) -> tuple[TrainState, Metrics]:
        """All updates on a rollout."""
        progress, found = (state, *rolled), []
        for each in self._learning:
            progress, seen = self._programs.go(self._base, progress, conditioning, credit, each)
            found.append(seen)
        return self._programs.end(progress[0], credit, found)


def plan_grpo(config: settings.GRPO) -> ReinforcedPlan:
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
        rollout = rollout_shapes(spec, mesh, config.batch_size)
        return {"base": base, **trained_parts(update.trained.state), "rollout": rollout}

    def one(scoring: TracedScoring) -> Step:
        placed = update.trained.places, replicated(mesh), replicated(mesh), batch_sharding(mesh)
        return make_step(update.pieces, setup.optimizer, config.ema, scoring.credit, placed)

    tokens = partial(encoded_tokens, pipeline, config.model)
    names = (*metric_names(spec.rewards, spec.tasks), *METRICS)
    return ReinforcedPlan(
        setup, update.trained, lambda: stream.upto(config.run.steps), names, held,
        lambda: update_cost(config, spec, tokens(), pipeline.model), stream,
        lambda base: FlowGRPO(update, base, config.batch_size), one, given,
    )  # fmt: skip


class GRPO(ReinforcementLearning):
    """The stage."""

    def __init__(self, config: settings.GRPO, workdir: Path, run: Path | None = None) -> None:
        super().__init__(config, workdir, plan_grpo(config), origin, run)


def origin(config: settings.GRPO) -> Origin:
    """A policy is for use under the scale of its rollouts."""
    return Origin("flow_grpo", config.guidance, trained_rewards(config), config.rollouts.num_steps)
