"""Captioned latents beside distillation: where section `offline` finds them, and how they go along with the prompts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.rules import within
from fopd_jax.config.schema import OPD
from fopd_jax.parallel.distributed import rows_of
from fopd_jax.parallel.sharding import AnyMesh, batch_sharding, check_batch
from fopd_jax.stages.pipeline import Pipeline
from fopd_jax.worlds.prompt_stream import Batch, PromptStream
from fopd_jax.worlds.world import CaptionedLatents


def make_offline(config: OPD, pipeline: Pipeline) -> CaptionedLatents | None:
    """What a config matches beside its teachers; None where it matches nothing.

    Raises:
      ValueError: it names no images, those of another world, or a batch that the mesh does not divide; names the field.
    """
    offline, world = config.offline, pipeline.world
    if not offline.weight:
        return None
    check_batch("offline.batch_size", offline.batch_size, pipeline.mesh)
    if not offline.tasks:
        raise ValueError(f"offline.tasks: found none, expected some where offline.weight is {offline.weight:g}")
    if pipeline.manifest is None and (unknown := sorted(set(offline.tasks) - set(world.tasks))):
        raise ValueError(f"offline.tasks: found {unknown[0]!r}, expected some of {tuple(world.tasks)}")
    for name, pairs in offline.tasks.items():
        if unread := [field for field in ("test", "rewards") if getattr(pairs, field)]:
            raise ValueError(
                f"offline.tasks.{name}.{unread[0]}: found some, expected none: nothing is evaluated of them"
            )
    if world.pairs is None:
        raise ValueError(
            f"offline.weight: found {offline.weight:g}, but the world of {pipeline.preset!r} has no images"
        )
    with within("offline"):
        return world.pairs(offline.tasks, offline.batch_size, offline.empty_caption, config.seed)


def fed_rows(
    stream: PromptStream, pairs: CaptionedLatents | None, config: OPD, mesh: AnyMesh
) -> tuple[Callable[[int], Any], int | tuple[int, int]]:
    """What a feed takes: `step →` this process's rows of the prompts, or of them and of the captioned latents as a
    tuple, and the sizes of these batches.
    """
    if pairs is None:
        return stream.batch, config.batch_size
    size = config.offline.batch_size
    mine = rows_of(batch_sharding(mesh), size)
    return lambda step: (stream.batch(step), pairs.batch(step, mine)), (config.batch_size, size)


def embedded_batch(embed: Callable[[Any], Conditioning], fed: Batch | tuple[Batch, Any]) -> Batch:
    """What a feed gave, on the devices as one batch, as updates take it."""
    batch, offline = fed if isinstance(fed, tuple) else (fed, None)
    if offline is not None:
        offline = {**offline, "conditioning": embed(offline["conditioning"])}
    return dataclasses.replace(batch, conditioning=embed(batch.conditioning), offline=offline)


def offline_shapes(
    config: OPD, latent_shape: tuple[int, int, int], rows: Callable[[int], Conditioning], split: Any
) -> Any:
    """The captioned latents of a step as shapes; `rows(n)`: as many encoded captions. None where nothing is matched."""
    if not config.offline.weight:
        return None
    size = config.offline.batch_size
    x0 = jax.ShapeDtypeStruct((size, *latent_shape), jax.numpy.float32, sharding=split)
    return {"x0": x0, "conditioning": rows(size)}
