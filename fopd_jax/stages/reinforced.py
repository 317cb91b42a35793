"""What both stages of reinforcement learning are: roll out, score, compare, learn; and what surrounds that.

A step is a host composite: its rewards run in processes, threads or on servers while the devices go on. Where they are
all in JAX it may be one program instead, which is `one_program`'s.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array

from fopd_jax.adapters.lora import Adapter, effective, init_adapter, revive
from fopd_jax.adapters.lora import zeros_like as no_adapter
from fopd_jax.adapters.merging import kept_energy
from fopd_jax.config.identity import config_hash
from fopd_jax.config.learning import Reinforced
from fopd_jax.config.schema import OPD
from fopd_jax.console import Progress, say
from fopd_jax.evaluation.model_card import CARD_FILE
from fopd_jax.evaluation.report import RESULTS_FILE, SAMPLES_FILE, TABLE_FILE, Model, write_report
from fopd_jax.exits import naming
from fopd_jax.parallel.distributed import is_main, rows_of, warn
from fopd_jax.parallel.sharding import batch_sharding
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.checkpoints import kept_steps
from fopd_jax.running.feed import Feed
from fopd_jax.running.goodput import phase
from fopd_jax.running.journal import Journal
from fopd_jax.running.stage import Metrics
from fopd_jax.stages import looks
from fopd_jax.stages.cards import Origin, make_card
from fopd_jax.stages.check import describe_run
from fopd_jax.stages.cold_start import START, check_given
from fopd_jax.stages.export import advise_teacher, export, export_name, exports
from fopd_jax.stages.model_card import write_model_card
from fopd_jax.stages.one_program import OneProgram
from fopd_jax.stages.pipeline import Pipeline, load_base
from fopd_jax.stages.plan import Plan, check_plan
from fopd_jax.stages.scoring import Pending, Scoring
from fopd_jax.stages.setup import RATE, Setup, describe_weights, null_conditioning
from fopd_jax.stages.traced_scoring import TracedScoring, is_traceable, make_traced_scoring
from fopd_jax.steps.grpo.spec import Base, Credit
from fopd_jax.steps.grpo.step import Step
from fopd_jax.steps.state import TrainState
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.prompt_stream import PromptStream
from fopd_jax.worlds.world import World

LAG = "lag"
METRICS = (RATE, LAG, *looks.NAMES)
"""What every step returns beside its method's."""


class Method(Protocol):
    """One algorithm: how it makes images, and what it learns of their credit. States are donated.

    `conditioning`: of the batch, or whatever `ReinforcementLearning.embedded` makes of it.
    """

    def roll_out(self, state: TrainState, conditioning: Any) -> tuple[TrainState, Any]:
        """The state as it was, and what was rolled out."""
        ...

    def latents(self, rolled: Any) -> Array:
        """The final latents `[B, h, w, c]`."""
        ...

    def learn(self, state: TrainState, rolled: Any, conditioning: Any, credit: Credit) -> tuple[TrainState, Metrics]:
        """The state after all updates on one rollout."""
        ...


@dataclasses.dataclass(frozen=True)
class ReinforcedPlan(Plan):
    """`stream`: of prompts; `method(base)`: the algorithm, once there are weights.

    `one(scoring)`: its step as one program, None of an algorithm that has none. `given`: see `read_beginning`.
    """

    stream: PromptStream
    method: Callable[[Base], Method]
    one: Callable[[TracedScoring], Step] | None = None
    given: Adapter | None = None


def read_beginning(config: Reinforced, setup: Setup) -> Adapter | None:
    """The adapter that training starts from; None: a fresh one, or the whole network trains.

    Raises:
      ValueError: as `check_given`; or there is one, and the whole network trains.
    """
    if config.start and config.trained == "params":
        raise ValueError(f"{START}: found {config.start!r}, expected none: trained is 'params', not an adapter")
    if not config.start:
        return None
    given, energies = check_given(START, config.start, config.adapter, setup)
    if (kept := kept_energy(energies)) is not None:
        warn(f"{START}: rank {config.adapter.rank} keeps {kept.overall:.1%} of the adapter, {kept.worst:.1%} at worst")
    return given


