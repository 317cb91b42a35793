"""Folders of runs and of an evaluation, written by hand: no training, every number known."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fopd_jax.evaluation.records import Cell, Record, Settings, write_cell
from fopd_jax.evaluation.report import format_table

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
RUNNING = "sft"
MODELS = {"base": 0.45, "teacher-composition": 0.9, "opd": 0.85, "grpo-mix": 0.72}
"""Of an evaluation, with how often each is right."""
TIMESTEPS = 6


# ---- runs


def make_runs(folder: Path, steps: int = 400) -> list[Path]:
    """Workdirs of all of `ENDS`; one of them still runs."""
    return [make_run(folder / name, name, steps) for name in ENDS]


def make_run(path: Path, name: str, steps: int = 40) -> Path:
    path.mkdir(parents=True)
    seed, runs_on, config = list(ENDS).index(name), name == RUNNING, config_of(name, steps)
    done = steps * 3 // 4 if runs_on else steps
    write(path / "config.json", {field: value for field, value in config.items() if not field.startswith("run.")})
    start = {"status": "running" if runs_on else "finished", "at_step": None if runs_on else steps, "config": config,
             "devices": {"TPU v6e": 8}, "commit": "0123456789abcdef", "backend": "tpu",
             "command": ["python", "-m", "fopd_jax.main", f"--workdir=runs/{name}"]}  # fmt: skip
    write(path / "run.json", {"starts": [start]})
    lines(path / "metrics.jsonl", metrics_of(name, steps, done))
    slow = STAGES[name] == "grpo"
    lines(path / "performance.jsonl", [
        {"step": step, "time/step_seconds": 4.5 if slow else 2.5, "time/samples_per_second": 42.7 if slow else 25.6,
         "memory/peak_gib": 18.5 + seed} for step in range(1, done + 1)
    ])  # fmt: skip
    seconds = {"init": 40, "compile": 380, "step": (4.5 if slow else 2.5) * done, "data": 12, "rewards": 300.0 * slow,
               "eval": 420, "checkpoint": 60, "lost": 30 * seed}  # fmt: skip
    write(path / "goodput.json", {"runs": 1 + seed, "seconds": seconds, "shares": {}, "saved": {}})
    if not runs_on:
        models = {"base": BASE, "student": ENDS[name]}
        write(path / "results.json", {"models": models, "samples": dict.fromkeys(SKILLS, 4), "failed": {}})
        (path / "table.txt").write_text(table_of(name) + "\n", encoding="utf-8")
    return path


def config_of(name: str, steps: int) -> dict[str, Any]:
    stage = STAGES[name]
    objective = {"objective.name": "direct" if "direct" in name else "clipped", "objective.mar_beta": 0.02}
    return {
        "stage": stage, "name": name, "batch_size": 64 if stage == "opd" else 192, "run.steps": steps, "seed": 0,
        "optimizer.learning_rate": 1e-3 if stage == "opd" else 3e-4, "tasks": ["composition", "text"],
        "eval.num_steps": 40, "eval.guidance": 4.5, "eval.final_samples": 4, **(objective if stage == "opd" else {}),
    }  # fmt: skip


def metrics_of(name: str, steps: int, done: int) -> Iterator[dict[str, float]]:
    """A line an update, and ten evaluations; of the mixed RL one skill falls before it rises."""
    draw, stage = np.random.default_rng(list(ENDS).index(name)), STAGES[name]
    for step in range(1, done + 1):
        share, noise = 1 - math.exp(-4 * step / steps), draw.normal()
        row = {"step": step, "train/loss": 0.04 * (1.05 - share) * (1 + 0.08 * noise)}
        row |= {"train/grad_norm": 0.1 * (1.1 - share) * (1 + 0.2 * abs(noise))}
        if stage == "opd":
            row |= {"train/teacher_gap": 0.036 * (1.03 - share) * (1 + 0.05 * noise)}
            row |= {f"train/gap/{task}/t{t:02d}": 0.01 * (1 + t) * (1.1 - share) * (1 + 0.1 * draw.normal())
                    for task in ("composition", "text") for t in range(TIMESTEPS)}  # fmt: skip
        else:
            row |= {"train/reward/text": 0.5 + 0.4 * share + 0.03 * noise}
        yield row
        if step % (steps // 10) == 0:
            ends = ENDS[name]
            scores = {s: BASE[s] + (ends[s] - BASE[s]) * share + 0.006 * draw.normal() for s in SKILLS}
            scores["pickscore"] -= 0.12 * math.sin(math.pi * step / steps) * (stage == "grpo")
            yield {"step": step, **{f"eval/{skill}": value for skill, value in scores.items()}}


def table_of(name: str) -> str:
    """Of four pairs, so that means and leads are as `ENDS` and `BASE` have them."""
    spread = np.asarray([-0.02, -0.01, 0.01, 0.02])
    models = {"base": BASE, "student": ENDS[name]}
    sign = {"base": -0.5, "student": 0.5}
    scores = {model: {s: mean + sign[model] * spread for s, mean in means.items()} for model, means in models.items()}
    return format_table(scores, "student")


# ---- an evaluation


def make_evaluation(out: Path, prompts: int = 200, runs: Path | None = None, side: int = 96) -> Path:
    """One suite of all of `MODELS`; `runs`: the folder whose runs made those of their names."""
    for model in MODELS:
        folder = out / model / "geneval" / "steps_40"
        (folder / "images").mkdir(parents=True)
        draw = np.random.default_rng(list(MODELS).index(model))
        records = tuple(make_record(folder, model, number, draw, side) for number in range(prompts))
        own = runs is not None and (runs / model).is_dir()
        about = {"workdir": str(runs / model)} if runs is not None and own else {"from": model}
        settings = Settings("ode", 40, 4.5, 0.0, 512, 3.0, 1)
        write_cell(folder, Cell(model, "geneval", "steps 40, guidance 4.5", settings, records, about))
    return out


def make_record(folder: Path, model: str, number: int, draw: np.random.Generator, side: int) -> Record:
    """The prompt is the number's, what is drawn and scored the model's."""
    what, skill = np.random.default_rng(number), MODELS[model]
    ink, other = what.choice(list(INKS), 2, replace=False)
    shape, second = what.choice(SHAPES, 2)
    right = draw.random() < skill
    image, wrong = f"images/{number:04d}.png", (other, shape)
    picture(folder / image, side, (ink, shape) if right else wrong, (other, second), number)
    scores = {"geneval": 1.0 if right else 0.5 * float(draw.random() < 0.4)}
    scores["pickscore"] = round(20 + 3 * skill + draw.normal() * 0.8, 4)
    ocr = round(float(np.clip(skill + 0.2 * draw.normal(), 0, 1)), 4)
    failed = {"ocr": "server gone"} if number == 7 else {}
    scores |= {} if failed else {"ocr": ocr}
    prompt, tags = (
        f"a {ink} {shape} left of a {other} {second}",
        {"tag": ("position", "colors", "counting")[number % 3]},
    )
    return Record(f"{number:05d}", 0, prompt, image, scores, failed, tags)


def picture(path: Path, side: int, left: tuple[str, str], right: tuple[str, str], seed: int, noise: float = 2) -> None:
    draw = np.random.default_rng(seed)
    ground = np.linspace(draw.integers(190, 250, 3), draw.integers(215, 255, 3), side)[:, None].repeat(side, 1)
    image = Image.fromarray((ground + draw.normal(0, noise, ground.shape)).clip(0, 255).astype(np.uint8))
    pen, size = ImageDraw.Draw(image), side * 0.34
    for (ink, shape), x in ((left, 0.1), (right, 0.56)):
        at, y = x * side, (0.3 + 0.15 * draw.random()) * side
        box = (at, y, at + size, y + size)
        if shape == "triangle":
            pen.polygon([(at + size / 2, y), (at + size, y + size), (at, y + size)], fill=INKS[ink])
        else:
            (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=INKS[ink])
    image.save(path, compress_level=1)


def write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def lines(path: Path, rows: Sequence[Mapping[str, Any]] | Iterator[Mapping[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
