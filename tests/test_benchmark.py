"""The command line, and a second start on a warm cache; both in processes of their own, on a tiny network."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.quick import environment

ROOT = Path(__file__).parents[1]
PROGRAM = """
import runpy, sys
from fopd_jax.models.mmdit import PRESETS, MMDiTConfig
PRESETS["miniature"] = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=0, qk_norm=True, patch_size=4, channels=3,
    context_dim=32, pooled_dim=24, table_size=6, base_size=6,
)
from fopd_jax.performance import timing
timing.MATMUL_SIDE["cpu"] = 64
name = sys.argv.pop(1)
run = runpy.run_path if name.endswith(".py") else runpy.run_module
run(name, run_name="__main__")
"""
REFUSED = """
from absl import flags
from absl.testing import flagsaver
from fopd_jax import benchmark
from fopd_jax.config.learning import GRPO
from fopd_jax.config.schema import OPD
flags.FLAGS(["benchmark"], known_only=True)
CASES = [
    ({"estimate": True}, OPD()),
    ({"topology": "v6e:2x2"}, OPD()),
    ({"forward": "base"}, OPD()),
    ({"estimate": True, "topology": "v6e:2x2", "sweep": True}, OPD()),
    ({"estimate": True, "topology": "cpu:2"}, OPD()),
    ({"estimate": True, "topology": "v6e:2x2"}, GRPO()),
]
for given, config in CASES:
    with flagsaver.flagsaver(**given):
        try:
            benchmark.asked_to_estimate()
            benchmark.run_estimate(config, None)
        except ValueError as error:
            print(error)
"""
FIELDS = ("--config=configs/miniature.py", "--config.sampler.num_steps=3", "--config.adapter.rank=2")


def run(*arguments: str, **others: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, env=environment(**others),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_one_command_measures_prints_and_writes(tmp_path: Path):
    out = tmp_path / "out.json"
    done = run(
        "fopd_jax.benchmark", *FIELDS, "--batch=4", "--teachers=3", "--steps=2", "--warmup=1", f"--json={out}",
        f"--profile={tmp_path / 'trace'}", FOPD_JAX_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    update = found["update"]
    assert (update["batch_size"], update["teachers"], update["trained_timesteps"]) == (4, 3, 2)
    assert update["step"]["count"] == 2
    assert found["matmul"]["side"] == 64
    assert found["versions"]["jax"]
    assert found["device"]["platform"] == "cpu"
    assert f"--json={out}" in found["flags"]
    assert found["environment"] == {"XLA_FLAGS": environment()["XLA_FLAGS"]}
    assert "samples/s/chip" in done.stdout
    traces = list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert list((tmp_path / "cache" / "compiled").glob("*-cache"))


def test_bad_input_is_one_line(tmp_path: Path):
    done = run("fopd_jax.benchmark", "--config=configs/miniature.py", f"--json={tmp_path / 'none' / 'out.json'}")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f"error: json: {tmp_path / 'none'} is no folder"


def test_what_cannot_be_estimated_is_said_in_one_line():
    """In a process of its own, as flags are; each answer comes before anything is compiled."""
    done = subprocess.run([sys.executable, "-c", REFUSED], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = (
        "estimate: found no --topology, expected one",
        "topology: found 'v6e:2x2' without --estimate",
        "forward: found 'base' without --estimate",
        "estimate: found it with sweep, which times",
        "estimate: found topology 'cpu:2', expected a TPU's",
        "estimate: found stage 'grpo', expected 'opd'",
    )
    lines = done.stdout.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == list(expected)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu-aot")
def test_one_command_estimates(tmp_path: Path):
    out = tmp_path / "out.json"
    asked = ("--estimate", "--topology=v6e:2x2", "--forward=routed", "--teachers=3", "--batch=4", f"--json={out}")
    done = run("fopd_jax.benchmark", *FIELDS, *asked, PYTHONPATH=os.pathsep.join(each for each in sys.path if each))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert (found["program"], found["batch_size"], found["teachers"]) == ("forward, routed", 4, 3)
    estimate = found["estimate"]
    assert estimate["phases"]["student forward"]["share"] > 0.9
    assert 0 < estimate["mfu"] < estimate["bounds"]["width"]
    assert "ESTIMATE, not measured" in done.stdout


@pytest.mark.slow
def test_a_second_start_on_a_warm_cache_compiles_nothing(tmp_path: Path):
    def start() -> dict[str, Any]:
        out = tmp_path / "out.json"
        done = run(
            "benchmarks/startup.py", *FIELDS, "--config.batch_size=4", "--config.model.path=", f"--json={out}",
            f"--began={time.time()}", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    first, second = start(), start()
    assert first["update"] == {"requests": 1, "compiled": 1}
    assert second["update"] == {"requests": 1, "compiled": 0}
    assert second["programs"] == {"requests": first["programs"]["requests"], "compiled": 0}
    assert second["seconds"]["total"] > sum(second["seconds"][part] for part in ("imports", "compile", "first step"))
