"""Stage `opd`: one student distilled on-policy from many teachers, evaluated beside all of them."""

import itertools
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from fopd_jax.adapters import (
    Adapter,
    conform,
    effective,
    init_adapter,
    merge,
    rank_of,
    revive,
    stack_bank,
    zeros_like,
)
from fopd_jax.config import Config
from fopd_jax.evaluation.report import Model, write_report
from fopd_jax.evaluation.suite import evaluate, means
from fopd_jax.flow.rollout import noise_window
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import make_transition
from fopd_jax.interop.peft import write_peft
from fopd_jax.interop.safetensors import save_adapter
from fopd_jax.objectives.opd import Objective
from fopd_jax.parallel.sharding import batch_sharding, check_batch, replicated
from fopd_jax.pipeline import Pipeline, boxed_variables, load_base, load_policy
from fopd_jax.tasks.task import World, routes, select_tasks
from fopd_jax.training.loop import Experiment
from fopd_jax.training.opd_step import Batch, Frozen, OPDSpec, OPDStep
from fopd_jax.training.setup import lora_config, make_setup, null_conditioning, print_overview
from fopd_jax.training.state import TrainState, init_state


class OPD:
    """The stage: `experiment` for the loop, `finish` for results, pictures and the exported student."""

    def __init__(self, config: Config, workdir: Path) -> None:
        self.config, self.workdir = config, workdir
        cache = Path(config.conditioning_cache) if config.get("conditioning_cache") else None
        self.setup = setup = make_setup(config, cache)
        self.pipeline = pipeline = setup.pipeline
        if config.final_samples < 1:
            raise ValueError(f"final_samples: found {config.final_samples}, expected at least 1")
        if config.export not in ("ema", "raw"):
            raise ValueError(f"export: found {config.export!r}, expected 'ema' or 'raw'")
        prompts = PromptStream(pipeline.world, config)
        check_batch("batch_size", config.batch_size, pipeline.mesh)
        spec = make_spec(config, pipeline)
        spec.check(config.batch_size)
        self.teachers = load_teachers(config, pipeline)
        anchor = config.anchor.name if config.anchor.adapter else "base"
        bank = {name: self.teachers[name] for name in config.tasks}
        bank[f"anchor/{anchor}"] = self.teachers.get(anchor) or zeros_like(next(iter(bank.values())))
        self.student = cold_start(config, self.teachers, pipeline)
        # Prompts before the base: text encoders and network need not be in memory together.
        pipeline.world.prepare(itertools.chain(setup.eval_set.prompts(), prompts.upto(config.steps)))
        everywhere, dtype = replicated(pipeline.mesh), jax.numpy.dtype(config.model.dtype)
        frozen_bank = jax.tree.map(lambda leaf: leaf.astype(dtype), stack_bank(bank))
        self.frozen = Frozen(
            load_base(config, pipeline), jax.device_put(frozen_bank, everywhere), null_conditioning(pipeline)
        )
        step = OPDStep(spec, pipeline.velocity, setup.optimizer, setup.ema).make(everywhere)
        self.experiment = Experiment(
            state=jax.device_put(init_state(self.student, setup.optimizer, config.seed), everywhere),
            step=partial(step, self.frozen),
            batch=prompts.batch,
            sharding=batch_sharding(pipeline.mesh),
            evaluate=self.evaluate,
            draw=lambda state: setup.draw(Model("student", self.frozen.variables, effective(state.ema))),
        )

    def describe(self) -> None:
        """Print what trains and what does not."""
        print_overview("student", self.student.weights, self.frozen)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Mean scores of the averaged student on the periodic evaluation's pairs."""
        setup, world = self.setup, self.pipeline.world
        return means(evaluate(setup.sampler, world, setup.eval_set, self.frozen.variables, effective(state.ema)))

    def finish(self, state: TrainState) -> None:
        """Export the student (averaged weights, or raw on request) and report it beside base, teachers and merge.

        Of a published network the student is also written as a PEFT folder.
        """
        student = state.trained if self.config.export == "raw" else state.ema
        save_adapter(self.workdir / "student.safetensors", student, {"preset": self.config.model.preset})
        if self.pipeline.manifest is not None:
            exported = self.workdir / "student_peft"
            shutil.rmtree(exported, ignore_errors=True)  # of an earlier, shorter run
            write_peft(exported, jax.device_get(student), self.pipeline.model.config)
        teachers = {f"teacher/{name}": adapter for name, adapter in self.teachers.items()}
        models = {"base": zeros_like(self.student), **teachers, "merge": self.student, "student": student}
        write_report(
            self.workdir,
            self.config,
            self.setup.sampler,
            self.pipeline.world,
            [Model(name, self.frozen.variables, effective(adapter)) for name, adapter in models.items()],
            steps=int(state.step),
        )


