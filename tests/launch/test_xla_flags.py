"""The flag files: every flag explained, and known to the compilers that the project runs on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "launch" / "xla_flags"
CPU = "import jax; jax.devices()"  # jaxlib knows every backend's flags
TPU = "from jax.experimental import topologies; topologies.get_topology_desc('v6e:2x4', 'tpu')"


def flags(name: str) -> list[str]:
    return [line for line in (FOLDER / name).read_text().splitlines() if line.startswith("--")]


def start(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v6e-8"}
    environment |= {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **variables}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", ["gpu.txt", "tpu.txt"])
def test_every_flag_is_explained(name) -> None:
    lines = (FOLDER / name).read_text().splitlines()
    assert flags(name)
    assert all(lines[at - 1].startswith("# ") for at, line in enumerate(lines) if line.startswith("--"))
    assert all(line == "" or line.startswith(("# ", "--xla_")) for line in lines)


@pytest.mark.parametrize(("extra", "known"), [([], True), (["--xla_gpu_no_such_flag=1"], False)])
def test_jaxlib_knows_the_gpu_flags(extra, known) -> None:
    done = start(CPU, XLA_FLAGS=" ".join([*flags("gpu.txt"), *extra]))
    assert (done.returncode == 0) == known, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu-aot]'")
@pytest.mark.parametrize(("extra", "known"), [([], True), (["--xla_tpu_no_such_flag=1"], False)])
def test_libtpu_knows_the_tpu_flags(extra, known) -> None:
    done = start(TPU, LIBTPU_INIT_ARGS=" ".join([*flags("tpu.txt"), *extra]))
    assert (done.returncode == 0) == known, done.stderr
