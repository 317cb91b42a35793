"""Names of machines, and what is said where a machine cannot be had."""

import importlib.util

import jax
import pytest

from fopd_jax.performance import gpu_target, topology
from fopd_jax.performance.topology import CHIPS, GIB, GPUS, MACHINES, configure, parse_topology, topology_devices


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("v6e:16x16", 256), ("v5e:2x4", 8), ("v5p:4x4x4", 64), ("v5p:2x2x1", 4), ("cpu:8", 8),
        ("h100:1", 1), ("h100:8", 8), ("h200:4x8", 32),
    ],
)  # fmt: skip
def test_a_name_says_how_many_chips(name: str, count: int):
    found = parse_topology(name)
    assert found.count == count
    assert (found.platform, found.chip) == {
        "v": ("tpu", CHIPS.get(name.partition(":")[0])), "c": ("cpu", None),
        "h": ("gpu", GPUS["NVIDIA H200" if name.startswith("h200") else "NVIDIA H100 80GB HBM3"]),
    }[name[0]]  # fmt: skip


@pytest.mark.parametrize("name", ["v9:2x2", "v6", "tpu:2x2", "", "cpu8", "a100:8", "H100:8"])
def test_unknown_kinds_are_named_with_the_known_ones(name: str):
    with pytest.raises(ValueError, match=rf"topology: found '{name}', expected cpu:N or one of v5e, v5p, v6e, h100"):
        parse_topology(name)


@pytest.mark.parametrize("name", ["v6e:4", "v6e:2x2x2", "v6e:0x4", "v6e:2xx4", "v6e:-2x4", "v6e:2x4 ", "v6e:٢x2"])
def test_shapes_that_a_torus_cannot_have_are_named(name: str):
    with pytest.raises(ValueError, match=rf"topology: found '{name}', expected v6e:AxB of lengths ≥ 1"):
        parse_topology(name)


@pytest.mark.parametrize(("name", "most"), [("cpu:1025", 1024), ("cpu:999999999", 1024), ("v6e:1000x1000", 65536)])
def test_more_than_can_be_made_is_refused_at_once(name: str, most: int):
    with pytest.raises(ValueError, match=rf"topology: found '{name}', which is \d+ devices, expected at most {most}"):
        parse_topology(name)


@pytest.mark.parametrize("name", ["h100:16", "h100:2x4", "h200:8x2"])
def test_gpus_come_in_nodes_of_eight(name: str):
    kind = name.partition(":")[0]
    with pytest.raises(
        ValueError, match=rf"topology: found '{name}', expected at most 8 GPUs a node; several nodes are {kind}:NODESx8"
    ):
        parse_topology(name)


@pytest.mark.parametrize("name", ["h100:", "h100:0", "h100:1x2x8", "h100:eight"])
def test_gpus_are_counted(name: str):
    with pytest.raises(ValueError, match=rf"topology: found '{name}', expected h100:GPUS or h100:NODESx8 of lengths"):
        parse_topology(name)


def test_every_kind_has_its_own_shape():
    with pytest.raises(ValueError, match="expected v5p:AxBxC"):
        parse_topology("v5p:4x4")
    with pytest.raises(ValueError, match="expected cpu:A of lengths"):
        parse_topology("cpu:2x2")


def test_figures_of_a_chip_are_plausible():
    """Peak over memory bandwidth is a few hundred FLOPs a byte on every chip; memory is what the datasheet rounds."""
    for chip in filter(None, (machine.chip for machine in MACHINES.values())):
        assert 100 < chip.peak_flops / chip.hbm_bandwidth < 700
    assert {kind: round(chip.hbm / GIB) for kind, chip in CHIPS.items()} == {"v5e": 16, "v5p": 96, "v6e": 31}
    assert {chip.kind: round(chip.hbm / 1e9) for chip in GPUS.values()} == {"H200": 151, "H100": 86, "A100": 43}


@pytest.mark.parametrize(("name", "compiler", "extra"), [("v6e:2x4", "TPU", "tpu-aot"), ("h100:8", "GPU", "gpu-aot")])
def test_without_the_compiler_the_extra_is_named(name: str, compiler: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = rf"{name} needs the {compiler} compiler; pip install 'fopd_jax\[{extra}\]'"
    with pytest.raises(ValueError, match=expected):
        configure(parse_topology(name))


def test_cudnn_is_part_of_the_gpus_compiler(monkeypatch: pytest.MonkeyPatch):
    """Without it attention has no program; a package that would hold it may not be there either."""

    def find(name: str) -> object:
        if name == gpu_target.LIBRARY:
            raise ModuleNotFoundError(name)
        return name

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ValueError, match=r"h100:1 needs the GPU compiler; pip install 'fopd_jax\[gpu-aot\]'"):
        configure(parse_topology("h100:1"))


def test_simulated_devices_must_be_asked_for_first():
    assert jax.device_count() < 64
    with pytest.raises(ValueError, match="cpu:64 must be asked for before anything is computed"):
        configure(parse_topology("cpu:64"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu-aot")
def test_a_slice_that_does_not_exist_is_refused_by_the_compiler(monkeypatch: pytest.MonkeyPatch):
    for variable, value in topology._ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    assert len(topology_devices(parse_topology("v5p:4x4x4"))) == 64  # a chip with two cores is one device
    with pytest.raises(ValueError, match=r"topology: v6e:3x5: INVALID_ARGUMENT: .* not divisible"):
        topology_devices(parse_topology("v6e:3x5"))


@pytest.mark.skipif(not gpu_target.compiler_installed(), reason="needs the extra gpu-aot")
def test_gpus_that_are_not_there_are_devices_of_as_many_processes_as_nodes():
    devices = topology_devices(parse_topology("h100:2x8"))
    assert len(devices) == 16
    assert {device.process_index for device in devices} == {0, 1}
    assert {(device.platform, device.device_kind) for device in devices} == {("gpu", "NVIDIA H100 80GB HBM3")}
