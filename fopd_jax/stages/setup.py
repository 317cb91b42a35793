"""What every stage builds from a config before its own step: pipeline, optimizer, evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.learning import RewardedTask
from fopd_jax.config.rules import within
from fopd_jax.config.schema import Config, Evaluation, Pairs, RoutedTask
from fopd_jax.config.stages import StageConfig, trains_on_rewards
from fopd_jax.console import Progress
from fopd_jax.console import progress as show_progress
from fopd_jax.evaluation.report import Model, sample_grid
from fopd_jax.evaluation.sampler import Sampler, make_sampler
from fopd_jax.evaluation.score import EvalSet, check_failures, evaluate, reader
from fopd_jax.evaluation.settings import other_settings
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.solver import make_solver
from fopd_jax.parallel.distributed import warn
from fopd_jax.parallel.sharding import batch_ways
from fopd_jax.policy.velocity import Tree
from fopd_jax.rewards.registry import close_all
from fopd_jax.running.overview import Part, write_overview
from fopd_jax.stages.cards import base_hash
from fopd_jax.stages.coordinates import check_coordinates
from fopd_jax.stages.pipeline import Pipeline, check_base, make_pipeline
from fopd_jax.stages.rewards import furnish
from fopd_jax.steps.state import TrainState, learning_rate, make_optimizer
from fopd_jax.tasks.prompts import read_tasks
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World, embed_empty, select_tasks

RATE = "learning_rate"
"""A metric of every stage: of the update's first step of the optimizer, where it has several."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts that do not depend on the stage.

    `base`: which weights the base is, see `base_hash`. `rate`: of the optimizer's state, the learning rate of its next
    update; a program of its own, so that the updates of all stages have the same metric. `others`: samplers at the
    report's other settings, compiled when it comes to them.
    """

    pipeline: Pipeline
    base: str
    sampler: Sampler
    eval_set: EvalSet
    optimizer: optax.GradientTransformation
    rate: Callable[[Tree], jax.Array]
    others: Mapping[str, Sampler] = dataclasses.field(default_factory=dict)

    def measured(self, state: TrainState) -> dict[str, jax.Array]:
        """Metrics of the coming update that are known from the state before it."""
        return {RATE: self.rate(state.opt_state)}

    def evaluate(self, model: Model, progress: Progress) -> dict[str, float]:
        """Mean scores on the periodic evaluation's pairs, of the tasks that something measures; failures are told.

        Beside them `monitors/…`, means of what reward hacking looks like, and `rewards/…`, how fast rewards were.

        Raises:
          FloatingPointError: as `check_failures`.
          ValueError: an image is not finite.
        """
        pairs = self.eval_set
        with show_progress("evaluation", len(pairs.scored()) * pairs.samples, "images") as count:

            def both(done: int) -> None:
                count(done)
                progress(done)

            found = evaluate(self.sampler, self.pipeline.world, pairs, *model.policy, both)
        for line in found.told():
            warn(f"evaluation: {line}")
        check_failures(found, pairs.max_failed)
        return {**found.means(), **found.seen(), **found.clocked}

    def draw(self, model: Model) -> dict[str, np.ndarray]:
        """One row of the evaluation's pictures, for the metrics."""
        return {"samples": np.asarray(sample_grid(self.sampler, self.pipeline.world, self.eval_set, [model]))}

    def close(self) -> None:
        """End what the rewards have started."""
        close_all(self.pipeline.world.rewards)


def make_setup(config: StageConfig, tasks: Callable[[], Mapping[str, Task]]) -> Setup:
    """Build what every stage needs; `tasks`: see `make_pipeline`.

    Raises:
      ValueError: a field names something that does not exist, or does not fit the machine; before anything is compiled.
    """
    check_coordinates(config)
    pipeline, evaluation = make_pipeline(config.model, config.run, tasks), config.eval
    _refuse_files(config.tasks, pipeline)
    if pipeline.manifest is None:
        pipeline = dataclasses.replace(pipeline, world=_with_tasks(pipeline.world, config.tasks))
    check_base(config.model, pipeline)  # first: a damaged base is nobody's
    names = tuple(select_tasks(pipeline.world, evaluation.tasks or tuple(pipeline.world.tasks), "eval.tasks"))
    trains = trains_on_rewards(config)  # also on those of tasks that are not evaluated
    others = {name for task in config.tasks.values() for name in task.rewards if trains}
    pipeline = dataclasses.replace(pipeline, world=furnish(config, pipeline.world, names, others))
    chosen = select_tasks(pipeline.world, names)
    return Setup(
        pipeline=pipeline,
        base=base_hash(config.model),
        sampler=eval_sampler(evaluation, config.model.shift, pipeline),
        eval_set=EvalSet(
            chosen,
            evaluation.samples,
            evaluation.batch_size,
            evaluation.seed,
            batch_ways(pipeline.mesh),
            config.run.max_failed_rewards,
            monitored=True,
            read=reader(evaluation, pipeline.world),
        ),
        optimizer=make_optimizer(config.optimizer),
        rate=jax.jit(partial(learning_rate, config.optimizer)),
        others=other_samplers(evaluation, config.model.shift, pipeline),
    )