def make_stream(config: Reinforced, world: World, mesh: Any) -> PromptStream:
    """The prompts that a config trains on, checked by the rewards that will score them.

    Raises:
      ValueError: a task has no reward, or a prompt that can never be scored; names field, prompt and reason.
    """
    check_rewarded(config.tasks, world)
    return PromptStream(
        world, config.tasks, lambda tasks, prompts: np.zeros(len(prompts), np.int32),
        batch_size=config.batch_size, images_per_prompt=config.images_per_prompt, seed=config.seed,
        rows=rows_of(batch_sharding(mesh), config.batch_size), alternate=config.alternate,
    )  # fmt: skip


def check_rewarded(names: Collection[str], world: World) -> None:
    """Refuse tasks that cannot be trained on; `names`: a config's.

    Raises:
      ValueError: as `make_stream`.
    """
    tasks = {name: world.tasks[name] for name in names if name in world.tasks}
    for name, task in tasks.items():
        if not task.weights:
            raise ValueError(f"tasks.{name}.rewards: found none with a weight, expected what is trained on there")
    check_training_prompts(tasks, world)


def make_scoring(config: Reinforced | OPD, pipeline: Pipeline, journal: Journal) -> Scoring:
    """Of the rollouts of a config's tasks, by their rewards; `journal`: keeps what they said."""
    world, most = _narrowed(pipeline.world, config), config.run.max_failed_rewards
    return Scoring(world, pipeline.mesh, config.advantages, config.decoding, most, journal, config_hash(config))


def _narrowed(world: World, config: Reinforced | OPD) -> World:
    """With the tasks that are trained on."""
    return dataclasses.replace(world, tasks={name: world.tasks[name] for name in config.tasks})


def check_training_prompts(tasks: dict[str, Task], world: World) -> None:
    """Refuse training prompts that a reward of their task can never score."""
    for task in tasks.values():
        for name in task.rewards:
            with naming(f"tasks.{task.name}.rewards.{name}"):
                world.rewards[name].check(task.train, task.beside("train"))


@dataclasses.dataclass
class _Ahead:
    """A rollout that waits for its scores, by the number of its step; `lag`: updates its policy is behind."""

    step: int
    rolled: Any
    conditioning: Any
    pending: Pending
    lag: int


