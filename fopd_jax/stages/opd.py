"""Stage `opd`: one student distilled on-policy from many teachers, evaluated beside all of them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fopd_jax.adapters.lora import rank_of
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config import schema as settings
from fopd_jax.config.identity import config_hash
from fopd_jax.config.stages import is_mixed, taught
from fopd_jax.console import Progress, say
from fopd_jax.evaluation.model_card import CARD_FILE
from fopd_jax.evaluation.report import RESULTS_FILE, SAMPLES_FILE, TABLE_FILE, Model, write_report
from fopd_jax.files import write_png
from fopd_jax.parallel.distributed import is_main, rows_of
from fopd_jax.parallel.sharding import batch_sharding
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.feed import Feed
from fopd_jax.running.journal import Journal
from fopd_jax.running.overview import Part
from fopd_jax.running.stage import Metrics
from fopd_jax.stages import networks, teachers
from fopd_jax.stages.abstract import abstract_bank, abstract_base, abstract_other, encoded_tokens
from fopd_jax.stages.cards import Origin, make_card, settled
from fopd_jax.stages.check import describe_run
from fopd_jax.stages.cold_start import check_start, tell_start
from fopd_jax.stages.coordinates import drawn_coordinates, skills, turned
from fopd_jax.stages.export import advise, export, export_name, exported_weights, exports
from fopd_jax.stages.grouping import check_slots, placement
from fopd_jax.stages.grpo import FlowGRPO
from fopd_jax.stages.health import PICTURE, asked_prompts, trust, watch_health
from fopd_jax.stages.model_card import write_model_card
from fopd_jax.stages.offline import embedded_batch, fed_rows, make_offline
from fopd_jax.stages.opd_update import (
    MixedUpdate,
    OPDUpdate,
    make_mixed,
    make_spec,
    make_update,
    update_cost,
)
from fopd_jax.stages.pipeline import Pipeline
from fopd_jax.stages.plan import Plan, check_plan, trained_parts
from fopd_jax.stages.reinforced import METRICS, ReinforcementLearning, check_rewarded, make_scoring
from fopd_jax.stages.routing import Routed, is_told, make_routing
from fopd_jax.stages.setup import RATE, describe_weights, make_setup, null_conditioning
from fopd_jax.steps.opd.gaps import gap_names
from fopd_jax.steps.opd.mixed import mixed_names
from fopd_jax.steps.opd.pieces import metric_names, regular_names
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.opd.targets import UNANSWERED
from fopd_jax.steps.state import TrainState
from fopd_jax.tasks.prompts import read_tasks
from fopd_jax.worlds.prompt_stream import Batch, PromptStream
from fopd_jax.worlds.world import CaptionedLatents


@dataclasses.dataclass(frozen=True)
class OPDPlan(Plan):
    """`stream`: of prompts; `pairs`: captioned latents beside them. `teach()` loads the base and puts teachers and
    student's start beside it.
    """

    update: OPDUpdate | MixedUpdate
    stream: PromptStream
    pairs: CaptionedLatents | None
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
    boxed, spec = boxed_variables(pipeline.model, latent_shape), make_spec(config, latent_shape, mesh)
    others = networks.make_others(config, setup)
    make = make_mixed if is_mixed(config) else make_update
    update = make(config, pipeline.model, boxed, spec, setup.optimizer, mesh, networks.voices(others))
    if is_mixed(config):
        check_rewarded(config.tasks, pipeline.world)
    elif config.lag:
        raise ValueError(
            f"lag: found {config.lag}, expected 0: objective {config.objective.name!r} waits for no rewards"
        )
    routed = make_routing(config, pipeline.world)
    stream = _stream(config, pipeline, routed, spec)
    pairs = make_offline(config, pipeline)
    found, rank, trained = teachers.sources(config), config.adapter.rank, update.trained
    teachers.check_start(config, found)
    check_start(config, setup)
    if config.whole_teachers:
        teachers.check_networks(pipeline, found)
        teach = partial(teachers.teach_by_networks, config, pipeline, found)
    else:
        cards = teachers.check_cards(config, setup, found.of(""))
        adapters = teachers.load_adapters(config, pipeline, found.of(""), cards)
        start = teachers.start_shapes(config, pipeline, adapters)
        if config.trained == "adapter":
            trained = trained.sized(start, setup.optimizer, config.seed)
        teach = partial(teachers.teach_by_adapters, config, pipeline, adapters)
        if others:
            teach = partial(networks.teach_by_others, config, pipeline, adapters, others)
        rank = max(map(rank_of, adapters.values()), default=rank)

    def held() -> dict[str, Tree]:
        base = abstract_base(boxed, jnp.dtype(config.model.dtype), mesh)
        bank = abstract_bank(config, boxed, spec, mesh, pipeline.family.targets, rank)
        return {"base": base, "bank": bank, **_held(config, others), **trained_parts(trained.state)}

    fixed, shapes = asked_prompts(config, pipeline.world), {name: each.pipeline.model for name, each in others.items()}
    tokens = partial(encoded_tokens, pipeline, config.model)

    def drawn() -> Iterator[str]:
        yield from stream.upto(config.run.steps)
        yield from fixed
        yield from () if pairs is None else pairs.upto(config.run.steps)

    return OPDPlan(
        setup, trained, drawn, _metrics(config, spec), held,
        lambda: update_cost(config, spec, tokens(), pipeline.model, shapes), update, stream, pairs, teach,
        told=[("routing", routed.told)] if is_told(config) else [],
    )  # fmt: skip


def _stream(config: settings.OPD, pipeline: Pipeline, routed: Routed, spec: OPDSpec) -> PromptStream:
    """The prompts, each with whoever teaches it; of several networks no device is asked for more than it has slots."""
    mesh = pipeline.mesh
    stream = PromptStream(
        pipeline.world, config.tasks, routed.routes,
        batch_size=config.batch_size, images_per_prompt=config.images_per_prompt, seed=config.seed,
        rows=rows_of(batch_sharding(mesh), config.batch_size), mixes=routed.mixes, read=routed.read,
        dials=drawn_coordinates(config), placement=placement(config, spec, mesh),
        alternate=config.alternate,
    )  # fmt: skip
    for step in {turn * config.alternate for turn in range(len(config.tasks))}:
        check_slots(config, spec, mesh, stream.draw(step)[0])
    return stream


def _metrics(config: settings.OPD, spec: OPDSpec) -> tuple[str, ...]:
    """Names of what an update returns."""
    if is_mixed(config):
        return (*mixed_names(spec), *METRICS)
    slots = (UNANSWERED,) * (spec.slots is not None)
    return (*metric_names(spec.teachers, gap_names(spec)), *regular_names(spec), RATE, *slots)


def _held(config: settings.OPD, others: Mapping[str, networks.Other]) -> dict[str, Tree]:
    """What the devices hold of networks beside the base, as shapes."""
    found = {}
    for name, other in others.items():
        pipeline, adapted = other.pipeline, any(each is not None for each in other.teachers.values())
        place = pipeline.family, pipeline.model, pipeline.mesh, pipeline.world.latent_shape
        found[f"network {name}"] = abstract_other(config, other.settings, *place, len(other.teachers) * adapted)
    return found


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
        null, teaching = null_conditioning(self.pipeline), self.teaching
        self.frozen = Frozen(teaching.variables, teaching.bank, null, networks=teaching.networks)
        self.health = watch_health(config, plan.update.pieces, self.pipeline, self.frozen)
        self.frozen = dataclasses.replace(self.frozen, trust=trust(config, self.health, self.pipeline))
        mesh, self.prompts = self.pipeline.mesh, plan.stream
        rows, sizes = fed_rows(plan.stream, plan.pairs, config, mesh)
        self.feed = Feed(rows, batch_sharding(mesh), sizes, config.run.steps)

    @property
    def outputs(self) -> dict[str, str]:
        """What `finish` writes."""
        name, dials = export_name(self.config), bool(skills(self.config))
        student = exports(name, f"the student: {self.config.export}", self.whole, self.pipeline, dials=dials)
        pictures = {CARD_FILE: "the model card", SAMPLES_FILE: "every model on the same prompts"}
        if self.health:
            pictures[PICTURE] = "who disagrees with whom, and the gap by noise level, at fixed states"
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
        spec = self.update.pieces.spec
        experts = len(taught(self.config)) + 1 + teachers.asks_base(self.config)
        count = len(spec.members.get("", ())) if self.frozen.networks else experts
        bank = Part(f"frozen: {count} in the bank", self.frozen.bank)
        others = (Part(f"frozen: network {name}", tree) for name, tree in self.frozen.networks.items())
        describe_weights(self.workdir, self.config, self.state, self.frozen.variables, bank, *others)

    def embedded(self, batch: Any) -> Batch:
        """A batch as updates take it, of what the feed gives."""
        return embedded_batch(self.pipeline.world.embed, batch)

    def batch(self, step: int) -> Tree:
        """The whole batch, on every process."""
        return self.feed.whole(step)

    def explain(self, step: int, rows: Sequence[int]) -> list[str]:
        """Tasks and prompts."""
        return self.prompts.describe(step, rows)

    def draw(self, state: TrainState) -> dict[str, np.ndarray]:
        """What the averaged student draws."""
        health = {"health": np.asarray(self.health.picture())} if self.health else {}
        return self.setup.draw(self.model(state.ema)) | health

    def model(self, trained: Tree) -> Model:
        """The student with these weights, to sample from; at the coordinates of the evaluation, if it has some."""
        variables, adapter = self.update.trained.student.policy(self.frozen.variables, trained)
        return Model("student", variables, turned(skills(self.config), self.config.eval, adapter))

    def evaluate(self, state: TrainState, progress: Progress) -> dict[str, float]:
        """Mean scores of the averaged student on the periodic evaluation's pairs."""
        scores = self.setup.evaluate(self.model(state.ema), progress)
        return scores | (self.health.measure(self.frozen, state.ema) if self.health else {})

    def advise(self, source: str) -> list[str]:
        """What to do with the student."""
        return advise(self.workdir, export_name(self.config), self.whole, self.pipeline, source, skills(self.config))

    def finish(self, state: TrainState) -> None:
        """Export the student (averaged weights, or raw on request) and report it beside base, teachers and merge.

        The rewards end with it: the loop has closed the stage before.
        """
        student = exported_weights(self.config, state)
        name, constants = export_name(self.config), self.frozen.variables["constants"]
        card = make_card(self.config, self.pipeline, self.setup.base, origin, int(state.step), self.run)
        card = export(self.workdir, name, student, constants, self.pipeline, self.config.model, card)
        about = {"seed": self.config.seed, "steps": int(state.step), "config_hash": config_hash(self.config)}
        if self.health:
            about["gaps"] = self.health.gaps(self.frozen, student)
            if is_main():
                write_png(self.workdir / PICTURE, self.health.picture())
        beside = [] if self.config.eval.alone else self.teaching.models()  # which loads them, with samplers of theirs
        models = [*beside, self.model(student)]
        most, world = self.config.run.max_failed_rewards, self.pipeline.world
        with contextlib.closing(self.setup) as setup:
            write_report(self.workdir, self.config.eval, about, setup.sampler, world, models, most, setup.others)
        write_model_card(self.workdir, self.run, self.config, self.pipeline, card)


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