def _refuse_files(tasks: Mapping[str, RoutedTask | RewardedTask | Pairs], pipeline: Pipeline) -> None:
    """Refuse files of prompts for tasks whose prompts are a world's own.

    Raises:
      ValueError: names the field.
    """
    own = pipeline.world.tasks if pipeline.manifest is None else {}
    for name, task in tasks.items():
        for field in ("prompts", "test") if name in own else ():
            if found := getattr(task, field, ""):
                whose = f"preset {pipeline.preset!r} has prompts of its own"
                raise ValueError(f"tasks.{name}.{field}: found {found!r}, expected '': {whose}")


def _with_tasks(world: World, tasks: Mapping[str, RoutedTask | RewardedTask | Pairs]) -> World:
    """A world with the tasks that a config adds to its own: of other names, with prompts that it can read."""
    added = {
        name: task
        for name, task in tasks.items()
        if name not in world.tasks and not isinstance(task, Pairs) and task.prompts
    }
    return dataclasses.replace(world, tasks={**world.tasks, **read_tasks(added)}) if added else world


def eval_sampler(evaluation: Evaluation, shift: float, pipeline: Pipeline, *, traced: bool = False) -> Sampler:
    """The sampler that the section `eval` describes; `traced`: see `make_sampler`.

    Raises:
      ValueError: as `make_solver` and `flow_match_sigmas`.
    """
    with within("eval"):
        solver = make_solver(evaluation.transition, evaluation.noise_level)
    return make_sampler(
        pipeline.velocity,
        solver,
        flow_match_sigmas(evaluation.num_steps, shift),
        evaluation.guidance,
        pipeline.world.latent_shape,
        pipeline.mesh,
        traced=traced,
    )


def other_samplers(evaluation: Evaluation, shift: float, pipeline: Pipeline) -> dict[str, Sampler]:
    """The same at the report's other settings."""
    return {
        name: eval_sampler(dataclasses.replace(evaluation, num_steps=steps, guidance=scale), shift, pipeline)
        for name, (steps, scale) in other_settings(evaluation).items()
    }


def samplers_at(
    evaluation: Evaluation, shift: float, pipeline: Pipeline, guidance: float
) -> tuple[Sampler, dict[str, Sampler]]:
    """The report's sampler and those at its other settings, all under one guidance scale: one a number of steps."""
    at = functools.cache(
        lambda steps: eval_sampler(
            dataclasses.replace(evaluation, num_steps=steps, guidance=guidance), shift, pipeline
        )
    )  # fmt: skip
    return at(evaluation.num_steps), {name: at(steps) for name, (steps, _) in other_settings(evaluation).items()}


def null_conditioning(pipeline: Pipeline) -> Conditioning:
    """The empty prompt, one row, on every device."""
    return embed_empty(pipeline.world, pipeline.mesh)


def describe_weights(workdir: Path, config: Config, state: TrainState, variables: Tree, *others: Part) -> None:
    """Print what trains and what is frozen, and write every array of it to a file.

    `state`: arrays or shapes; `variables`: the frozen ones of the network; `others`: what else is frozen.
    """
    whole = config.trained == "params"
    frozen = {**variables.get("params", {}), **variables["constants"]}
    parts = (
        Part(f"trains: {config.trained}", state.trained if whole else state.trained.weights, stacks=True),
        Part("its moments and average", (state.opt_state, state.ema)),
        *([] if state.old is None else [Part("its old copy", state.old)]),
        Part("frozen: network", frozen, stacks=True),
        *others,
    )
    write_overview(workdir, config.name, parts)
