"""What the cheaper forms of the update cost in quality: the miniature's main job under each, one after another.

    python benchmarks/savings.py --work=FOLDER [--steps 60] [--only NAME …]

Each variant is `fopd_jax.main` with some fields changed, from the same start, for the same number of updates. Prints,
and writes to `benchmarks/results/savings_cpu.json`, for each: model FLOPs and seconds a sample relative to the plain
update (seconds of the run's own steps, compiling left out: the machine should have nothing else to do), and the
student's scores.
A variant whose results are in FOLDER is not run again.
"""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from fopd_jax.config.parse import override, resolve
from fopd_jax.files import write_json
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.performance.host import commit, hardware, versions
from fopd_jax.stages.abstract import abstract_model, world_shapes
from fopd_jax.stages.opd_update import make_spec, update_cost

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "savings_cpu.json"
CONFIG = ROOT / "configs" / "miniature.py"
GUIDED = {f"{field}.guidance": 1.5 for field in ("tasks.text", "tasks.composition", "anchor", "eval")}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "anchor asked of one sample in three": {"anchor.every": 3, "batch_size": 63},
    "last three of five timesteps": {"sampler.trained": (2, 5)},
    "one timestep a rollout": {"one_timestep": True, "objective.name": "direct"},
    "guided": GUIDED | {"guidance": 1.5},
    "guided teachers, student without guidance": GUIDED | {"guidance": 1.0, "eval.guidance": 1.0},
    "sixteen images a prompt": {"images_per_prompt": 16},
}


def run(name: str, work: Path, steps: int) -> dict[str, Any]:
    """Train one variant, unless it is there; its scores and seconds."""
    folder = work / name.replace(" ", "_").replace(",", "")
    if not (folder / "results.json").exists():
        fields = VARIANTS[name] | {"run.steps": steps, "run.eval_every": 0, "eval.final_samples": 512}
        flags = [f"--config.{field}={value}" for field, value in fields.items()]
        command = [sys.executable, "-m", "fopd_jax.main", f"--config={CONFIG}", f"--workdir={folder}", *flags]
        subprocess.run(command, cwd=ROOT, check=True)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    goodput = json.loads((folder / "goodput.json").read_text(encoding="utf-8"))
    samples = steps * VARIANTS[name].get("batch_size", 64)
    return {
        "scores": results["models"]["student"],
        "flops": flops_a_sample(name),
        "seconds": goodput["seconds"]["step"] / samples,
    }


def flops_a_sample(name: str) -> float:
    """Model FLOPs of an update, divided by its samples."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config = resolve(override(config, VARIANTS[name]))
    latent_shape, encoded = world_shapes(config.model)
    model = abstract_model(config, make_mesh(config.run.mesh))
    update = update_cost(config, make_spec(config, latent_shape), encoded.context.shape[0], model)
    return update.model / config.batch_size


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown; what a variant costs is relative to the first."""
    skills = list(next(iter(found.values()))["scores"])
    plain = next(iter(found.values()))
    lines = [f"| update | FLOPs a sample | time a sample | {' | '.join(skills)} |", "|---" * (3 + len(skills)) + "|"]
    for name, each in found.items():
        scores = " | ".join(f"{each['scores'][skill]:.3f}" for skill in skills)
        costs = (f"{each[cost] / plain[cost]:.2f}" for cost in ("flops", "seconds"))
        lines.append(f"| {name} | {' | '.join(costs)} | {scores} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="*", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    args = parser.parse_args()
    found = {name: run(name, args.work, args.steps) for name in args.only}
    print(table(found))
    circumstances = {"hardware": hardware(), "versions": versions(("jax", "jaxlib")), "commit": commit()}
    write_json(RESULTS, circumstances | {"steps": args.steps, "variants": found})


if __name__ == "__main__":
    main()
