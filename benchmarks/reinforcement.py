"""What the miniature's teachers cost by reinforcement learning, and what it does off their task: curves and a table.

    pip install -e '.[plots]'
    python benchmarks/reinforcement.py --work=FOLDER [--only text text-nft …]

Runs `configs/miniature_rl.py` in its variants, one after another (a variant whose results are in FOLDER is not run
again), evaluated every few steps. Writes `benchmarks/results/reinforcement_cpu.json` and, into docs/, pictures:
`rl_curves.png` (a teacher's own held-out score against images seen, by algorithm) and `rl_seesaw.png` (every skill of
GRPO-Mix, and of each single-reward teacher off its task). Seconds are of the run's own steps, compiling and evaluating
left out: the machine should have nothing else to do.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fopd_jax.config.learning import Reinforced
from fopd_jax.config.load import load_config
from fopd_jax.files import replacing, write_json
from fopd_jax.performance.host import commit, hardware, versions
from fopd_jax.studies.efficiency import reach

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "miniature_rl.py"
RESULTS = ROOT / "benchmarks" / "results" / "reinforcement_cpu.json"
DOCS = ROOT / "docs"
SKILLS = ("text", "composition", "composition_strict", "quality")
OWN = {"text": "text", "composition": "composition", "quality": "quality"}
VARIANTS = tuple(f"{name}{kind}" for name in (*OWN, "mix") for kind in ("", "-nft"))
EVERY = 5
"""Steps between two points of a curve."""
REACHED = {"text": 0.75, "composition": 0.70, "quality": 0.80}
"""Scores on the periodic pairs that both algorithms get to, to compare what each costs until then."""


def main() -> None:
    """Run what is missing, then tabulate and draw all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=VARIANTS, choices=VARIANTS)
    arguments = parser.parse_args()
    for name in arguments.only:
        train(name, arguments.work / name)
    there = [name for name in VARIANTS if (arguments.work / name / "results.json").exists()]
    found = {name: measure(name, arguments.work / name) for name in there}
    print(table(found))
    write_json(
        RESULTS,
        {
            "variants": found,
            "reached_at": REACHED,
            "commit": commit(),
            **hardware(),
            "versions": versions(("jax", "jaxlib", "flax", "optax", "numpy")),
        },
    )
    draw_curves(found, DOCS / "rl_curves.png")
    draw_skills(found, DOCS / "rl_seesaw.png")


def train(name: str, work: Path) -> None:
    """Run a variant, unless it has run."""
    if not (work / "results.json").exists():
        command = [sys.executable, "-m", "fopd_jax.main", f"--config={CONFIG}:{name}", f"--workdir={work}"]
        subprocess.run([*command, f"--config.run.eval_every={EVERY}"], check=True)


def measure(name: str, work: Path) -> dict[str, Any]:
    """A variant's curves, and the scores of base and policy on the report's pairs, which are others and more."""
    config = load_config(CONFIG, name)
    assert isinstance(config, Reinforced)
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    seconds = _seconds(work)
    points = [line for line in lines if "eval/quality" in line]
    report = json.loads((work / "results.json").read_text())["models"]
    curve = {
        "step": [line["step"] for line in points],
        "images": [line["step"] * config.batch_size for line in points],
        "seconds": [seconds * line["step"] for line in points],
        **{skill: [line[f"eval/{skill}"] for line in points] for skill in SKILLS},
    }
    return {
        "algorithm": config.stage,
        "steps": config.run.steps,
        "images": config.run.steps * config.batch_size,
        "seconds_a_step": seconds,
        "base": report["base"],
        "policy": report["policy"],
        "curve": curve,
        "reached": _reached(name, curve),
    }


def _seconds(work: Path) -> float:
    """The median step's."""
    lines = [json.loads(line) for line in (work / "performance.jsonl").read_text().splitlines()]
    return float(np.median([line["time/step_seconds"] for line in lines if "time/step_seconds" in line]))


def _reached(name: str, curve: dict[str, list[float]]) -> dict[str, float] | None:
    """Images and seconds until the curve first reaches its mark. The report's score of the base is no point of it,
    being of other pairs.
    """
    skill = OWN.get(name.removesuffix("-nft"))
    if skill is None:
        return None
    return reach({axis: curve[axis] for axis in ("images", "seconds")}, curve[skill], REACHED[skill])


def table(found: dict[str, dict[str, Any]]) -> str:
    """A line a variant: what it cost, and its scores beside the base's."""
    head = f"{'':<18}{'images':>8}{'s/step':>8}{'to mark':>9}" + "".join(f"{skill:>20}" for skill in SKILLS)
    base = next(iter(found.values()))["base"]
    lines = [head, f"{'base':<43}" + "".join(f"{base[skill]:>20.3f}" for skill in SKILLS)]
    for name, each in found.items():
        reached = f"{each['reached']['images']:.0f}" if each["reached"] else "-"
        cells = "".join(f"{each['policy'][skill]:>20.3f}" for skill in SKILLS)
        lines.append(f"{name:<18}{each['images']:>8}{each['seconds_a_step']:>8.2f}{reached:>9}{cells}")
    return "\n".join(lines)


def draw_curves(found: dict[str, dict[str, Any]], path: Path) -> None:
    """A panel a skill: its teacher's held-out score against images seen, an algorithm a line."""
    skills = [skill for skill in OWN if {skill, f"{skill}-nft"} & found.keys()]
    figure, panels = _figure(len(skills))
    for panel, skill in zip(panels, skills, strict=True):
        for name in (skill, f"{skill}-nft"):
            if name in found:
                _line(panel, found[name], skill, "DiffusionNFT" if name.endswith("-nft") else "Flow-GRPO")
        panel.axhline(REACHED[skill], color="grey", linewidth=0.8, linestyle=":")
        panel.set(title=f"teacher/{skill}", xlabel="images seen", ylabel="held-out score")
        panel.legend(frameon=False)
    _save(figure, path)


def draw_skills(found: dict[str, dict[str, Any]], path: Path) -> None:
    """A panel a policy: all skills against images seen."""
    figure, panels = _figure(len(found), columns=4)
    for panel, (name, each) in zip(panels, found.items(), strict=False):
        for skill in SKILLS:
            _line(panel, each, skill, skill)
        panel.set(title=name, xlabel="images seen", ylim=(0, 1))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(SKILLS), frameon=False)
    _save(figure, path, below=0.08)


def _line(panel: Any, each: dict[str, Any], skill: str, label: str) -> None:
    curve = each["curve"]
    panel.plot(curve["images"], curve[skill], label=label)
    panel.locator_params("x", nbins=5)


def _figure(count: int, columns: int = 3) -> tuple[Any, Sequence[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False)
    panels = list(axes.reshape(-1))
    for spare in panels[count:]:
        spare.set_axis_off()
    return figure, panels


def _save(figure: Any, path: Path, below: float = 0.0) -> None:
    """`below`: share of the height that is kept for a legend."""
    figure.tight_layout(rect=(0, below, 1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    main()
