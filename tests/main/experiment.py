"""A tiny experiment on random weights: its settings, and the program that runs it in processes of its own."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.adapters.lora import init_adapter
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.files.safetensors import load_tree, save_adapter
from fopd_jax.interop.sd3.network import TARGETS
from tests.configs import FOLDER, load, options, prepare

Overrides = dict[str, Any]
RANK, STEPS = 4, 4
TIMEOUT = 600.0  # seconds; compiling on a busy machine takes minutes
TINY: Overrides = {
    "seed": 3, "run.steps": STEPS, "run.log_every": 1, "run.checkpoint_every": 1, "run.eval_every": 2,
    "run.keep_checkpoints": 2, "model.preset": "miniature", "model.dtype": "float32", "batch_size": 4,
    "images_per_prompt": 1, "sampler.num_steps": 3, "adapter.rank": RANK, "adapter.alpha": 2.0 * RANK,
    "adapter.targets": ("attn",), "optimizer.learning_rate": 1e-2, "optimizer.warmup": 2, "eval.final_samples": 6,
    "eval.samples": 4, "eval.batch_size": 4, "eval.num_steps": 2, "eval.guidance": 1.0, "guidance": 1.0,
}  # fmt: skip
OUTPUTS = {
    "README.md", "cold_start.json", "config.json", "goodput.json", "health.png", "inputs.json", "metrics.jsonl",
    "parameters.txt", "performance.jsonl", "results.json", "run.json", "samples.png", "student.safetensors",
    "table.txt", "timing.json",
}  # fmt: skip
CLOCKED = {"goodput.json", "performance.jsonl", "run.json", "timing.json"}


def noisy(seed: int, tree: Any, std: float) -> Any:
    """Every leaf plus noise: a fresh network's gates are zero, and no adapter would have any effect."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    changed = [np.asarray(leaf) + std * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, changed)


def experts() -> list[str]:
    """Teachers of the config, then its anchor."""
    config = load()
    return [*config.tasks, config.anchor.name]


def tiny_overrides(weights: Path) -> Overrides:
    """The tiny experiment's settings, on files of the folder."""
    *teachers, anchor = experts()
    adapters = {f"tasks.{name}.teacher": f"{weights}/{name}.safetensors" for name in teachers}
    files = {"model.path": f"{weights}/base.safetensors", "anchor.adapter": f"{weights}/{anchor}.safetensors"}
    return TINY | adapters | files


def other_adapter(path: Path, weights: Path, lora: LoRAConfig, preset: str = "miniature") -> str:
    """A fresh adapter of the random base, written to `path`."""
    variables, _ = load_tree(weights / "base.safetensors")
    save_adapter(path, init_adapter(jax.random.key(0), variables["params"], lora, TARGETS), {"preset": preset})
    return str(path)


# ---- running it


def command(workdir: Path, overrides: Overrides, path: Path | str = FOLDER / "miniature.py") -> list[str]:
    """The program's command line."""
    return [sys.executable, "-m", "fopd_jax.main", f"--config={path}", f"--workdir={workdir}", *options(overrides)]


class Program:
    """Runs the program in `folder` with one set of overrides; keywords are settings of the section `run`."""

    def __init__(self, folder: Path, environment: dict[str, str], overrides: Overrides) -> None:
        self.folder, self.environment, self.overrides = folder, environment, overrides

    def run(self, name: str, **settings: Any) -> Path:
        """To the end; returns the workdir."""
        return self.finish(name, self.command(name, settings))

    def finish(self, name: str, line: list[str]) -> Path:
        """The same of a whole command line."""
        done = self.call(line)
        assert done.returncode == 0, done.stderr
        (self.folder / f"{name}.out").write_text(done.stdout)
        (self.folder / f"{name}.err").write_text(done.stderr)
        return self.folder / name

    def command(self, name: str, settings: Overrides) -> list[str]:
        changes = {f"run.{field}": value for field, value in settings.items()}
        return command(self.folder / name, self.overrides | changes)

    def call(self, line: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            line, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )

    def start(self, name: str, *flags: str, **settings: Any) -> subprocess.Popen[str]:
        line = [*self.command(name, settings), *flags]
        with (self.folder / f"{name}.err").open("a") as errors:
            return subprocess.Popen(
                line, cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL, stderr=errors, text=True
            )

    def kill(self, name: str, when: Callable[[Path], bool], **settings: Any) -> bool:
        """Start it, kill it outright as soon as `when(workdir)` holds; False if it ended before that."""
        with self.start(name, **settings) as process:
            alive = wait_for([process], lambda: when(self.folder / name))
            process.kill()
        return alive

    def kill_one_of_two(self, name: str, when: Callable[[Path], bool], victim: int, **settings: Any) -> bool:
        """The same for two processes, of which one dies; the other is given up, as a job manager would."""
        processes = self.start_two(name, **settings)
        alive = wait_for(processes, lambda: when(self.folder / name))
        processes[victim].kill()
        time.sleep(1)
        for process in processes:
            process.kill()
            process.wait()
        return alive

    def start_two(self, name: str, **settings: Any) -> list[subprocess.Popen[str]]:
        with socket.create_server(("localhost", 0)) as free:
            flags = [f"--coordinator=localhost:{free.getsockname()[1]}", "--num-processes=2"]
        return [self.start(name, *flags, f"--process-id={process}", **settings) for process in range(2)]


def wait_for(processes: list[subprocess.Popen[str]], condition: Callable[[], bool]) -> bool:
    """Until the condition holds; False if a process ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        if any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.002)
    return True


def logged(workdir: Path, file: str = "metrics.jsonl") -> list[dict[str, float]]:
    """Whole lines of the metrics."""
    path = workdir / file
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def assert_same_outcome(found: Path, expected: Path, apart: frozenset[str] = frozenset()) -> None:
    """Timing apart, everything that a run leaves is the same, byte by byte."""
    for name in OUTPUTS - CLOCKED - apart:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


# ---- bad input


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(config: Any, folder: Path, *fragments: str) -> None:
    """One line with every fragment, and a folder that is as it was."""
    before, there = snapshot(folder), folder.exists()
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as error:
        prepare(config, folder)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert "\n" not in str(error.value)
    assert folder.exists() == there
    assert snapshot(folder) == before


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    """All that a program said that refused its input: one line."""
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr
