"""Every config in small, through the whole program: what it leaves is there, in about a minute of two cores."""

import json
import resource
import time
from pathlib import Path

import pytest

from fopd_jax.config.parse import resolve
from fopd_jax.config.schema import OPD
from fopd_jax.running.checkpoints import newest_step
from tests.configs import EVERY, FOLDER, load, smoke_variant
from tests.main.experiment import Program, command, logged

ALWAYS = {
    "config.json", "goodput.json", "inputs.json", "metrics.jsonl", "parameters.txt", "performance.jsonl", "run.json",
    "timing.json",
    "README.md", "samples.png", "checkpoints", "tensorboard",
}  # fmt: skip


def _worked() -> float:
    """Seconds of a core that programs have taken so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_a_smoke_variant_runs_to_its_end(name: str, variant: str, program: Program, tmp_path: Path):
    variant = smoke_variant(variant)
    config, folder = resolve(load(name, variant)), tmp_path / "run"
    began, worked = time.monotonic(), _worked()
    done = program.call(command(folder, {}, f"{FOLDER}/{name}.py:{variant}"))
    print(f"{name}:{variant}: {time.monotonic() - began:.0f} s, {_worked() - worked:.0f} s of a core")
    assert done.returncode == 0, done.stderr
    if isinstance(config, OPD):
        expected = {"student.safetensors", "results.json", "table.txt", "health.png"}
        expected |= {"cold_start.json"} if config.cold_start.method != "none" else set()
    else:
        expected = {"base.safetensors" if config.trained == "params" else "adapter.safetensors"}
    assert {path.name for path in folder.iterdir()} == ALWAYS | expected
    losses = [line["train/loss"] for line in logged(folder) if "train/loss" in line]
    assert len(losses) == config.run.steps == newest_step(folder)
    scores = [line for line in logged(folder) if "train/loss" not in line]
    assert len(scores) == 1  # one evaluation
    if isinstance(config, OPD):
        results = json.loads((folder / "results.json").read_text())
        teachers = {f"teacher/{each}" for each in (*config.tasks, config.anchor.name)}
        merged = {"merge"} if config.cold_start.method == "merge" else set()
        assert results["models"].keys() == {"base", "student"} | merged | teachers
        assert {f"fixed/{task}/teacher" for task in config.tasks} <= results["gaps"].keys()
