"""Machines by name: `v6e:16x16` (chips of a TPU slice that need not be there) or `cpu:8` (simulated devices).

A TPU's devices are those of the real compiler, which the extra `tpu-aot` brings to any host; they compile but do not
compute. The process keeps the CPU as its backend.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip has. `hbm` is what the compiler gives to a program, a little less than the datasheet's memory."""

    kind: str
    peak_flops: float  # bfloat16, per second
    hbm: int  # bytes
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second, all links (NVLink's, of a GPU), both directions together
    dimensions: int  # of the torus; 0: no torus


# Datasheets: cloud.google.com/tpu/docs/{v5e,v5p,v6e}; memory: the compiler's own limit (libtpu 0.0.42).
CHIPS = {
    "v5e": Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 400e9, 2),
    "v5p": Chip("v5p", 459e12, int(95.74 * GIB), 2765e9, 1200e9, 3),
    "v6e": Chip("v6e", 918e12, int(31.25 * GIB), 1638e9, 800e9, 2),
}
# Datasheets: nvidia.com; dense products, without sparsity. Memory: what the driver shows.
GPUS = {
    "NVIDIA H200": Chip("H200", 989e12, 143771 * 2**20, 4800e9, 900e9, 0),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 81559 * 2**20, 3350e9, 900e9, 0),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 81920 * 2**20, 2039e9, 600e9, 0),
    "NVIDIA A100-SXM4-40GB": Chip("A100", 312e12, 40960 * 2**20, 1555e9, 600e9, 0),
}
_TPUS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is used, so none is taken away from another process
    "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks a metadata server that is not there
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that a present device is by JAX's name of its kind; None for one that is not in the tables."""
    return GPUS.get(device_kind) or CHIPS.get(_TPUS.get(device_kind, ""))


@dataclasses.dataclass(frozen=True)
class Topology:
    """A parsed name; `chip` is None for simulated devices, whose figures mean nothing."""

    name: str
    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Chips, each of which is one device: those with two cores run them as one."""
        return math.prod(self.shape)


MOST_SIMULATED, MOST_CHIPS = 1024, 65536
"""More would take minutes to be made, before anything is said."""


def parse_topology(name: str) -> Topology:
    """`KIND:AxB[xC]` or `cpu:N`.

    Raises:
      ValueError: unknown kind, or a shape that such a slice cannot have; names what was found and what is right.
    """
    kind, _, spelled = name.partition(":")
    if kind not in (*CHIPS, "cpu"):
        raise ValueError(f"topology: found {name!r}, expected cpu:N or one of {', '.join(CHIPS)} with its shape")
    dimensions = 1 if kind == "cpu" else CHIPS[kind].dimensions
    lengths = spelled.split("x")
    if len(lengths) != dimensions or not all(re.fullmatch("[1-9][0-9]{0,8}", each) for each in lengths):
        raise ValueError(f"topology: found {name!r}, expected {kind}:{'x'.join('ABC'[:dimensions])} of lengths ≥ 1")
    most = MOST_SIMULATED if kind == "cpu" else MOST_CHIPS
    if (count := math.prod(map(int, lengths))) > most:
        raise ValueError(f"topology: found {name!r}, which is {count} devices, expected at most {most}")
    return Topology(name, CHIPS.get(kind), tuple(map(int, lengths)))


def configure(topology: Topology) -> None:
    """Prepare this process, before its first computation: CPU backend, libtpu's environment, simulated devices.

    Raises:
      ValueError: the compiler of a TPU is not installed; or the process has already computed with fewer devices.
    """
    if topology.chip is not None and importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology: {topology.name} needs the TPU compiler; pip install 'fopd_jax[tpu-aot]'")
    jax.config.update("jax_platforms", "cpu")
    if topology.chip is not None:
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        return
    try:
        jax.config.update("jax_num_cpu_devices", topology.count)
    except RuntimeError as error:
        raise ValueError(f"topology: {topology.name} must be asked for before anything is computed") from error


def topology_devices(topology: Topology) -> list[Any]:
    """The devices to build a mesh from, after `configure`.

    Raises:
      ValueError: the slice cannot have that shape; says why.
    """
    if topology.chip is None:
        return list(jax.devices("cpu")[: topology.count])
    try:
        devices = topologies.get_topology_desc(topology.name, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology: {topology.name}: {str(error).splitlines()[0]}") from error
    return list(devices)
