"""Start-up: from the start of a process to the end of its first update, with an empty and with a warm cache.

    python benchmarks/startup.py --config=configs/miniature.py --json=benchmarks/results/startup_cpu.json
    python benchmarks/startup.py --config=configs/sd35m_opd.py --config.model.path=weights/sd35m

Two processes after each other keep their programs, as all do, in a folder that is empty at first. Each imports, finds
its devices, loads the base into its shards (`model.path`: a converted folder or a file of this project's own; random
weights where it is empty), makes the rest at random, traces and compiles the update, and runs it once. Printed are the
seconds of each part, and how many programs were compiled: none by the second process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from fopd_jax.config.flags import parse_flags, read_config
from fopd_jax.config.schema import OPD
from fopd_jax.files import write_json
from fopd_jax.interop.files.converted import load_params
from fopd_jax.interop.files.safetensors import load_tree
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.performance.compiling import cache_use
from fopd_jax.performance.host import commit, hardware, versions
from fopd_jax.performance.kept_programs import keeping
from fopd_jax.performance.problem import AbstractUpdate
from fopd_jax.performance.weights import random_arguments
from fopd_jax.stages.abstract import abstract_update
from fopd_jax.stages.pipeline import weight_path

ROOT = Path(__file__).parents[1]
RUNS = ("empty cache", "warm cache")
PARTS = (
    "imports", "devices", "shapes", "load base", "random rest", "trace", "compile", "first step", "total",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint")
Fields = dict[str, Any]


# ---- one process


def start(config: OPD, began: float) -> Fields:
    """Seconds of each part, the whole of them, and what was asked of the cache; `began`: when the process did."""
    clock = Clock(began)
    clock.lap("imports")  # and what starts Python itself
    with keeping(config.run.compiled), cache_use() as use:
        mesh = make_mesh(config.run.mesh)
        clock.lap("devices")
        update = abstract_update(config, mesh)
        clock.lap("shapes")
        params = jax.block_until_ready(load_base(config.model.path, update))
        clock.lap("load base")
        frozen, state, batch = jax.block_until_ready(random_arguments(update, params))
        clock.lap("random rest")
        lowered = update.step.lower(*update.arguments)
        clock.lap("trace")
        requests, hits = use.requests, use.hits
        step = lowered.compile()
        clock.lap("compile")
        update_use = {"requests": use.requests - requests, "compiled": use.requests - requests - use.hits + hits}
        jax.block_until_ready(step(frozen, state, batch))
        clock.lap("first step")
    programs = {"requests": use.requests, "compiled": use.compiled}
    return {"seconds": clock.laps | {"total": time.time() - began}, "update": update_use, "programs": programs}


class Clock:
    """Seconds between calls of `lap`, by name."""

    def __init__(self, began: float) -> None:
        self.laps: dict[str, float] = {}
        self._last = began

    def lap(self, name: str) -> None:
        now = time.time()
        self.laps[name], self._last = now - self._last, now


def load_base(source: str, update: AbstractUpdate) -> Any:
    """The base's parameters in their shards; None where there is no source.

    Raises:
      ValueError: it is missing or damaged; names the file.
    """
    if not source:
        return None
    path, shapes = weight_path(source), update.arguments[0].variables["params"]
    if path.is_dir():
        return load_params(path, "transformer", shapes)
    params = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), load_tree(path)[0]["params"], shapes)
    return jax.device_put(params, jax.tree.map(lambda shape: shape.sharding, shapes))


# ---- both


def measure(config_flags: list[str]) -> Fields:
    """Both processes, the cache between them."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: run(config_flags, Path(folder)) for name in RUNS}
    return {
        "hardware": hardware(),
        "versions": versions(PACKAGES),
        "flags": config_flags,
        "commit": commit(),
        "runs": runs,
    }


def run(config_flags: list[str], folder: Path) -> Fields:
    """One process on a folder of compiled programs."""
    out = folder / "out.json"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    command = [sys.executable, __file__, *config_flags, f"--json={out}", f"--began={time.time()}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed with status {done.returncode}:\n{done.stdout[-3000:]}")
    return json.loads(out.read_text())


def table(runs: dict[str, Fields]) -> str:
    lines = [f"{'seconds':20}" + "".join(f"{name:>14}" for name in runs)]
    lines += [f"{part:20}" + "".join(f"{each['seconds'][part]:>14.2f}" for each in runs.values()) for part in PARTS]
    compiled = "".join(f"{each['programs']['compiled']:>14}" for each in runs.values())
    return "\n".join([*lines, f"{'programs compiled':20}{compiled}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    args, config_flags = parser.parse_known_args()
    if args.began is not None:
        parse_flags([sys.argv[0], *config_flags])
        config = read_config()
        if not isinstance(config, OPD):
            sys.exit(f"error: stage: found {config.stage!r}, expected 'opd'")
        write_json(args.json, start(config, args.began))
        return
    found = measure(config_flags)
    print(table(found["runs"]))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
