"""Steps of reinforcement learning on random weights and made-up scores, timed: the rollout, and the updates on it.

Decoding and rewards, which are other programs or none, take no part.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fopd_jax.config.identity import config_hash
from fopd_jax.config.learning import GRPO, ForwardRL, Reinforced
from fopd_jax.parallel.distributed import put_replicated
from fopd_jax.parallel.sharding import replicated
from fopd_jax.performance.compilation import memory_of
from fopd_jax.performance.flops import Update
from fopd_jax.performance.measure import Options, OutOfMemory, check_memory, speed
from fopd_jax.performance.problem import Fields
from fopd_jax.performance.program import Program
from fopd_jax.performance.timing import MatmulPeak, Timing, summarise
from fopd_jax.performance.weights import random_state, random_tree
from fopd_jax.stages import forward_rl_update, grpo_update
from fopd_jax.stages.forward_rl import ForwardProcess
from fopd_jax.stages.grpo import FlowGRPO
from fopd_jax.stages.registry import find_stage
from fopd_jax.stages.reinforced import Method
from fopd_jax.stages.rewards import reward_names
from fopd_jax.steps import forward_rl
from fopd_jax.steps.grpo.spec import Base, Credit
from fopd_jax.steps.grpo.step import Programs

PHASES = ("rollout", "update")


def measure_learning(config: Reinforced, mesh: Mesh, matmul: MatmulPeak, options: Options) -> Fields:
    """Every figure of one step; `fits` is false, with the reason, where the device's memory cannot hold a program.

    Raises:
      ValueError: a field is out of range; or a step on random weights is not finite.
    """
    programs = [each for each in find_stage(config).programs(config, mesh) if each.name in _NAMES[type(config)]]
    about = _about(config, mesh)
    try:
        return about | {"fits": True} | _run(config, programs, mesh, matmul, options)
    except OutOfMemory as error:
        return about | {"fits": False, "reason": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return about | {"fits": False, "reason": str(error).splitlines()[0]}


_NAMES: dict[type, tuple[str, ...]] = {GRPO: ("pass", "begin", "end"), ForwardRL: ("update", "rollout")}


def _run(config: Reinforced, programs: list[Program], mesh: Mesh, matmul: MatmulPeak, options: Options) -> Fields:
    compiled, seconds, memory = {}, {}, {}
    for program in programs:
        began = time.perf_counter()
        compiled[program.name] = program.step.lower(*program.arguments).compile()
        seconds[program.name] = time.perf_counter() - began
        needs = memory_of(compiled[program.name].memory_analysis())
        memory[program.name] = dataclasses.asdict(needs) | {"total": needs.total}
        check_memory(needs, mesh.devices.flat[0])
    timings = _time(config, programs[1].arguments, compiled, mesh, options)
    kind = mesh.devices.flat[0].device_kind
    rows = {
        name: dataclasses.asdict(timings[name]) | speed(config.batch_size, cost, mesh.size, timings[name], matmul, kind)
        for name, cost in zip(PHASES, _costs(programs), strict=True)
    }
    return {"compile": seconds, "memory": memory, "phases": rows}


def _costs(programs: list[Program]) -> tuple[Update, Update]:
    """Of a step's rollout, the reference's answers among it, and of its updates."""
    first, second = programs[0], programs[1]
    if not first.calls:
        return second.flops, first.flops
    draws, trains = first.calls["draws"], first.calls["trains"]
    return draws.flops * draws.count, trains.flops * trains.count


def _time(
    config: Reinforced, shapes: tuple[Any, ...], compiled: dict[str, Any], mesh: Mesh, options: Options
) -> dict[str, Timing]:
    """Rollouts and the updates on each, in turn, every one to its end on the device."""
    base, state, conditioning = shapes
    base, state, conditioning = random_tree(base, 3), random_state(state), random_tree(conditioning, 2)
    method, credit = _method(config, mesh, base, compiled), _credit(config, mesh)
    jax.block_until_ready((base, state, conditioning, credit))
    seconds: dict[str, list[float]] = {name: [] for name in PHASES}
    metrics: Any = {}
    with jax.transfer_guard("disallow"):
        for _ in range(options.warmup + options.steps):
            began = time.perf_counter()
            state, rolled = jax.block_until_ready(method.roll_out(state, conditioning))
            middle = time.perf_counter()
            state, metrics = jax.block_until_ready(method.learn(state, rolled, conditioning, credit))
            seconds["rollout"].append(middle - began)
            seconds["update"].append(time.perf_counter() - middle)
    if not np.isfinite(loss := float(metrics["loss"])) or metrics["skipped"]:
        raise ValueError(f"loss: found {loss} on random weights, expected updates that land")
    return {name: summarise(each[options.warmup :], sum(each[: options.warmup])) for name, each in seconds.items()}


def _method(config: Reinforced, mesh: Mesh, base: Base, compiled: dict[str, Any]) -> Method:
    """As the stage drives it, of programs that are compiled already."""
    if isinstance(config, GRPO):
        programs = Programs(compiled["begin"], compiled["pass"], compiled["end"])
        update = dataclasses.replace(grpo_update.abstract_update(config, mesh), programs=programs)
        return FlowGRPO(update, base, config.batch_size)
    assert isinstance(config, ForwardRL)
    both = forward_rl.Programs(compiled["rollout"], compiled["update"])
    return ForwardProcess(dataclasses.replace(forward_rl_update.abstract_update(config, mesh), programs=both), base)


def _credit(config: Reinforced, mesh: Mesh) -> Credit:
    """Of scores as they might be: all there, no two alike."""
    rewards, size = len(reward_names(config.tasks)), config.batch_size
    draw = np.random.default_rng(0)
    yes, no = np.ones(size, bool), np.zeros(size, bool)
    values = draw.random((rewards, size), np.float32)
    advantage = draw.standard_normal(size, np.float32)
    task = np.arange(size, dtype=np.int32) % len(config.tasks) if len(config.tasks) > 1 else None
    return put_replicated(Credit(advantage, values, values >= 0, yes, no, task), replicated(mesh))


def _about(config: Reinforced, mesh: Mesh) -> Fields:
    return {
        "config": config.name,
        "config_hash": config_hash(config),
        "stage": config.stage,
        "preset": config.model.preset,
        "dtype": config.model.dtype,
        "remat": config.run.remat,
        "trained": config.trained,
        "guidance": config.guidance,
        "batch_size": config.batch_size,
        "images_per_prompt": config.images_per_prompt,
        "parts": config.minibatches * config.run.micro_batches,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
    }
