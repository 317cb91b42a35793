"""Environments that compile fast rather than well: in tests compiling takes far longer than running.

Up to rounding the programs compute the same. Fusions are emitted by XLA's plain emitter and not by way of MLIR, which
halves the time; a program of few operations is not split into modules that are compiled side by side.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def environment(devices: int = 0, **others: str) -> dict[str, str]:
    """That of a program that finds this repository; `devices` are simulated, by 0 the program decides."""
    simulated = f"--xla_force_host_platform_device_count={devices} " if devices else ""
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": simulated + FLAGS, "PYTHONPATH": str(ROOT)} | others
