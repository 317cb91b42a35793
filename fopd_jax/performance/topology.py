"""Machines by name: `v6e:16x16` (chips of a TPU slice), `h100:8` or `h100:4x8` (GPUs of a node, of four) or `cpu:8`.

TPUs and GPUs need not be there: their devices are those of the real compiler, which the extras `tpu-aot` and `gpu-aot`
bring to any host; they compile but do not compute. Those of `cpu:8` are simulated. The process keeps the CPU as its
backend.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax.experimental import topologies

from fopd_jax.performance.gpu_target import compiler_installed, target_config

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
    node_bandwidth: float = 0.0  # of a GPU's own network card to other nodes, both directions together


# Datasheets: cloud.google.com/tpu/docs/{v5e,v5p,v6e}; memory: the compiler's own limit (libtpu 0.0.42).
CHIPS = {
    "v5e": Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 400e9, 2),
    "v5p": Chip("v5p", 459e12, int(95.74 * GIB), 2765e9, 1200e9, 3),
    "v6e": Chip("v6e", 918e12, int(31.25 * GIB), 1638e9, 800e9, 2),
}
# Datasheets: nvidia.com; dense products, without sparsity. Memory: what the driver shows. DGX and HGX nodes have a
# network card of 400 Gbit/s (of 200, for an A100) for every GPU.
GPUS = {
    "NVIDIA H200": Chip("H200", 989e12, 143771 * 2**20, 4800e9, 900e9, 0, 100e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 81559 * 2**20, 3350e9, 900e9, 0, 100e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 81920 * 2**20, 2039e9, 600e9, 0, 50e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100", 312e12, 40960 * 2**20, 1555e9, 600e9, 0, 50e9),
}
_CARDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
NODE = 8  # GPUs that NVLink joins
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


MOST_SIMULATED, MOST_CHIPS = 1024, 65536
"""More would take minutes to be made, before anything is said."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a topology's name may begin with. `shapes`: what may follow; `most`: devices."""

    platform: Literal["tpu", "gpu", "cpu"]
    chip: Chip | None
    shapes: tuple[str, ...]
    most: int = MOST_CHIPS


MACHINES: dict[str, Machine] = {
    **{kind: Machine("tpu", chip, ("x".join("ABC"[: chip.dimensions]),)) for kind, chip in CHIPS.items()},
    **{kind: Machine("gpu", GPUS[card], ("GPUS", f"NODESx{NODE}")) for kind, card in _CARDS.items()},
    "cpu": Machine("cpu", None, ("A",), MOST_SIMULATED),
}


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Of machines that need not be there: what it is called, the extra that brings it, its environment, its devices."""

    name: str
    extra: str
    installed: Callable[[], bool]
    environment: Mapping[str, str]
    devices: Callable[["Topology"], list[Any]]


@dataclasses.dataclass(frozen=True)
class Topology:
    """A parsed name; `chip` is None for simulated devices, whose figures mean nothing."""

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Chips, each of which is one device: those with two cores run them as one."""
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """`KIND:AxB[xC]` of a TPU slice, `KIND:GPUS` of one node, `KIND:NODESx8` of several, or `cpu:N`.

    Raises:
      ValueError: unknown kind, or a shape that such a machine cannot have; names what was found and what is right.
    """
    kind, _, spelled = name.partition(":")
    if kind not in MACHINES:
        known = ", ".join(each for each in MACHINES if each != "cpu")
        raise ValueError(f"topology: found {name!r}, expected cpu:N or one of {known} with its shape")
    machine, lengths = MACHINES[kind], spelled.split("x")
    fitting = [shape for shape in machine.shapes if shape.count("x") + 1 == len(lengths)]
    if not fitting or not all(re.fullmatch("[1-9][0-9]{0,8}", each) for each in lengths):
        right = " or ".join(f"{kind}:{shape}" for shape in machine.shapes)
        raise ValueError(f"topology: found {name!r}, expected {right} of lengths ≥ 1")
    shape = tuple(map(int, lengths))
    if machine.platform == "gpu" and (shape[-1] > NODE or (len(shape) > 1 and shape[-1] != NODE)):
        raise ValueError(
            f"topology: found {name!r}, expected at most {NODE} GPUs a node; several nodes are {kind}:NODESx{NODE}"
        )
    if (count := math.prod(shape)) > machine.most:
        raise ValueError(f"topology: found {name!r}, which is {count} devices, expected at most {machine.most}")
    return Topology(name, machine.platform, machine.chip, shape)


def configure(topology: Topology) -> None:
    """Prepare this process, before its first computation: CPU backend, a compiler's environment, simulated devices.

    Raises:
      ValueError: the compiler is not installed; or the process has already computed with fewer devices.
    """
    compiler = _COMPILERS.get(topology.platform)
    if compiler is not None and not compiler.installed():
        needed = f"the {compiler.name} compiler; pip install 'fopd_jax[{compiler.extra}]'"
        raise ValueError(f"topology: {topology.name} needs {needed}")
    jax.config.update("jax_platforms", "cpu")
    if compiler is not None:
        for variable, value in compiler.environment.items():
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
    if topology.platform not in _COMPILERS:
        return list(jax.devices("cpu")[: topology.count])
    try:
        return _COMPILERS[topology.platform].devices(topology)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology: {topology.name}: {str(error).splitlines()[0]}") from error


def _tpu_devices(topology: Topology) -> list[Any]:
    return list(topologies.get_topology_desc(topology.name, "tpu").devices)


def _gpu_devices(topology: Topology) -> list[Any]:
    """Of as many processes as nodes; XLA spells a cluster as joined nodes x nodes x GPUs of one."""
    kind, (*nodes, each) = topology.name.partition(":")[0], topology.shape
    card = _CARDS[kind]
    described = topologies.get_topology_desc(
        topology.name, "cuda", topology=f"1x{math.prod(nodes)}x{each}",
        target_config=target_config(card, GPUS[card].hbm, GPUS[card].hbm_bandwidth),
    )  # fmt: skip
    return list(described.devices)


_COMPILERS = {
    "tpu": Compiler(
        "TPU", "tpu-aot", lambda: importlib.util.find_spec("libtpu") is not None, _ENVIRONMENT, _tpu_devices
    ),
    "gpu": Compiler("GPU", "gpu-aot", compiler_installed, {}, _gpu_devices),
}
