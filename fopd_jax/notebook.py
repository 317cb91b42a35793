"""What `import fopd_jax` offers a notebook; docs/notebook.md shows it at work.

A `Session` is a config's network with its base weights and the world around them. All else is a function of it.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from fopd_jax.adapters.lora import Adapter, effective
from fopd_jax.adapters.lora import merge as merge_adapters
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config import load
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import OPD, FlowMatching
from fopd_jax.evaluation.grid import from_pixels, to_pixels
from fopd_jax.evaluation.sampler import Sampler, generate
from fopd_jax.policy.velocity import Tree
from fopd_jax.stages.pipeline import Pipeline, load_base, load_policy, make_pipeline
from fopd_jax.stages.setup import eval_sampler
from fopd_jax.tasks.prompts import read_tasks
from fopd_jax.worlds.world import embed_prompts


@dataclasses.dataclass(frozen=True)
class Session:
    """A config, its pipeline, the base's variables, and the sampler of its section `eval`."""

    config: OPD | FlowMatching
    pipeline: Pipeline
    variables: Tree
    sampler: Sampler


def load_config(path: str | Path, variant: str = "", **changes: Any) -> OPD | FlowMatching:
    """The config of a file, with fields changed by their names, dots as two underscores: `run__steps=3`.

    Raises:
      ValueError: there is no such file, variant or field, or a value is out of range; names it.
    """
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve(override(load.load_config(path, variant), named))


def load_pipeline(config: OPD | FlowMatching) -> Session:
    """Network, world and base weights of a config, on all devices of this process.

    Raises:
      ValueError: a field names something that does not exist, or does not fit the machine.
    """
    tasks = partial(read_tasks, config.tasks) if isinstance(config, OPD) else dict
    in_memory = override(config, {"run.encoding.cache": ""}).run
    pipeline = make_pipeline(config.model, in_memory, tasks)
    sampler = eval_sampler(config.eval, config.model.shift, pipeline)
    return Session(config, pipeline, load_base(config.model, pipeline, config.seed), sampler)


def load_adapter(session: Session, source: str) -> Adapter:
    """An adapter from a file of this project's, a PEFT folder, diffusers' or ComfyUI's file, or `packaged:NAME`.

    Raises:
      ValueError: it is missing, damaged, or made for another network; names the file.
    """
    return load_policy(source, session.pipeline)


def sample(
    session: Session, prompts: Sequence[str], adapter: Adapter | None = None, *, seed: int = 0
) -> UInt8[np.ndarray, "n h w 3"]:
    """One image a prompt; image i is a function of prompt, `seed + i` and the section `eval` alone."""
    world, requests = session.pipeline.world, [(prompt, seed + i) for i, prompt in enumerate(prompts)]
    world.prepare([*prompts, ""])
    policy = {} if adapter is None else effective(adapter)
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
    return merge_adapters(method, adapters, weights, session.config.adapter)


def score(
    session: Session, task: str, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str]
) -> dict[str, Float[np.ndarray, " n"]]:
    """A task's scores of images, one array a skill.

    Raises:
      ValueError: there is no such task, or nothing measures it.
    """
    tasks = session.pipeline.world.tasks
    measure = tasks[task].score if task in tasks else None
    if measure is None:
        raise ValueError(f"task: found {task!r}, expected one with scores: {[n for n, t in tasks.items() if t.score]}")
    return measure(from_pixels(images), list(prompts))


def encode(session: Session, prompts: Sequence[str]) -> Conditioning:
    """Prompts as the network's text inputs, on the devices; as many as their mesh divides."""
    session.pipeline.world.prepare(prompts)
    return embed_prompts(session.pipeline.world, prompts, session.pipeline.mesh)
