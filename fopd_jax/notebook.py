"""What `import fopd_jax` offers a notebook; docs/notebook.md shows it at work.

A `Session` is a config's network with its base weights and the world around them. All else is a function of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from fopd_jax.adapters.coordinates import placed_at
from fopd_jax.adapters.lora import Adapter, effective
from fopd_jax.adapters.merging import merge as merge_adapters
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config import load
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import OPD, FlowMatching, RoutedTask
from fopd_jax.config.stages import StageConfig
from fopd_jax.config.teaching import PAPER_GUIDANCE, ColdStart
from fopd_jax.evaluation.sampler import Sampler, generate
from fopd_jax.evaluation.score import measure
from fopd_jax.parallel.distributed import warn
from fopd_jax.parallel.sharding import batch_sharding
from fopd_jax.policy.velocity import Tree
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.rewards.reward import Metadata
from fopd_jax.stages.coordinates import skills
from fopd_jax.stages.opd_update import OPDUpdate, make_spec, make_update
from fopd_jax.stages.pipeline import Pipeline, load_base, load_policy, make_pipeline
from fopd_jax.stages.rewards import furnish
from fopd_jax.stages.setup import eval_sampler, null_conditioning
from fopd_jax.stages.teachers import conform_all, make_bank
from fopd_jax.steps.opd.pieces import Metrics
from fopd_jax.steps.opd.replay import collect, loss_and_gradient
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.state import TrainState, make_optimizer
from fopd_jax.steps.visits import Stored
from fopd_jax.tasks.prompts import read_tasks
from fopd_jax.worlds.prompt_stream import Batch
from fopd_jax.worlds.world import embed_prompts


@dataclasses.dataclass(frozen=True)
class Session:
    """A config, its pipeline, the base's variables, and the sampler of its section `eval`."""

    config: StageConfig
    pipeline: Pipeline
    variables: Tree
    sampler: Sampler


def load_config(path: str | Path, variant: str = "", **changes: Any) -> StageConfig:
    """The config of a file, with fields changed by their names, dots as two underscores: `run__steps=3`.

    Raises:
      ValueError: there is no such file, variant or field, or a value is out of range; names it.
    """
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve(override(load.load_config(path, variant), named))


def load_pipeline(config: StageConfig) -> Session:
    """Network, world and base weights of a config, on all devices of this process.

    Raises:
      ValueError: a field names something that does not exist, or does not fit the machine.
    """
    tasks = dict if isinstance(config, FlowMatching) else partial(read_tasks, config.tasks)
    in_memory = override(config, {"run.encoding.cache": ""}).run
    pipeline = make_pipeline(config.model, in_memory, tasks)
    pipeline = dataclasses.replace(pipeline, world=furnish(config, pipeline.world, pipeline.world.tasks))
    sampler = eval_sampler(config.eval, config.model.shift, pipeline)
    return Session(config, pipeline, load_base(config.model, pipeline, config.seed), sampler)


def load_adapter(session: Session, source: str) -> Adapter:
    """An adapter from a file of this project's, a PEFT folder, diffusers' or ComfyUI's file, or `packaged:NAME`.

    Raises:
      ValueError: it is missing, damaged, or made for another network; names the file.
    """
    return load_policy(source, session.pipeline)


def generate_images(
    session: Session,
    prompts: Sequence[str],
    adapter: Adapter | None = None,
    *,
    seed: int = 0,
    coordinates: Sequence[float] = (),
) -> UInt8[np.ndarray, "n h w 3"]:
    """One image a prompt; image i is a function of prompt, `seed + i` and the section `eval` alone.

    `coordinates`: of an adapter that has some, in the order in which its card names its skills; by default 1 each.
    """
    world, requests = session.pipeline.world, [(prompt, seed + i) for i, prompt in enumerate(prompts)]
    world.prepare([*prompts, ""])
    policy = {} if adapter is None else effective(adapter)
    if coordinates:
        policy = placed_at(policy, np.asarray(coordinates, np.float32))
    images = generate(session.sampler, world, session.variables, policy, requests, session.config.eval.batch_size)
    return to_pixels(np.stack([image for _, image in images]))


def merge(
    session: Session, adapters: Sequence[Adapter], weights: Sequence[float] | None = None, method: str = "svd"
) -> Adapter:
    """Adapters' weighted average (by default all alike), as `cold_start.merge` has it; ranks as the config's adapter.

    Raises:
      ValueError: unknown method, or numbers of adapters and weights that differ.
    """
    weights = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ValueError(f"weights: found {len(weights)}, expected {len(adapters)}, one an adapter")
    start = session.config.cold_start if isinstance(session.config, OPD) else ColdStart()
    return merge_adapters(
        method, adapters, weights, session.config.adapter, density=start.density, seed=session.config.seed
    )


