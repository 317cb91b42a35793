"""The command line, and a second start on a warm cache; both in processes of their own, on a tiny network."""

import json
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
