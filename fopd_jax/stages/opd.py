"""Stage `opd`: one student distilled on-policy from many teachers, evaluated beside all of them."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fopd_jax.adapters.lora import rank_of
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config import schema as settings
from fopd_jax.config.identity import config_hash
from fopd_jax.config.stages import is_mixed
from fopd_jax.console import Progress, say
from fopd_jax.evaluation.report import RESULTS_FILE, SAMPLES_FILE, TABLE_FILE, Model, write_report
from fopd_jax.parallel.distributed import rows_of
from fopd_jax.parallel.sharding import batch_sharding
from fopd_jax.policy.panel import RoutingTable
from fopd_jax.policy.routing import TaskMixes
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.feed import Feed
from fopd_jax.running.journal import Journal
from fopd_jax.running.overview import Part
from fopd_jax.running.stage import Metrics
from fopd_jax.stages import teachers
from fopd_jax.stages.abstract import abstract_bank, abstract_base, encoded_tokens
from fopd_jax.stages.cards import Origin, make_card, settled
from fopd_jax.stages.check import describe_run
from fopd_jax.stages.cold_start import check_given, tell_start
from fopd_jax.stages.export import advise, export, export_name, exported_weights, exports
from fopd_jax.stages.grpo import FlowGRPO
from fopd_jax.stages.opd_update import (
    MixedUpdate,
    OPDUpdate,
    make_mixed,
    make_spec,
    make_update,
    mixes,
    scale_of,
    update_cost,
)
from fopd_jax.stages.plan import Plan, check_plan, trained_parts
from fopd_jax.stages.reinforced import METRICS, ReinforcementLearning, check_rewarded, make_scoring
from fopd_jax.stages.setup import RATE, describe_weights, make_setup, null_conditioning
from fopd_jax.steps.opd.mixed import mixed_names
from fopd_jax.steps.opd.pieces import metric_names
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.state import TrainState
from fopd_jax.tasks.prompts import read_tasks
from fopd_jax.worlds.prompt_stream import Batch, PromptStream


@dataclasses.dataclass(frozen=True)
class OPDPlan(Plan):
    """`stream`: of prompts; `teach()` loads the base and puts teachers and student's start beside it."""

    update: OPDUpdate | MixedUpdate
    stream: PromptStream
    teach: Callable[[], teachers.Teaching]


def plan_opd(config: settings.OPD) -> OPDPlan:
    """Everything that a run needs but its prompts' encodings and its weights.

    Raises:
      ValueError: names the field, file or key that is wrong.
    """
    config = settled(config)
    setup = make_setup(config, partial(read_tasks, config.tasks))
    pipeline, mesh = setup.pipeline, setup.pipeline.mesh
    latent_shape = pipeline.world.latent_shape
    boxed, spec = boxed_variables(pipeline.model, latent_shape), make_spec(config, latent_shape)
    make = make_mixed if is_mixed(config) else make_update
    update = make(config, pipeline.model, boxed, spec, setup.optimizer, mesh)
    if is_mixed(config):
        check_rewarded(config.tasks, pipeline.world)
    elif config.lag:
        raise ValueError(
            f"lag: found {config.lag}, expected 0: objective {config.objective.name!r} waits for no rewards"
        )
    taught = {name: scale_of(task.guidance) for name, task in config.tasks.items() if task.teacher}
    stream = PromptStream(
        pipeline.world, config.tasks, RoutingTable.of_tasks(taught, None).routes,
        batch_size=config.batch_size, images_per_prompt=config.images_per_prompt, seed=config.seed,
        rows=rows_of(batch_sharding(mesh), config.batch_size), mixes=soft_routes(config),
    )  # fmt: skip
    found, rank, trained = teachers.sources(config), config.adapter.rank, update.trained
    teachers.check_start(config, found)
    check_given(config, setup)
    if config.whole_teachers:
        teachers.check_networks(pipeline, found)
        teach = partial(teachers.teach_by_networks, config, pipeline, found)
    else:
        cards = teachers.check_cards(config, setup, found)
        adapters = teachers.load_adapters(config, pipeline, found, cards)
        start = teachers.start_shapes(config, pipeline, adapters)
        if config.trained == "adapter":
            trained = trained.sized(start, setup.optimizer, config.seed)
        teach = partial(teachers.teach_by_adapters, config, pipeline, adapters)
        rank = max(map(rank_of, adapters.values()))

    def held() -> dict[str, Tree]:
        base = abstract_base(boxed, jnp.dtype(config.model.dtype), mesh)
        bank = abstract_bank(config, boxed, spec, mesh, pipeline.family.targets, rank)
        return {"base": base, "bank": bank, **trained_parts(trained.state)}

    tokens = partial(encoded_tokens, pipeline, config.model)
    names = (*mixed_names(spec), *METRICS) if is_mixed(config) else (*metric_names(spec.teachers), RATE)
    return OPDPlan(
        setup, trained, lambda: stream.upto(config.run.steps), names, held,
        lambda: update_cost(config, spec, tokens(), pipeline.model), update, stream, teach,
    )  # fmt: skip


def soft_routes(config: settings.OPD) -> TaskMixes | None:
    """Where prompts have several teachers, their weights.

    Raises:
      ValueError: as `TaskMixes`.
    """
    weights = {name: (task.mix, task.noisy_mix) for name, task in config.tasks.items()}
    return TaskMixes(tuple(config.tasks), weights) if mixes(config) else None


