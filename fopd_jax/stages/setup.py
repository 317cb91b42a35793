"""What every stage builds from a config before its own step: pipeline, optimizer, evaluation."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
from clu import parameter_overview

from fopd_jax.adapters.lora import LoRAConfig
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.identity import Config
from fopd_jax.evaluation.report import Model, sample_grid
from fopd_jax.evaluation.suite import EvalSet, Sampler, make_sampler
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import make_transition
from fopd_jax.parallel.sharding import check_batch
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.loop import Cadence
from fopd_jax.stages.pipeline import Pipeline, make_pipeline
from fopd_jax.steps.state import EMA, make_optimizer
from fopd_jax.worlds.world import embed_empty, select_tasks


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts that do not depend on the stage."""

    pipeline: Pipeline
    sampler: Sampler
    eval_set: EvalSet
    optimizer: optax.GradientTransformation
    ema: EMA
    cadence: Cadence

    def draw(self, model: Model) -> dict[str, np.ndarray]:
        """One row of the evaluation's pictures, for the metrics."""
        return {"samples": np.asarray(sample_grid(self.sampler, self.pipeline.world, self.eval_set, [model]))}


def make_setup(config: Config, cache: Path | None = None) -> Setup:
    """Check the shared fields and build from them; `cache`: folder of encoded prompts, see `make_pipeline`.

    Raises:
      ValueError: a field is out of range or names something that does not exist; before anything is compiled.
    """
    cadence = Cadence(config.steps, config.log_every, config.checkpoint_every, config.eval_every)
    if config.keep_checkpoints < 1:
        raise ValueError(f"keep_checkpoints: found {config.keep_checkpoints}, expected at least 1")
    pipeline, evaluation = make_pipeline(config, cache), config.eval
    if evaluation.samples < 1 or evaluation.batch_size < 1:
        raise ValueError(
            f"eval.samples, eval.batch_size: found {evaluation.samples}, {evaluation.batch_size}, expected ≥ 1"
        )
    tasks = select_tasks(pipeline.world, evaluation.tasks)
    return Setup(
        pipeline=pipeline,
        sampler=eval_sampler(config, pipeline),
        eval_set=EvalSet(tasks, evaluation.samples, evaluation.batch_size, evaluation.seed),
        optimizer=config_optimizer(config),
        ema=EMA(config.ema.decay, config.ema.every),
        cadence=cadence,
    )


def eval_sampler(config: Config, pipeline: Pipeline) -> Sampler:
    """The sampler that the config's `eval` fields describe.

    Raises:
      ValueError: as `make_transition`, `flow_match_sigmas` and `check_batch`.
    """
    evaluation = config.eval
    check_batch("eval.batch_size", evaluation.batch_size, pipeline.mesh)
    return make_sampler(
        pipeline.velocity,
        make_transition(evaluation.transition, evaluation.noise_level),
        flow_match_sigmas(evaluation.num_steps, config.shift),
        evaluation.guidance,
        pipeline.world.latent_shape,
        pipeline.mesh,
    )


def null_conditioning(pipeline: Pipeline) -> Conditioning:
    """The empty prompt, one row, on every device."""
    return embed_empty(pipeline.world, pipeline.mesh)


def config_optimizer(config: Config) -> optax.GradientTransformation:
    opt = config.optimizer
    return make_optimizer(opt.learning_rate, opt.warmup, tuple(opt.betas), opt.weight_decay, opt.clip_norm)


def lora_config(config: Config) -> LoRAConfig:
    return LoRAConfig(config.adapter.rank, config.adapter.alpha, tuple(config.adapter.targets))


def print_overview(title: str, trained: Tree, frozen: Tree) -> None:
    """What trains, parameter by parameter, and how much is frozen."""
    count = sum(leaf.size for leaf in jax.tree.leaves(frozen))
    print(f"{title}\n{parameter_overview.get_parameter_overview(trained, include_stats=False)}\nfrozen: {count:,}")
