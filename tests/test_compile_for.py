"""A pod without a pod: the real update of a tiny network compiled for eight devices, and what is said of it."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import app

from fopd_jax import compile_for
from fopd_jax.config.flags import parse_flags
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import Config
from fopd_jax.models.mmdit import PRESETS
from fopd_jax.performance.gpu_target import compiler_installed
from fopd_jax.stages.abstract import world_shapes
from tests.configs import load
from tests.quick import environment

ROOT = Path(__file__).parents[1]
SMALL = ("--config.sampler.num_steps=3", "--per-chip-batch=2")


def _config() -> Config:
    return resolve(load())


def _program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on a tiny network (this file, run as a program), compiled fast rather than well."""
    command = [sys.executable, __file__, f"--config={ROOT}/configs/miniature.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=600)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What it prints and writes for `cpu:8`."""
    out = tmp_path_factory.mktemp("aot") / "figures.json"
    done = _program("--topology=cpu:8", *SMALL, "--teachers=4", f"--json={out}")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_gradients_are_reduced_once_an_update(outcome: tuple[str, dict[str, Any]]):
    """The one message is the adapter's gradient in float32, and per-sample metrics; it stands in no loop."""
    _, fields = outcome
    assert fields["loop_reductions"]["count"] == 0
    assert not [row for row in fields["collectives"] if row["loop_depth"]]
    (row,) = [row for row in fields["collectives"] if row["kind"] == "all-reduce"]
    network = _tiny()
    adapter = 4 * 32 * 2 * network.width * (8 * (network.depth - 1) + 7)  # the last block's text has no output
    assert row["axes"] == ["data"]
    assert adapter <= row["bytes"] < 1.05 * adapter


def test_figures_are_complete(outcome: tuple[str, dict[str, Any]]):
    _, fields = outcome
    assert (fields["chips"], fields["mesh"]) == (8, {"data": 8, "fsdp": 1, "tensor": 1})
    assert (fields["batch_size"], fields["per_chip_batch"], fields["teachers"]) == (16, 2, 4)
    memory = fields["memory"]
    parts = ("arguments_bytes", "outputs_bytes", "temporaries_bytes", "code_bytes")
    assert sum(memory[name] for name in parts) == memory["total_bytes"] > 0
    assert memory["capacity_bytes"] is None
    flops = fields["flops_per_chip"]
    assert flops["model"] == flops["teachers"] + flops["forward"] + flops["backward"]
    assert fields["compile_seconds"] > 0
    assert fields["versions"]["jax"]


def test_the_same_figures_are_printed(outcome: tuple[str, dict[str, Any]]):
    printed, fields = outcome
    for text in (
        "miniature on cpu:8: 8 chips, mesh data 8 x fsdp 1 x tensor 1",
        "batch 16, 2 a chip; trains adapter",
        "reductions over the batch's axes: none inside loops",
        f"{fields['flops_per_chip']['model']:.4g}",
    ):
        assert text in printed


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu-aot")
def test_the_tpus_compiler_agrees(outcome: tuple[str, dict[str, Any]], tmp_path: Path):
    """A pod's compiler: the same FLOPs, one reduction an update, and memory against a capacity."""
    done = _program("--topology=v6e:2x4", *SMALL, "--teachers=4", "--estimate", f"--json={tmp_path}/figures.json")
    assert done.returncode == 0, done.stderr
    fields = json.loads((tmp_path / "figures.json").read_text())
    assert fields["flops_per_chip"] == outcome[1]["flops_per_chip"]
    assert fields["loop_reductions"]["count"] == 0
    assert fields["memory"]["total_bytes"] < fields["memory"]["capacity_bytes"] == int(31.25 * 2**30)
    assert fields["roofline_seconds"]["update"] > 0
    estimate = fields["estimate"]
    assert estimate["model_flops"] == fields["flops_per_chip"]["model"]
    assert {"student forward", "backward", "teachers and anchor", "optimizer"} <= set(estimate["phases"])
    assert sum(estimate["kinds"].values()) == estimate["cycles"] > 0
    assert "ESTIMATE, not measured" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not compiler_installed(), reason="needs the extra gpu-aot")
def test_the_gpus_compiler_agrees(outcome: tuple[str, dict[str, Any]], tmp_path: Path):
    """The same FLOPs, one reduction an update; the kernels' own FLOPs are what arithmetic says, within what is small.

    All FLOPs: analytic ones leave out conditioning and elementwise work, kernels' count matrix products and attention
    alone, of padded rows too; for a network so tiny the two differ by less than a third.
    """
    done = _program(
        "--topology=h100:8", *SMALL, "--teachers=4", "--config.model.dtype=bfloat16", f"--json={tmp_path}/figures.json"
    )
    assert done.returncode == 0, done.stderr
    fields = json.loads((tmp_path / "figures.json").read_text())
    assert fields["flops_per_chip"] == outcome[1]["flops_per_chip"]
    assert fields["loop_reductions"]["count"] == 0
    assert fields["memory"]["total_bytes"] < fields["memory"]["capacity_bytes"] == 81559 * 2**20
    counted = sum(row["flops"] for row in fields["gpu"]["kernels"])
    assert counted == pytest.approx(fields["flops_per_chip"]["hardware"], rel=1 / 3)
    targets = {row["target"] for row in fields["gpu"]["custom_calls"]}
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= targets
    assert "no cycles, nothing autotuned" in done.stdout


def test_high_images_are_compiled_for_as_they_are():
    config = override(load("sd35m_opd"), {"resolution": (768, 512)})
    assert world_shapes(config.model)[0] == (96, 64, 16)
    for size, found in (((768, 520), "height 768, width 520"), (8192, "8192")):
        with pytest.raises(
            ValueError, match=rf"^model\.resolution: found {found}, expected a multiple of 16, at most 6144"
        ):
            world_shapes(override(config, {"resolution": size}).model)


# ---- bad input


def test_a_mistake_is_one_line(tmp_path: Path):
    done = _program("--topology=v9:4x4")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: topology: found 'v9:4x4', expected cpu:N or one of v5e, v5p, v6e, h100")


def test_simulated_devices_are_counted():
    with pytest.raises(ValueError, match="topology: found 'cpu:many', expected cpu:A"):
        compile_for.run(_config(), "cpu:many")


def test_only_a_tpus_compiler_estimates():
    with pytest.raises(ValueError, match=r"^estimate: found topology 'cpu:8', expected a TPU's"):
        compile_for.run(_config(), "cpu:8", estimated=True)


def test_teachers_are_asked_for_where_a_stage_has_some():
    with pytest.raises(ValueError, match=r"^teachers: found 4, but stage 'flow_matching' has none$"):
        compile_for.run(resolve(load("miniature_teacher", "text")), "cpu:8", teachers=4)


def test_simulated_devices_have_nothing_to_search():
    with pytest.raises(ValueError, match="search: cpu:8 has no memory limit to search for"):
        compile_for.run(_config(), "cpu:8", search=True)


def _tiny() -> Any:
    return dataclasses.replace(PRESETS["miniature"], depth=3, num_heads=2, head_dim=8, dual_layers=1)


if __name__ == "__main__":
    PRESETS["miniature"] = _tiny()
    app.run(compile_for.main, flags_parser=parse_flags)