class Distillation:
    """The stage but for its step, see `running.stage.Stage`."""

    def __init__(self, config: settings.OPD, workdir: Path, run: Path | None = None) -> None:
        plan = plan_opd(config)
        check_plan(plan, config, workdir)
        say(describe_run(plan, config, workdir))
        self.config, self.workdir, self.run = config, workdir, run or workdir
        self.setup, self.pipeline, self.update = plan.setup, plan.setup.pipeline, plan.update
        self.trained = plan.trained
        plan.prepare()  # before the base: text encoders and network need not be in memory together
        say("loading base and teachers")
        self.teaching = plan.teach()
        self.frozen = Frozen(self.teaching.variables, self.teaching.bank, null_conditioning(self.pipeline))
        sharding, self.prompts = batch_sharding(self.pipeline.mesh), plan.stream
        self.feed = Feed(plan.stream.batch, sharding, config.batch_size, config.run.steps)

    @property
    def outputs(self) -> dict[str, str]:
        """What `finish` writes."""
        student = exports(export_name(self.config), f"the student: {self.config.export}", self.whole, self.pipeline)
        pictures = {SAMPLES_FILE: "every model on the same prompts"}
        if not self.setup.eval_set.scored():
            return student | pictures
        return student | pictures | {RESULTS_FILE: "mean scores of every model", TABLE_FILE: "the same, as a table"}

    @property
    def whole(self) -> bool:
        """Whether all of the network trains."""
        return self.config.trained == "params"

    @property
    def samples(self) -> int:
        """Of one update."""
        return self.config.batch_size

    @property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; an adapter's rank is its start's."""
        return self.trained.state

    def start(self) -> TrainState:
        """The state of step 0, born in its shards."""
        if self.config.cold_start.method == "merge":
            say("merging the teachers into the student's start")
        start = self.teaching.start(partial(tell_start, self.config, self.workdir))
        return self.trained.born(start, self.setup.optimizer, self.config.seed)

    def describe(self) -> None:
        """Print what trains and what does not."""
        experts = [*self.config.tasks, self.config.anchor.name]
        bank = Part(f"frozen: {len(experts)} in the bank", self.frozen.bank)
        describe_weights(self.workdir, self.config, self.state, self.frozen.variables, bank)

    def embedded(self, batch: Batch) -> Batch:
        """A batch as updates take it."""
        return Batch(self.pipeline.world.embed(batch.conditioning), batch.route)

    def batch(self, step: int) -> Tree:
        """The whole batch, on every process."""
        return self.feed.whole(step)

    def explain(self, step: int, rows: Sequence[int]) -> list[str]:
        """Tasks and prompts."""
        return self.prompts.describe(step, rows)

    def draw(self, state: TrainState) -> dict[str, np.ndarray]:
        """What the averaged student draws."""
        return self.setup.draw(self.model(state.ema))

    def model(self, trained: Tree) -> Model:
        """The student with these weights, to sample from."""
        return Model("student", *self.update.trained.student.policy(self.frozen.variables, trained))

    def evaluate(self, state: TrainState, progress: Progress) -> dict[str, float]:
        """Mean scores of the averaged student on the periodic evaluation's pairs."""
        return self.setup.evaluate(self.model(state.ema), progress)

    def advise(self, source: str) -> list[str]:
        """What to do with the student."""
        return advise(self.workdir, export_name(self.config), self.whole, self.pipeline, source)

    def finish(self, state: TrainState) -> None:
        """Export the student (averaged weights, or raw on request) and report it beside base, teachers and merge.

        The rewards end with it: the loop has closed the stage before.
        """
        student = exported_weights(self.config, state)
        name, constants = export_name(self.config), self.frozen.variables["constants"]
        card = make_card(self.config, self.pipeline, self.setup.base, origin, int(state.step), self.run)
        export(self.workdir, name, student, constants, self.pipeline, self.config.model, card)
        models = [*self.teaching.models(), self.model(student)]
        about = {"seed": self.config.seed, "steps": int(state.step), "config_hash": config_hash(self.config)}
        most = self.config.run.max_failed_rewards
        with contextlib.closing(self.setup) as setup:
            write_report(self.workdir, self.config.eval, about, setup.sampler, self.pipeline.world, models, most)


class OPD(Distillation):
    """The stage, where the update is one program."""

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """One jitted program."""
        batch, measured = self.feed(step), self.setup.measured(state)
        assert isinstance(self.update, OPDUpdate)
        state, metrics = self.update.step(self.frozen, state, self.embedded(batch))
        return state, {**metrics, **measured}

    def drain(self) -> None:
        """Nothing is ever in flight but the update itself."""

    def close(self) -> None:
        """End the thread that makes batches ahead."""
        self.feed.close()


class MixedOPD(Distillation, ReinforcementLearning):
    """The stage of objective 'mixed': steps of reinforcement learning, all else of distillation."""

    def __init__(self, config: settings.OPD, workdir: Path, run: Path | None = None) -> None:
        Distillation.__init__(self, config, workdir, run)
        assert isinstance(self.update, MixedUpdate)
        self.method = FlowGRPO(self.update, self.frozen, config.batch_size)
        self.journal = Journal(workdir, jax.process_index())
        self.scoring = make_scoring(config, self.pipeline, self.journal)
        self.ahead = None

    def draw(self, state: TrainState) -> dict[str, np.ndarray]:
        """What the averaged student draws, and a group of the rollouts that it learns from."""
        return {**Distillation.draw(self, state), **self.scoring.picture()}


def make_opd(config: settings.OPD, workdir: Path, run: Path | None = None) -> OPD | MixedOPD:
    """The stage that a config's objective needs."""
    return (MixedOPD if is_mixed(config) else OPD)(config, workdir, run)


def origin(config: settings.OPD) -> Origin:
    """A student is for use under the scale that it learned with."""
    return Origin("opd", config.guidance, train_steps=config.sampler.num_steps)
