"""Stage `opd`: one student distilled on-policy from many teachers, evaluated beside all of them."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fopd_jax.adapters import Adapter, check_like, effective, init_adapter, merge, stack_bank, zeros_like
from fopd_jax.config import Config
from fopd_jax.evaluation.report import Model, write_report
from fopd_jax.evaluation.suite import evaluate, means
from fopd_jax.flow.rollout import noise_window
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import make_transition
from fopd_jax.interop.safetensors import check_preset, load_adapter, save_adapter
from fopd_jax.objectives.opd import Objective
from fopd_jax.tasks.task import World, routes, select_tasks
from fopd_jax.training.loop import Experiment
from fopd_jax.training.opd_step import Batch, Frozen, OPDSpec, OPDStep
from fopd_jax.training.setup import (
    Setup,
    load_base,
    lora_config,
    make_setup,
    null_conditioning,
    print_overview,
    weight_path,
)
from fopd_jax.training.state import TrainState, init_state


class OPD:
    """The stage: `experiment` for the loop, `finish` for results, pictures and the exported student."""

    def __init__(self, config: Config, workdir: Path) -> None:
        self.config, self.workdir = config, workdir
        self.setup = setup = make_setup(config)
        if config.final_samples < 1:
            raise ValueError(f"final_samples: found {config.final_samples}, expected at least 1")
        prompts = PromptStream(setup.world, config)
        spec = make_spec(config, setup)
        spec.check(config.batch_size)
        variables = load_base(config, setup)
        self.teachers = load_teachers(config, variables)
        anchor = config.anchor.name if config.anchor.adapter else "base"
        bank = {name: self.teachers[name] for name in config.teachers}
        bank[f"anchor/{anchor}"] = self.teachers.get(anchor) or zeros_like(next(iter(bank.values())))
        self.student = cold_start(config, self.teachers, variables)
        self.frozen = Frozen(variables, stack_bank(bank), null_conditioning(setup.world))
        step = OPDStep(spec, setup.velocity, setup.optimizer, setup.ema).make()
        self.experiment = Experiment(
            state=init_state(self.student, setup.optimizer, config.seed),
            step=partial(step, self.frozen),
            batch=prompts.batch,
            evaluate=self.evaluate,
        )

    def describe(self) -> None:
        """Print what trains and what does not."""
        print_overview("student", self.student.weights, self.frozen)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Mean scores of the averaged student on the periodic evaluation's pairs."""
        setup = self.setup
        return means(evaluate(setup.sampler, setup.world, setup.eval_set, self.frozen.variables, effective(state.ema)))

    def finish(self, state: TrainState) -> None:
        """Export the student (averaged weights, or raw on request) and report it beside base, teachers and merge."""
        student = state.trained if self.config.export == "raw" else state.ema
        save_adapter(self.workdir / "student.safetensors", student, {"preset": self.config.preset})
        teachers = {f"teacher/{name}": adapter for name, adapter in self.teachers.items()}
        models = {"base": zeros_like(self.student), **teachers, "merge": self.student, "student": student}
        write_report(
            self.workdir,
            self.config,
            self.setup.sampler,
            self.setup.world,
            [Model(name, self.frozen.variables, effective(adapter)) for name, adapter in models.items()],
            steps=int(state.step),
        )


class PromptStream:
    """Training prompts as a function of the step alone: tasks by share, prompts uniformly, teachers by task.

    Raises:
      ValueError: an unknown task, a prompt whose task has no teacher, or a batch that the group size does not divide.
    """

    def __init__(self, world: World, config: Config) -> None:
        self.tasks = select_tasks(world, tuple(config.tasks))
        self.teachers = tuple(config.teachers)
        for task in self.tasks.values():
            routes([task.name] * len(task.train), task.train, self.teachers)
        if config.images_per_prompt < 1 or config.batch_size < 1 or config.batch_size % config.images_per_prompt:
            raise ValueError(
                f"batch_size, images_per_prompt: found {config.batch_size}, {config.images_per_prompt}; "
                "expected a positive multiple of a positive number"
            )
        self.encode, self.seed = world.encode, config.seed
        self.count, self.repeats = config.batch_size // config.images_per_prompt, config.images_per_prompt
        shares = np.asarray([config.tasks[name] for name in self.tasks], float)
        if (shares < 0).any() or shares.sum() <= 0:
            raise ValueError(f"tasks: found shares {shares.tolist()}, expected non-negative ones with a positive sum")
        self.shares = shares / shares.sum()

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        tasks = rng.choice(list(self.tasks), self.count, p=self.shares)
        prompts = [self.tasks[task].train[rng.integers(len(self.tasks[task].train))] for task in tasks]
        route = np.repeat(routes(list(tasks), prompts, self.teachers), self.repeats)
        conditioning = jax.tree.map(lambda leaf: np.repeat(leaf, self.repeats, axis=0), self.encode(prompts))
        return Batch(conditioning, route)


def make_spec(config: Config, setup: Setup) -> OPDSpec:
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
        latent_shape=setup.world.latent_shape,
        teachers=tuple(config.teachers),
        guidance=config.guidance,
        teacher_guidance=(*(config.teachers[name].guidance for name in config.teachers), config.anchor.guidance),
        updates_per_rollout=config.updates_per_rollout,
        minibatches=config.minibatches,
    )


def load_teachers(config: Config, variables: Any) -> dict[str, Adapter]:
    """Teachers by task name, and the anchor under its own name if it has an adapter.

    Raises:
      ValueError: the anchor has a teacher's name but another file; or a file is missing, damaged, of another preset, or
        its shapes are not those that `config.adapter` gives on this network; names the file and the first layer that
        differs.
    """
    expected = jax.eval_shape(lambda: init_adapter(jax.random.key(0), variables["params"], lora_config(config)))
    sources = {name: config.teachers[name].adapter for name in config.teachers}
    if config.anchor.adapter:
        if sources.get(config.anchor.name, config.anchor.adapter) != config.anchor.adapter:
            raise ValueError(f"anchor.name: found {config.anchor.name!r}, which is a teacher with another adapter")
        sources[config.anchor.name] = config.anchor.adapter
    adapters = {}
    for name, source in sources.items():
        path = weight_path(source)
        adapter, metadata = load_adapter(path)
        check_preset(path, metadata, config.preset)
        check_like(f"{name} ({path.name})", adapter.weights, "config.adapter", expected.weights)
        adapters[name] = jax.tree.map(jax.numpy.asarray, adapter)
    return adapters


def cold_start(config: Config, teachers: dict[str, Adapter], variables: Any) -> Adapter:
    """The student's initial adapter: the teachers' weighted merge, or a fresh one.

    Raises:
      ValueError: an unknown method, or weights for a teacher that is not there; names both.
    """
    start = config.cold_start
    if start.method == "none":
        return init_adapter(jax.random.key(config.seed), variables["params"], lora_config(config))
    if start.method != "merge":
        raise ValueError(f"cold_start.method: found {start.method!r}, expected 'merge' or 'none'")
    unknown = set(start.weights) - set(teachers)
    if unknown:
        raise ValueError(f"cold_start.weights: found {sorted(unknown)}, expected some of {tuple(teachers)}")
    chosen = [teachers[name] for name in start.weights]
    return merge(start.merge, chosen, list(start.weights.values()), lora_config(config))
