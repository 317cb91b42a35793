"""Folders of runs and of an evaluation, written by hand: no training, every number known."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fopd_jax.evaluation.records import Cell, Record, Settings, write_cell

INKS = {"red": "#d7263d", "blue": "#1b6ec2", "green": "#2a9d4a", "yellow": "#e9b44c", "purple": "#7b4ea3"}
SHAPES = ("circle", "square", "triangle")
SKILLS = ("geneval", "ocr", "pickscore")
ENDS = {
    "opd": {"geneval": 0.86, "ocr": 0.92, "pickscore": 0.71},
    "opd-direct": {"geneval": 0.83, "ocr": 0.93, "pickscore": 0.70},
    "grpo-mix": {"geneval": 0.78, "ocr": 0.84, "pickscore": 0.74},
    "sft": {"geneval": 0.70, "ocr": 0.78, "pickscore": 0.66},
}
BASE = {"geneval": 0.55, "ocr": 0.52, "pickscore": 0.62}
STAGES = {"opd": "opd", "opd-direct": "opd", "grpo-mix": "grpo", "sft": "flow_matching"}


def make_runs(folder: Path, steps: int = 400, names: Sequence[str] = tuple(ENDS)) -> list[Path]:
    """Workdirs; the last one still runs."""
    return [make_run(folder / name, name, steps, seed, name == list(ENDS)[-1]) for seed, name in enumerate(names)]


def make_run(path: Path, name: str, steps: int, seed: int, runs_on: bool = False) -> Path:
    path.mkdir(parents=True)
    draw, stage = np.random.default_rng(seed), STAGES[name]
    config = {
        "stage": stage, "name": name, "batch_size": 64 if stage == "opd" else 192, "run.steps": steps, "seed": seed,
        "optimizer.learning_rate": 1e-3 if stage == "opd" else 3e-4, "tasks": ["composition", "text"],
        "eval.num_steps": 40, "eval.guidance": 4.5, "eval.final_samples": 553,
        **({"objective.name": "direct" if "direct" in name else "clipped", "objective.mar_beta": 0.02} if stage == "opd" else {}),
    }  # fmt: skip
    write(path / "config.json", {key: value for key, value in config.items() if not key.startswith("run.")})
    write(path / "run.json", {"starts": [{
        "status": "running" if runs_on else "finished", "began": "2026-01-01 10:00:00 +0000", "config": config,
        "devices": {"TPU v6e": 8}, "commit": "0123456789abcdef", "at_step": None if runs_on else steps, "backend": "tpu",
        "command": ["python", "-m", "fopd_jax.main", f"--workdir=runs/{name}"],
    }]})  # fmt: skip
    rows, clocked, done = [], [], steps * 3 // 4 if runs_on else steps
    for step in range(1, done + 1):
        share, noise = 1 - math.exp(-4 * step / steps), draw.normal()
        row = {
            "step": step,
            "train/loss": 0.04 * (1.05 - share) * (1 + 0.08 * noise),
            "train/grad_norm": 0.1 * (1.1 - share) * (1 + 0.2 * abs(noise)),
        }
        if stage == "opd":
            row |= {"train/teacher_gap": 0.036 * (1.03 - share) * (1 + 0.05 * noise)}
            gaps = {
                (task, t): 0.01 * (1 + t) * (1.1 - share) * (1 + 0.3 * (task == "text"))
                for task in ("composition", "text")
                for t in range(6)
            }
            row |= {f"train/gap/{task}/t{t:02d}": gap * (1 + 0.1 * draw.normal()) for (task, t), gap in gaps.items()}
        else:
            row |= {"train/reward/text": 0.5 + 0.4 * share + 0.03 * noise}
        rows.append(row)
        if step % (steps // 10) == 0:
            dip = 0.12 * math.sin(math.pi * step / steps) if stage == "grpo" else 0.0
            scores = {
                skill: BASE[skill]
                + (ENDS[name][skill] - BASE[skill]) * share
                + 0.006 * draw.normal()
                - dip * (skill == "pickscore")
                for skill in SKILLS
            }
            rows.append({"step": step, **{f"eval/{skill}": value for skill, value in scores.items()}})
        clocked.append(
            {
                "step": step,
                "time/step_seconds": 2.3 + 0.2 * draw.random() + 2 * (stage == "grpo"),
                "time/samples_per_second": config["batch_size"] / (2.4 + 2 * (stage == "grpo")),
                "memory/peak_gib": 18.5 + seed,
            }
        )
    lines(path / "metrics.jsonl", rows)
    lines(path / "performance.jsonl", clocked)
    seconds = {
        "init": 40,
        "compile": 380,
        "step": 2.4 * done + 2 * done * (stage == "grpo"),
        "data": 12,
        "rewards": 300.0 * (stage == "grpo"),
        "eval": 420,
        "checkpoint": 60,
        "lost": 30 * seed,
    }
    write(path / "goodput.json", {"runs": 1 + seed, "seconds": seconds, "shares": {}, "saved": {}})
    if not runs_on:
        write(
            path / "results.json",
            {
                "models": {"base": BASE, "student": ENDS[name]},
                "samples": dict.fromkeys(SKILLS, 553),
                "failed": {},
                "steps": steps,
            },
        )
        (path / "table.txt").write_text(table_of(name), encoding="utf-8")
    return path


def table_of(name: str) -> str:
    """As `evaluation.report.format_table` writes it."""
    leads = "".join(
        f"  {BASE[skill]:.3f} ({ENDS[name][skill] - BASE[skill]:+.3f} ± 0.010)".rjust(26) for skill in SKILLS
    )
    means = "".join(f"  {ENDS[name][skill]:.3f}{'':17}".rjust(26) for skill in SKILLS)
    head = "".join(f"  {skill:>24}" for skill in SKILLS)
    return f"{'':7}{head}\nbase   {leads}\nstudent{means}\n(student minus model ± standard error of the paired differences; n = …)\n"


def make_evaluation(
    out: Path,
    models: Sequence[str] = ("base", "teacher-composition", "opd", "grpo-mix"),
    prompts: int = 200,
    side: int = 96,
    runs: Path | None = None,
) -> Path:
    """One suite of every model; `runs`: the folder whose runs made those of their names."""
    skill_of = {"base": 0.45, "teacher-composition": 0.9, "opd": 0.85, "grpo-mix": 0.72}
    for model in models:
        draw = np.random.default_rng(sum(map(ord, model)))
        folder = out / model / "geneval" / "steps_40"
        (folder / "images").mkdir(parents=True)
        records = []
        for number in range(prompts):
            what = np.random.default_rng(number)
            ink, other = what.choice(list(INKS), 2, replace=False)
            shape, second = what.choice(SHAPES, 2)
            right = draw.random() < skill_of.get(model, 0.6)
            picture(
                folder / "images" / f"{number:04d}.png",
                side,
                (ink, shape) if right else (other, shape),
                (other, second),
                number,
            )
            score = {
                "geneval": 1.0 if right else 0.5 * float(draw.random() < 0.4),
                "pickscore": round(20 + 3 * skill_of.get(model, 0.6) + draw.normal() * 0.8, 4),
            }
            failed = {"ocr": "server gone"} if number == 7 else {}
            score |= (
                {}
                if failed
                else {"ocr": round(float(np.clip(skill_of.get(model, 0.6) + 0.2 * draw.normal(), 0, 1)), 4)}
            )
            records.append(
                Record(
                    f"{number:05d}",
                    0,
                    f"a {ink} {shape} left of a {other} {second}",
                    f"images/{number:04d}.png",
                    score,
                    failed,
                    {"tag": ("position", "colors", "counting")[number % 3]},
                )
            )
        about = {"workdir": str(runs / model)} if runs is not None and (runs / model).is_dir() else {"from": model}
        write_cell(
            folder,
            Cell(
                model,
                "geneval",
                "steps 40, guidance 4.5",
                Settings("ode", 40, 4.5, 0.0, 512, 3.0, 1),
                tuple(records),
                about,
            ),
        )
    return out


def picture(path: Path, side: int, left: tuple[str, str], right: tuple[str, str], seed: int) -> None:
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(int(v) for v in draw.integers(205, 250, 3)))
    pen, size = ImageDraw.Draw(image), side * 0.34
    for (ink, shape), x in ((left, 0.1), (right, 0.56)):
        at, y = x * side, (0.3 + 0.15 * draw.random()) * side
        box = (at, y, at + size, y + size)
        if shape == "circle":
            pen.ellipse(box, fill=INKS[ink])
        elif shape == "square":
            pen.rectangle(box, fill=INKS[ink])
        else:
            pen.polygon([(at + size / 2, y), (at + size, y + size), (at, y + size)], fill=INKS[ink])
    image.save(path)


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
