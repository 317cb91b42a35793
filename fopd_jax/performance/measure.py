"""One update of a config on random weights: compiled, timed, and held against what the chip can do."""

import dataclasses
from typing import Any

import jax
import numpy as np

from fopd_jax.performance.compilation import Memory, memory_of
from fopd_jax.performance.compiling import Compiled, compile_twice, empty_cache
from fopd_jax.performance.flops import Update
from fopd_jax.performance.host import available_memory
from fopd_jax.performance.phases import Arguments, Phase, phases, programs, time_programs
from fopd_jax.performance.problem import Fields, Problem
from fopd_jax.performance.timing import MatmulPeak, Timing, time_calls
from fopd_jax.performance.topology import GIB, find_chip
from fopd_jax.performance.weights import random_arguments

PROFILED_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """`profile`: folder for a trace; empty: none."""

    steps: int = 10
    warmup: int = 2
    phases: bool = False
    profile: str = ""


class OutOfMemory(Exception):
    """An update needs more memory than its device has."""


class Steps:
    """Updates one after the other, each on the state that the one before it left."""

    def __init__(self, compiled: Compiled, arguments: Arguments) -> None:
        self.frozen, self.state, self.batch = arguments
        self._program, self._metrics = compiled.program, {}

    def __call__(self) -> Any:
        self.state, self._metrics = self._program(self.frozen, self.state, self.batch)
        return self.state, self._metrics

    @property
    def arguments(self) -> Arguments:
        return self.frozen, self.state, self.batch

    def loss(self) -> float:
        """Of the last update.

        Raises:
          ValueError: it was none: loss or gradient were not finite.
        """
        loss = float(self._metrics["loss"])
        if not np.isfinite(loss) or self._metrics["skipped"]:
            raise ValueError(f"loss: found {loss} on random weights, expected an update that lands")
        return loss


def measure(problem: Problem, matmul: MatmulPeak, options: Options) -> Fields:
    """Every figure of one update; `fits` is false, with the reason, where the device's memory cannot hold it.

    Raises:
      ValueError: the update gives no finite loss, or has no phases.
    """
    fields = problem.about
    try:
        with empty_cache():
            return fields | {"fits": True} | _run(problem, matmul, options)
    except OutOfMemory as error:
        return fields | {"fits": False, "reason": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return fields | {"fits": False, "reason": str(error).splitlines()[0]}


def _run(problem: Problem, matmul: MatmulPeak, options: Options) -> Fields:
    device = problem.mesh.devices.flat[0]
    compiled = compile_twice(problem.update)
    memory = memory_of(compiled.program.memory_analysis())
    check_memory(memory, device)
    steps = Steps(compiled, jax.block_until_ready(random_arguments(problem.update)))
    timing = time_calls(steps, options.steps, options.warmup)
    found = {
        "compile": compiled.seconds,
        "step": dataclasses.asdict(timing),
        "loss": steps.loss(),
        "memory": dataclasses.asdict(memory) | {"total": memory.total, "peak": peak_bytes(device)},
        **speed(problem.samples, problem.flops, problem.mesh.size, timing, matmul, device.device_kind),
    }
    if options.profile:
        with jax.profiler.trace(options.profile):
            jax.block_until_ready([steps() for _ in range(PROFILED_STEPS)][-1])
    return found | (_phases(problem, steps.arguments, timing, matmul, options.steps) if options.phases else {})


def _phases(problem: Problem, arguments: Arguments, whole: Timing, matmul: MatmulPeak, steps: int) -> Fields:
    update = problem.update
    ablations = programs(update.pieces, update.optimizer, update.ema)
    timings = time_programs(ablations, update.arguments, arguments, steps)
    found = phases(update.pieces, timings, whole, problem.flops)
    return {
        "phases": [_phase_fields(each, problem.mesh.size, whole, matmul) for each in found],
        "programs": {name: dataclasses.asdict(each) for name, each in timings.items()},
    }


def _phase_fields(phase: Phase, chips: int, whole: Timing, matmul: MatmulPeak) -> Fields:
    rate = phase.flops / chips / phase.seconds if phase.flops and phase.seconds > 0 else None
    return {
        "phase": phase.name,
        "seconds": phase.seconds,
        "share": phase.seconds / whole.median,
        "flops_per_second_per_chip": rate,
        "mfu": rate / matmul.flops_per_second if rate else None,
    }


def speed(samples: int, flops: Update, chips: int, timing: Timing, matmul: MatmulPeak, device_kind: str) -> Fields:
    """Rates at the median step, and utilisation of the matrix product's peak and of the datasheet's (None: unknown).

    MFU counts what the mathematics needs, HFU also what rematerialisation repeats.
    """
    chip = find_chip(device_kind)
    rate = samples / timing.median
    model, hardware = (each / chips / timing.median for each in (flops.model, flops.hardware))
    peaks = {"matmul": matmul.flops_per_second, "datasheet": chip.peak_flops if chip else None}
    return {
        "samples_per_second": rate,
        "samples_per_second_per_chip": rate / chips,
        "model_flops_per_second_per_chip": model,
        "hardware_flops_per_second_per_chip": hardware,
        "mfu": {name: peak and model / peak for name, peak in peaks.items()},
        "hfu": {name: peak and hardware / peak for name, peak in peaks.items()},
    }


# ---- memory


def peak_bytes(device: Any) -> int | None:
    """What arrays and programs took of the device at most, in this process; None where the backend does not count."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def check_memory(memory: Memory, device: Any) -> None:
    """Refuse, before anything is allocated, what cannot fit: a CPU's process would be killed instead.

    Raises:
      OutOfMemory: with both sizes.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit") or available_memory()
    if limit is not None and memory.total > limit:
        raise OutOfMemory(f"the program needs {memory.total / GIB:.1f} GiB of {limit / GIB:.1f} GiB")
