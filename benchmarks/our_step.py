"""Our side of the comparison: the real update of a config, on random weights, timed.

    python benchmarks/our_step.py --config=configs/miniature.py --json=OUT

`benchmarks/compare.py` runs it, and `our_check.py` before it.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from peer_problem import OURS, Problem, forward_equivalents, summarise

from fopd_jax.config.flags import parse_flags, read_config
from fopd_jax.config.schema import OPD, Config
from fopd_jax.config.variants import with_teachers
from fopd_jax.files import write_text
from fopd_jax.interop.lora.modules import places
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiTConfig
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.performance.weights import random_arguments
from fopd_jax.stages.abstract import abstract_update, world_shapes
from fopd_jax.stages.opd_update import make_spec

PACKAGES = ("jax", "jaxlib", "flax")
GIB = 2**30
Tree = Any


# ---- the problem


def comparable(config: Config, teachers: int) -> OPD:
    """The config with a number of teachers, if it is one that the peer can run.

    Raises:
      ValueError: names the field, its value, and what the peer has.
    """
    if not isinstance(config, OPD):
        raise ValueError(f"stage: found {config.stage!r}, expected 'opd'")
    plain = {
        "trained": (config.trained, "adapter"),
        "whole_teachers": (config.whole_teachers, False),
        "updates_per_rollout": (config.updates_per_rollout, 1),
        "minibatches": (config.minibatches, 1),
        "sampler.transition": (config.sampler.transition, "sde"),
        "sampler.window": (config.sampler.window, None),
        "sampler.trained": (config.sampler.trained, None),
        "anchor.every": (config.anchor.every, 1),
        "one_timestep": (config.one_timestep, False),
        "objective.reward": (config.objective.reward, "kl"),
    }
    for field, (found, expected) in plain.items():
        if found != expected:
            raise ValueError(f"{field}: found {found!r}, but the comparison has only {expected!r}")
    return with_teachers(config, teachers) if teachers else config


def make_problem(config: OPD, network: MMDiTConfig, latent: tuple[int, int, int], tokens: int) -> Problem:
    """What both sides compute: the config on a network; `tokens`: of the text."""
    objective, optimizer = config.objective, config.optimizer
    spec = make_spec(config, latent)
    wanted = {name for group in config.adapter.targets for name in TARGETS[group]}
    adapted = {name for name, place in places(network).items() if "/".join(place.path[-2:]) in wanted}
    return Problem(
        network=network_arguments(network),
        latent=latent,
        text_tokens=tokens,
        batch=config.batch_size,
        dtype=config.model.dtype,
        rank=config.adapter.rank,
        scale=config.adapter.alpha / config.adapter.rank,
        targets=tuple(sorted({name.split(".", 2)[2] for name in adapted})),  # after "transformer_blocks.7."
        sigmas=tuple(map(float, spec.sigmas)),
        noise_level=config.sampler.noise_level,
        objective=objective.name,
        weighting=objective.weighting,
        clip=objective.clip,
        mar_beta=objective.mar_beta,
        guidance=spec.guidance,
        teacher_guidance=spec.teacher_guidance,
        learning_rate=optimizer.learning_rate,
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        ema_decay=config.ema.decay,
    )


def network_arguments(network: MMDiTConfig) -> dict[str, Any]:
    """Of diffusers' `SD3Transformer2DModel`."""
    return {
        "sample_size": network.base_size * network.patch_size,
        "patch_size": network.patch_size,
        "in_channels": network.channels,
        "out_channels": network.channels,
        "num_layers": network.depth,
        "attention_head_dim": network.head_dim,
        "num_attention_heads": network.num_heads,
        "joint_attention_dim": network.context_dim,
        "caption_projection_dim": network.width,
        "pooled_projection_dim": network.pooled_dim,
        "pos_embed_max_size": network.table_size,
        "dual_attention_layers": list(range(network.dual_layers)),
        "qk_norm": "rms_norm" if network.qk_norm else None,
    }


# ---- the timing


def measure(config: OPD, problem: Problem, steps: int, warmup: int) -> dict[str, Any]:
    """Times updates one by one, each to its end on the device, after some that are not counted.

    Raises:
      ValueError: there are several devices, of which the peer would use one; or the loss is not finite.
    """
    if jax.device_count() != 1:
        raise ValueError(f"devices: found {jax.device_count()}, but the comparison is of one; hide the others")
    update = abstract_update(config, make_mesh(config.run.mesh))
    frozen, state, batch = jax.block_until_ready(random_arguments(update))
    begin = time.perf_counter()
    step = update.step.lower(*update.arguments).compile()
    compiled, seconds, metrics = time.perf_counter() - begin, [], {}
    for _ in range(warmup + steps):
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(step(frozen, state, batch))
        seconds.append(time.perf_counter() - begin)
    if metrics["skipped"] or not np.isfinite(metrics["loss"]):
        raise ValueError(f"loss: found {metrics['loss']}, expected a finite number")
    return {
        "program": OURS,
        "forward_equivalents": forward_equivalents(problem, OURS),
        "rematerialisation": config.run.remat,
        "compile_s": compiled,
        "warmup_s": sum(seconds[:warmup]),
        **summarise(seconds[warmup:], problem.batch),
        "loss": float(metrics["loss"]),
        "peak_memory_gib": peak_memory(),
        "device": jax.devices()[0].device_kind,
        "threads": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def peak_memory() -> float:
    """Of the accelerator's memory what arrays took at most; without one, the process's."""
    if stats := jax.devices()[0].memory_stats():
        return stats["peak_bytes_in_use"] / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, OPD, Problem]:
    """This program's options, the config that the others describe, and its problem."""
    parser.add_argument("--teachers", type=int, default=0, help="number of routed teachers; 0: the config's")
    args, config_flags = parser.parse_known_args()
    parse_flags([sys.argv[0], *config_flags])
    config = comparable(read_config(), args.teachers)
    latent, encoded = world_shapes(config.model)
    return args, config, make_problem(config, PRESETS[config.model.preset], latent, encoded.context.shape[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    args, config, problem = parse(parser)
    text = json.dumps(measure(config, problem, args.steps, args.warmup), indent=2)
    print(text)
    if args.json:
        write_text(args.json, text + "\n")


if __name__ == "__main__":
    main()