class ReinforcementLearning:
    """The stage, see `running.stage.Stage`. `one`: the step, where it is one program."""

    one: OneProgram | None = None

    def __init__(
        self,
        config: Reinforced,
        workdir: Path,
        plan: ReinforcedPlan,
        origin: Callable[[Any], Origin],
        run: Path | None = None,
    ) -> None:
        """`origin`: what is told of what trains; `run`: see `stages.registry.Kind`."""
        check_plan(plan, config, workdir)
        say(describe_run(plan, config, workdir))
        self.config, self.workdir, self.run, self.origin = config, workdir, run or workdir, origin
        self.setup, self.pipeline, self.trained = plan.setup, plan.setup.pipeline, plan.trained
        self.given = plan.given
        plan.prepare()
        say("loading the base")
        pipeline = self.pipeline
        self.base = Base(load_base(config.model, pipeline, config.seed), null_conditioning(pipeline))
        self.method = plan.method(self.base)
        sharding, self.prompts = batch_sharding(pipeline.mesh), plan.stream
        self.journal = Journal(workdir, jax.process_index())
        self.scoring = make_scoring(config, pipeline, self.journal)
        self.one = self._one_program(plan)
        say(f"a step: {'passes, rewards beside them' if self.one is None else 'one program, rewards within it'}")
        rows = plan.stream.batch if self.one is None else self.one.rows
        self.feed = Feed(rows, sharding, config.batch_size, config.run.steps)
        self.ahead: _Ahead | None = None

    def _one_program(self, plan: ReinforcedPlan) -> OneProgram | None:
        """Where it is asked for and can be."""
        config, mesh, world = self.config, self.pipeline.mesh, _narrowed(self.pipeline.world, self.config)
        if plan.one is None or not config.run.one_program or config.lag or not is_traceable(world):
            return None
        count = config.batch_size // config.images_per_prompt
        scoring = make_traced_scoring(world, mesh, config.advantages, config.decoding, count)
        return OneProgram(plan.one(scoring), scoring, self.base, plan.stream, self.scoring)

    @property
    def whole(self) -> bool:
        """Whether all of the network trains."""
        return self.config.trained == "params"

    @property
    def outputs(self) -> dict[str, str]:
        """What `finish` writes."""
        trained = exports(export_name(self.config), "the averaged weights", self.whole, self.pipeline)
        who = "base, start and policy" if self.config.start else "base and policy"
        pictures = {CARD_FILE: "the model card", SAMPLES_FILE: f"{who} on the same prompts"}
        if not self.setup.eval_set.scored():
            return trained | pictures
        return trained | pictures | {RESULTS_FILE: f"mean scores of {who}", TABLE_FILE: "the same, as a table"}

    @property
    def samples(self) -> int:
        """Of one step."""
        return self.config.batch_size

    @property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return self.trained.state

    def start(self) -> TrainState:
        """The state of step 0: the given adapter, a fresh one on the base, or the base itself in float32."""
        return self.trained.born(
            start_of(self.config, self.pipeline, self.base, self.given), self.setup.optimizer, self.config.seed
        )

    def describe(self) -> None:
        """Print what trains and what does not."""
        describe_weights(self.workdir, self.config, self.state, self.base.variables)

    # ---- one step

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """Roll out, unless that was done ahead; score, while the next rollout is made where it may be; learn."""
        measured = self.setup.measured(state)
        if self.one is not None:
            batch, asked = self.feed(step)
            state, metrics = self.one.advance(state, step, self.embedded(batch), asked)
            return state, {**metrics, **measured, LAG: jax.device_put(np.float32(0))}
        state, now = self.rolled_out(state, step, lag=0) if self.ahead is None else (state, self.ahead)
        self.ahead = None
        if self.config.lag and not self.rests(step + 1):
            state, self.ahead = self.rolled_out(state, step + 1, lag=1)
        with phase("rewards"), jax.transfer_guard("allow"):
            credit, seen = self.scoring.finish(now.pending)
            beside = {name: jax.device_put(np.float32(value)) for name, value in {**seen, LAG: now.lag}.items()}
        state, metrics = self.method.learn(state, now.rolled, now.conditioning, credit)
        return state, {**metrics, **measured, **beside}

    def rolled_out(self, state: TrainState, step: int, lag: int) -> tuple[TrainState, _Ahead]:
        """The rollout of a step by this state, its images being scored; its noise is the step's, whatever the lag."""
        conditioning = self.embedded(self.feed(step))
        state, rolled = self.method.roll_out(_at(state, lag), conditioning)
        state = _at(state, -lag)
        merged = self.config.advantages.merge_equal_prompts
        with jax.transfer_guard("allow"):
            drawn = self.prompts.drawn(step, merge_equal_prompts=merged)
            pending = self.scoring.begin(step, self.method.latents(rolled), drawn)
        return state, _Ahead(step, rolled, conditioning, pending, lag)

    def embedded(self, batch: Any) -> Any:
        """What the method rolls out, of what the feed gives: a `Batch`."""
        return self.pipeline.world.embed(batch.conditioning)

    def rests(self, step: int) -> bool:
        """Whether nothing is made ahead of a step: the state before it is saved or evaluated, or is the last."""
        run = self.config.run
        cadences = [run.checkpoint_every, *([run.eval_every] if run.eval_every else [])]
        return step >= run.steps or any(step % every == 0 for every in cadences)

    def drain(self) -> None:
        """Nothing is in flight where a state is saved by plan; a stop between two lets go of what was made ahead.

        Scores from before the oldest checkpoint to go on from are not needed any more.
        """
        if self.ahead is not None:
            self.scoring.let_go(self.ahead.pending)
        self.ahead = None
        if is_main() and (kept := kept_steps(self.workdir)[-self.config.run.keep_checkpoints :]):
            self.journal.prune(kept[0])

    def close(self) -> None:
        """End the threads that make batches and scores."""
        self.feed.close()
        self.scoring.close()

    # ---- what surrounds it

    def batch(self, step: int) -> Tree:
        """The whole batch, on every process."""
        whole = self.feed.whole(step)
        return whole if self.one is None else whole[0]

    def explain(self, step: int, rows: Sequence[int]) -> list[str]:
        """Tasks and prompts."""
        return self.prompts.describe(step, rows)

    def model(self, trained: Tree) -> Model:
        """The policy with these weights, to sample from."""
        return Model("policy", *self.trained.student.policy(self.base.variables, trained))

    def _started(self) -> list[Model]:
        """What training started from, where that is not the base."""
        return [] if self.given is None else [Model("start", self.base.variables, effective(self.given))]

    def draw(self, state: TrainState) -> dict[str, np.ndarray]:
        """What the averaged policy draws, and a group of the rollouts that it learns from, if there are any yet."""
        return {**self.setup.draw(self.model(state.ema)), **self.scoring.picture()}

    def evaluate(self, state: TrainState, progress: Progress) -> dict[str, float]:
        """Mean scores of the averaged policy on the periodic evaluation's pairs."""
        return self.setup.evaluate(self.model(state.ema), progress)

    def advise(self, source: str) -> list[str]:
        """What to do with the weights."""
        return advise_teacher(self.workdir, export_name(self.config), self.whole, self.pipeline, source)

    def finish(self, state: TrainState) -> None:
        """Export the averaged weights, and report them beside the base."""
        config, pipeline = self.config, self.pipeline
        constants = self.base.variables["constants"]
        card = make_card(config, pipeline, self.setup.base, self.origin, int(state.step), self.run)
        card = export(self.workdir, export_name(config), state.ema, constants, pipeline, config.model, card)
        unchanged = {} if self.whole else effective(no_adapter(state.ema))  # so that one program samples both
        models = [Model("base", self.base.variables, unchanged), *self._started(), self.model(state.ema)]
        about = {"seed": config.seed, "steps": int(state.step), "config_hash": config_hash(config)}
        with contextlib.closing(self.setup) as setup:
            most = config.run.max_failed_rewards
            write_report(self.workdir, config.eval, about, setup.sampler, pipeline.world, models, most, setup.others)
        write_model_card(self.workdir, self.run, config, pipeline, card)


def trained_rewards(config: Reinforced) -> dict[str, float]:
    """What a policy is trained on: weights of rewards, averaged over the prompts of all tasks."""
    shares = sum(task.weight for task in config.tasks.values())
    found: dict[str, float] = {}
    for task in config.tasks.values():
        for name, weight in task.rewards.items():
            found[name] = found.get(name, 0.0) + weight * task.weight / shares
    return {name: weight for name, weight in found.items() if weight}


@partial(jax.jit, static_argnums=1)
def _moved(step: Array, by: int) -> Array:
    return step + by


def _at(state: TrainState, later: int) -> TrainState:
    """The same weights so many steps later."""
    return dataclasses.replace(state, step=_moved(state.step, later)) if later else state


def start_of(config: Reinforced, pipeline: Pipeline, base: Base, given: Adapter | None) -> Tree:
    """What training starts from; `given`: see `read_beginning`."""
    if config.trained == "params":
        return load_base(config.model, pipeline, config.seed, "float32")["params"]
    key = jax.random.key(config.seed)
    if given is not None:
        return revive(key, given)
    return init_adapter(key, base.variables["params"], config.adapter, pipeline.family.targets)