def score(
    session: Session,
    task: str,
    images: UInt8[np.ndarray, "n h w 3"],
    prompts: Sequence[str],
    metadata: Sequence[Metadata] = (),
) -> dict[str, Float[np.ndarray, " n"]]:
    """What a task's rewards say of images, one array a reward, NaN where it failed.

    `metadata`: of the prompts, where rewards need any; `fopd_jax.evaluation.score.measure` gives details, too.

    Raises:
      ValueError: there is no such task, nothing measures it, or a prompt can never be scored.
    """
    world = session.pipeline.world
    names = world.tasks[task].scored if task in world.tasks else ()
    if not names:
        scored = [name for name, each in world.tasks.items() if each.scored]
        raise ValueError(f"task: found {task!r}, expected one with rewards: {scored}")
    prompts, beside = list(prompts), metadata or [{}] * len(prompts)
    for name in names:
        world.rewards[name].check(prompts, beside)
    found = measure(world.rewards, names, images, prompts, beside)
    return {name: scores.values for name, scores in found.items()}


def encode(session: Session, prompts: Sequence[str]) -> Conditioning:
    """Prompts as the network's text inputs, on the devices; as many as their mesh divides."""
    session.pipeline.world.prepare(prompts)
    return embed_prompts(session.pipeline.world, prompts, session.pipeline.mesh)


# ---- distillation on one's own arrays


@dataclasses.dataclass(frozen=True)
class Distiller:
    """The OPD update of given teachers, compiled when it is first called.

    `conditioning`: what `encode` returns, or any arrays of its shapes, leading axis `batch_size`; `route [B]`: each
    sample's teacher by its place.
    """

    config: OPD
    update: OPDUpdate
    frozen: Frozen

    def start(self, student: Adapter) -> TrainState:
        """The state of step 0."""
        return self.update.trained.born(student, self.update.optimizer, self.config.seed)

    def step(self, state: TrainState, conditioning: Conditioning, route: Any) -> tuple[TrainState, Metrics]:
        """Roll out, ask, differentiate, update; the state is donated."""
        return self.update.step(self.frozen, state, self._batch(conditioning, route))

    def rollout(self, state: TrainState, conditioning: Conditioning, route: Any) -> Stored:
        """The trained steps of the student's own rollout, with what teachers and anchor say there; no update."""
        return jax.jit(partial(collect, self.update.pieces))(self.frozen, state, self._batch(conditioning, route))

    def loss_and_gradient(
        self, student: Adapter, conditioning: Conditioning, route: Any, trajectory: Stored
    ) -> tuple[Float[Array, ""], Adapter, dict[str, Float[Array, " b"]]]:
        """Mean loss, its gradient and per-sample sums at a given trajectory, whoever rolled it out."""
        differentiate = jax.jit(partial(loss_and_gradient, self.update.pieces))
        return differentiate(self.frozen, student, self._batch(conditioning, route), trajectory)

    def _batch(self, conditioning: Conditioning, route: Any) -> Batch:
        return jax.device_put(
            Batch(conditioning, jnp.asarray(route, jnp.int32)), batch_sharding(self.update.pieces.groups.mesh)
        )


def make_opd_step(
    session: Session, teachers: Mapping[str, Adapter], anchor: Adapter | None = None, **changes: Any
) -> Distiller:
    """The update that distils teachers into one student; `changes`: fields of an OPD config, as in `load_config`.

    `anchor`: of MAR; None: the base. Teachers named like the config's tasks keep their guidance, which arrays do not
    tell: where the config leaves it to files, it is the paper's, with a line. Others have none.

    Raises:
      ValueError: an adapter does not fit the student's layers, or a field is out of range; names it.
    """
    given = session.config
    base = given if isinstance(given, OPD) else OPD(given.name, model=given.model, adapter=given.adapter, run=given.run)
    known = base.tasks
    tasks = {name: known[name] if name in known else RoutedTask(guidance=1.0) for name in teachers}
    named = {name.replace("__", "."): value for name, value in changes.items()}
    config = resolve(override(base, {"tasks": tasks, **named}))
    if config.networks:
        raise ValueError("networks: found some, expected none: teachers are adapters on the session's network here")
    if skills(config):
        raise ValueError(f"coordinates.rank: found {config.coordinates.rank}, expected 0: arrays do not draw any")
    asked = {f"tasks.{name}": task for name, task in config.tasks.items()}
    for name, each in (asked if anchor is None else asked | {"anchor": config.anchor}).items():
        if each.guidance is None:
            warn(f"{name}.guidance is not set, and arrays do not say it; {PAPER_GUIDANCE:g} is assumed")
    pipeline, latent_shape = session.pipeline, session.pipeline.world.latent_shape
    boxed, spec = boxed_variables(pipeline.model, latent_shape), make_spec(config, latent_shape)
    update = make_update(config, pipeline.model, boxed, spec, make_optimizer(config.optimizer), pipeline.mesh)
    everyone = {**teachers, **({} if anchor is None else {"the anchor": anchor})}
    fitted = conform_all(config, pipeline, everyone)
    bank = make_bank(
        config, pipeline, dict(zip(teachers, fitted, strict=False)), None if anchor is None else fitted[-1]
    )
    return Distiller(config, update, Frozen(session.variables, bank, null_conditioning(pipeline)))
