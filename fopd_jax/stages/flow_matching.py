"""Stage `flow_matching`: pretrain a whole network, or fine-tune an adapter, on captioned images or on teachers' own."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fopd_jax.adapters.lora import init_adapter
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config import schema as settings
from fopd_jax.console import Progress, say
from fopd_jax.evaluation.model_card import CARD_FILE
from fopd_jax.evaluation.report import SAMPLES_FILE, Model, draw_samples
from fopd_jax.parallel.distributed import rows_of, warn
from fopd_jax.parallel.sharding import batch_sharding
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.feed import Feed
from fopd_jax.running.stage import Metrics
from fopd_jax.stages.abstract import abstract_base, encoded_tokens
from fopd_jax.stages.cards import Origin, make_card
from fopd_jax.stages.check import describe_run
from fopd_jax.stages.export import advise_teacher, export, export_name, exports
from fopd_jax.stages.flow_matching_update import FlowMatchingUpdate, frozen_part, make_update, update_cost
from fopd_jax.stages.model_card import write_model_card
from fopd_jax.stages.pipeline import load_base
from fopd_jax.stages.plan import Plan, check_plan, trained_parts
from fopd_jax.stages.setup import RATE, describe_weights, make_setup
from fopd_jax.steps.flow_matching import METRICS
from fopd_jax.steps.state import TrainState
from fopd_jax.tasks.images import read_image_tasks
from fopd_jax.worlds.demonstrated import CLEAN, DemonstratedLatents, are_demonstrated
from fopd_jax.worlds.world import CaptionedLatents, World, select_tasks


@dataclasses.dataclass(frozen=True)
class FlowMatchingPlan(Plan):
    """`pairs`: the captioned images."""

    update: FlowMatchingUpdate
    pairs: CaptionedLatents


def plan_flow_matching(config: settings.FlowMatching) -> FlowMatchingPlan:
    """Everything that a run needs but its captions' encodings and its weights.

    Raises:
      ValueError: names the field, file or key that is wrong.
    """
    setup = make_setup(config, partial(read_image_tasks, config.tasks))
    pipeline = setup.pipeline
    latent_shape, model, mesh = pipeline.world.latent_shape, pipeline.model, pipeline.mesh
    boxed = boxed_variables(model, latent_shape)
    update = make_update(config, model, boxed, setup.optimizer, mesh)
    pairs = make_pairs(config, pipeline.world)
    for line in pairs.of_others(setup.base) if isinstance(pairs, DemonstratedLatents) else ():
        warn(line)

    def held() -> dict[str, Tree]:
        base = frozen_part(config, abstract_base(boxed, jnp.dtype(config.model.dtype), mesh))
        return {"base": base, **trained_parts(update.trained.state)}

    tokens = partial(encoded_tokens, pipeline, config.model)
    return FlowMatchingPlan(
        setup, update.trained, lambda: pairs.upto(config.run.steps), (*METRICS, RATE), held,
        lambda: update_cost(config, latent_shape, tokens(), model), update, pairs,
    )  # fmt: skip


class FlowMatching:
    """The stage, see `running.stage.Stage`."""

    def __init__(self, config: settings.FlowMatching, workdir: Path, run: Path | None = None) -> None:
        plan = plan_flow_matching(config)
        check_plan(plan, config, workdir)
        say(describe_run(plan, config, workdir))
        self.config, self.workdir, self.run = config, workdir, run or workdir
        self.setup, self.pipeline, self.update = plan.setup, plan.setup.pipeline, plan.update
        self.pairs = pairs = plan.pairs
        sharding = batch_sharding(self.pipeline.mesh)
        rows = rows_of(sharding, config.batch_size)
        plan.prepare()  # captions before the base: text encoders and network need not be in memory together
        say("loading the base")
        self.frozen, self._start = self.load()
        self.feed = Feed(lambda step: pairs.batch(step, rows), sharding, config.batch_size, config.run.steps)

    @property
    def whole(self) -> bool:
        """Whether all of the network trains."""
        return self.config.trained == "params"

    @property
    def outputs(self) -> dict[str, str]:
        """What `finish` writes."""
        trained = exports(export_name(self.config), "the averaged weights", self.whole, self.pipeline)
        return trained | {CARD_FILE: "the model card", SAMPLES_FILE: "what they draw"}

    def load(self) -> tuple[Tree, Tree]:
        """What is frozen, and what training starts from, in float32: what trains is never rounded."""
        config, pipeline = self.config, self.pipeline
        variables = load_base(config.model, pipeline, config.seed, "float32" if self.whole else None)
        if self.whole:
            return frozen_part(config, variables), variables["params"]
        key = jax.random.key(config.seed)
        return variables, init_adapter(key, variables["params"], config.adapter, pipeline.family.targets)

    @property
    def samples(self) -> int:
        """Of one update."""
        return self.config.batch_size

    @property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return self.update.trained.state

    def start(self) -> TrainState:
        """The state of step 0, born in its shards; what it was made of is let go."""
        start, self._start = self._start if self._start is not None else self.load()[1], None
        return self.update.trained.born(start, self.setup.optimizer, self.config.seed)

    def describe(self) -> None:
        """Print what trains and what does not."""
        describe_weights(self.workdir, self.config, self.update.trained.state, self.frozen)

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """One jitted program."""
        self._start = None  # a resumed run has not asked for it
        batch, measured = self.feed(step), self.setup.measured(state)
        conditioning = self.pipeline.world.embed(batch["conditioning"])
        state, metrics = self.update.step(self.frozen, state, {**batch, "conditioning": conditioning})
        return state, {**metrics, **measured}

    def drain(self) -> None:
        """Nothing is ever in flight but the update itself."""

    def close(self) -> None:
        """End the thread that makes batches ahead."""
        self.feed.close()

    def batch(self, step: int) -> Tree:
        """The whole batch, on every process."""
        return self.feed.whole(step)

    def explain(self, step: int, rows: Sequence[int]) -> list[str]:
        """Tasks and captions."""
        return self.pairs.describe(step, rows)

    def model(self, trained: Tree) -> Model:
        """What trains, to sample from."""
        return Model(self.config.name, *self.update.trained.student.policy(self.frozen, trained))

    def evaluate(self, state: TrainState, progress: Progress) -> dict[str, float]:
        """Mean scores of the averaged weights on the periodic evaluation's pairs, where something measures them."""
        return self.setup.evaluate(self.model(state.ema), progress)

    def draw(self, state: TrainState) -> dict[str, np.ndarray]:
        """What the averaged weights draw."""
        return self.setup.draw(self.model(state.ema))

    def advise(self, source: str) -> list[str]:
        """What to do with the weights."""
        return advise_teacher(self.workdir, export_name(self.config), self.whole, self.pipeline, source)

    def finish(self, state: TrainState) -> None:
        """Write the averaged weights, and what they draw; the rewards have nothing more to score."""
        pipeline, setup = self.pipeline, self.setup
        setup.close()
        name, constants, step = export_name(self.config), self.frozen["constants"], int(state.step)
        card = make_card(self.config, pipeline, setup.base, origin, step, self.run)
        card = export(self.workdir, name, state.ema, constants, pipeline, self.config.model, card)
        model = self.model(state.ema)
        path, world = self.workdir / SAMPLES_FILE, pipeline.world
        draw_samples(path, setup.sampler, world, setup.eval_set, [model], setup.others)
        write_model_card(self.workdir, self.run, self.config, pipeline, card)


def origin(config: settings.FlowMatching) -> Origin:
    """Training knows no guidance: it is for use under that of the evaluations."""
    return Origin("flow_matching", config.eval.guidance)


def make_pairs(config: settings.FlowMatching, world: World) -> CaptionedLatents:
    """The captioned latents that a config trains on: teachers' images, wherever they are, or the world's own.

    Raises:
      ValueError: the world has no images, or not those of a task, or as `DemonstratedLatents`; names the field.
    """
    select_tasks(world, tuple(config.tasks))
    if are_demonstrated(config.tasks):
        return DemonstratedLatents(
            config.tasks, world.encode, world.latent_shape, batch_size=config.batch_size,
            empty_caption=config.empty_caption, seed=config.seed, target=config.target,
        )  # fmt: skip
    if config.target != CLEAN:
        raise ValueError(f"target: found {config.target!r}, expected {CLEAN!r}: images have no teacher's velocities")
    if world.pairs is None:
        raise ValueError(f"stage: found 'flow_matching', but the world of {config.model.preset!r} has no images")
    return world.pairs(config.tasks, config.batch_size, config.empty_caption, config.seed)