class PromptStream:
    """Training prompts as a function of the step alone: tasks by weight, prompts uniformly, teachers by task.

    Raises:
      ValueError: an unknown task, a task without a teacher, or a batch that the group size does not divide.
    """

    def __init__(self, world: World, config: Config) -> None:
        self.tasks = select_tasks(world, tuple(config.tasks))
        taught = [name for name in self.tasks if config.tasks[name].teacher]
        for task in self.tasks.values():
            routes([task.name] * len(task.train), task.train, taught)
        if config.images_per_prompt < 1 or config.batch_size < 1 or config.batch_size % config.images_per_prompt:
            raise ValueError(
                f"batch_size, images_per_prompt: found {config.batch_size}, {config.images_per_prompt}; "
                "expected a positive multiple of a positive number"
            )
        self.encode, self.seed = world.encode, config.seed
        self.count, self.repeats = config.batch_size // config.images_per_prompt, config.images_per_prompt
        weights = np.asarray([config.tasks[name].weight for name in self.tasks], float)
        if (weights < 0).any() or weights.sum() <= 0:
            raise ValueError(f"tasks: found weights {weights.tolist()}, expected non-negative ones, not all 0")
        self.shares = weights / weights.sum()

    def draw(self, step: int) -> tuple[list[str], list[str]]:
        """The tasks and prompts of one step's batch, before prompts are repeated."""
        rng = np.random.default_rng((self.seed, step))
        tasks = [str(name) for name in rng.choice(list(self.tasks), self.count, p=self.shares)]
        return tasks, [self.tasks[task].train[rng.integers(len(self.tasks[task].train))] for task in tasks]

    def upto(self, steps: int) -> Iterator[str]:
        """Every prompt of the first `steps` batches."""
        return itertools.chain.from_iterable(self.draw(step)[1] for step in range(steps))

    def batch(self, step: int) -> Batch:
        tasks, prompts = self.draw(step)
        route = np.repeat(routes(tasks, prompts, tuple(self.tasks)), self.repeats)
        conditioning = jax.tree.map(lambda leaf: np.repeat(leaf, self.repeats, axis=0), self.encode(prompts))
        return Batch(conditioning, route)


def make_spec(config: Config, pipeline: Pipeline) -> OPDSpec:
    """The static part of the update from the config."""
    sampler, objective = config.sampler, config.objective
    noisy = (
        np.ones(sampler.num_steps, bool) if sampler.window is None else noise_window(sampler.num_steps, *sampler.window)
    )
    return OPDSpec(
        objective=Objective(**objective),
        transition=make_transition(sampler.transition, sampler.noise_level),
        sigmas=flow_match_sigmas(sampler.num_steps, config.shift),
        noisy=noisy,
        latent_shape=pipeline.world.latent_shape,
        teachers=tuple(config.tasks),
        guidance=config.guidance,
        teacher_guidance=(*(config.tasks[name].guidance for name in config.tasks), config.anchor.guidance),
        updates_per_rollout=config.updates_per_rollout,
        minibatches=config.minibatches,
    )


def load_teachers(config: Config, pipeline: Pipeline) -> dict[str, Adapter]:
    """Teachers by task name, and the anchor under its own name if it has an adapter, all at the largest rank.

    Raises:
      ValueError: the anchor has a teacher's name but another file; or a file is missing, damaged, of another preset, or
        adapts a layer that `config.adapter` does not; names the file and the first layer that differs.
    """
    sources = {name: config.tasks[name].teacher for name in config.tasks}
    if config.anchor.adapter:
        if sources.get(config.anchor.name, config.anchor.adapter) != config.anchor.adapter:
            raise ValueError(f"anchor.name: found {config.anchor.name!r}, which is a task with another teacher")
        sources[config.anchor.name] = config.anchor.adapter
    found = {}
    for name, source in sources.items():
        try:
            found[name] = load_policy(source, pipeline)
        except ValueError as error:
            field = f"tasks.{name}.teacher" if name in config.tasks else "anchor.adapter"
            raise ValueError(f"{field}: {error}") from error
    rank = max(rank_of(adapter) for adapter in found.values())
    layers = student_shapes(config, pipeline).weights
    return {name: conform(f"{name} ({sources[name]})", adapter, layers, rank) for name, adapter in found.items()}


def student_shapes(config: Config, pipeline: Pipeline) -> Adapter:
    """Shapes of the adapter that `config.adapter` describes on this network."""
    params = nn.unbox(boxed_variables(pipeline.model, pipeline.world.latent_shape)["params"])
    return jax.eval_shape(lambda: init_adapter(jax.random.key(0), params, lora_config(config)))


def cold_start(config: Config, teachers: dict[str, Adapter], pipeline: Pipeline) -> Adapter:
    """The student's initial adapter: the teachers' weighted merge, or a fresh one.

    Raises:
      ValueError: an unknown method, or weights for a teacher that is not there; names both.
    """
    start, lora = config.cold_start, lora_config(config)
    if start.method == "none":
        params = nn.unbox(boxed_variables(pipeline.model, pipeline.world.latent_shape)["params"])
        return init_adapter(jax.random.key(config.seed), params, lora)
    if start.method != "merge":
        raise ValueError(f"cold_start.method: found {start.method!r}, expected 'merge' or 'none'")
    unknown = set(start.weights) - set(teachers)
    if unknown:
        raise ValueError(f"cold_start.weights: found {sorted(unknown)}, expected some of {tuple(teachers)}")
    chosen = [teachers[name] for name in start.weights]
    return revive(jax.random.key(config.seed), merge(start.merge, chosen, list(start.weights.values()), lora))
