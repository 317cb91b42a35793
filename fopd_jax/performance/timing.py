"""Seconds of a repeated call, each to its end on the device, and what they come to."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

MATMUL_SIDE = {"cpu": 2048}  # a tenth of a second on two cores
LARGE_SIDE = 8192  # a millisecond on the fastest chips; smaller products do not reach their peak
MATMUL_CHAIN = {"cpu": 1}
LARGE_CHAIN = 16  # products a call, so that starting it takes nothing
MATMUL_CALLS = 8


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of `count` calls, in seconds, after some that took `warmup` together."""

    count: int
    warmup: float
    minimum: float
    lower: float  # quartiles
    median: float
    upper: float
    maximum: float


def time_calls(call: Callable[[], Any], count: int, warmup: int) -> Timing:
    """Call and wait for everything that it returns, `warmup` times uncounted and `count` times one by one.

    No array may move between host and devices meanwhile.

    Raises:
      jax.errors.JaxRuntimeError: such a transfer; or what the call raises.
    """
    seconds = []
    with jax.transfer_guard("disallow"):
        for _ in range(warmup + count):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - begin)
    return summarise(seconds[warmup:], sum(seconds[:warmup]))


def summarise(seconds: list[float], warmup: float = 0.0) -> Timing:
    """Median and spread."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return Timing(len(seconds), warmup, min(seconds), lower, median, upper, max(seconds))


@dataclasses.dataclass(frozen=True)
class MatmulPeak:
    """The fastest of some large matrix products on one device, FLOPs per second."""

    dtype: str
    side: int
    flops_per_second: float
    median_flops_per_second: float


def matmul_peak(device: Any) -> MatmulPeak:
    """Measure it on random numbers (zeros are faster): in bfloat16 on an accelerator, in float32 on a CPU."""
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    side = MATMUL_SIDE.get(device.platform, LARGE_SIDE)
    chain = MATMUL_CHAIN.get(device.platform, LARGE_CHAIN)
    with jax.default_device(device):
        x, y = (jax.random.normal(key, (side, side), dtype) for key in jax.random.split(jax.random.key(0)))
        y = (y / side**0.5).astype(dtype)  # else the product of a chain overflows

        @jax.jit
        def products(x: jax.Array, y: jax.Array) -> jax.Array:
            with jax.default_matmul_precision("default"):
                return jax.lax.fori_loop(0, chain, lambda _, product: product @ y, x)

        timing = time_calls(lambda: products(x, y), MATMUL_CALLS, warmup=2)
    flops = 2.0 * side**3 * chain
    return MatmulPeak(dtype, side, flops / timing.minimum, flops / timing.median)
