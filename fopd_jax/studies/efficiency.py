"""What a score costs: periodic evaluations of a table's rows against the images and FLOPs of their training."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fopd_jax.config.stages import StageConfig
from fopd_jax.files import replacing
from fopd_jax.running.metrics import SCALARS
from fopd_jax.stages.costs import step_cost
from fopd_jax.studies.tables import SKILLS

AXES = {"images": "images seen", "tflop": "TFLOP of training; dashed: after its teachers' own"}
MARKS = {"text": 0.75, "composition": 0.7, "quality": 0.9}
"""Scores that curves are asked for when they reach them."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A row's scores by skill at its periodic evaluations, and what had been spent until then; `before` is what its
    teachers have cost (images, TFLOP), which counts once however many students they teach.
    """

    images: Sequence[float]
    tflop: Sequence[float]
    scores: Mapping[str, Sequence[float]]
    before: tuple[float, float] = (0.0, 0.0)

    def reaches(self, skill: str, mark: float) -> dict[str, float] | None:
        """Images and TFLOP until it first scores `mark`; see `reach`."""
        return reach({axis: getattr(self, axis) for axis in AXES}, self.scores[skill], mark)


def reach(spent: Mapping[str, Sequence[float]], scores: Sequence[float], mark: float) -> dict[str, float] | None:
    """What had been spent, by its name, when the scores of successive evaluations first came to `mark`: on the straight
    line between two of them; at the first one, if they do so there; None where they never do.
    """
    k = next((k for k, score in enumerate(scores) if score >= mark), None)
    if k is None:
        return None
    if k == 0:
        return {name: float(each[0]) for name, each in spent.items()}
    share = (mark - scores[k - 1]) / (scores[k] - scores[k - 1])
    return {name: float(each[k - 1] + share * (each[k] - each[k - 1])) for name, each in spent.items()}


def spent(config: StageConfig, steps: Sequence[int]) -> tuple[list[float], list[float]]:
    """Images, and TFLOP by arithmetic, after each of so many steps."""
    step = step_cost(config).model / 1e12
    return [float(each * config.batch_size) for each in steps], [each * step for each in steps]


def read_curve(folder: Path, config: StageConfig, teachers: Sequence[StageConfig]) -> Curve:
    """Of a run that has ended.

    Raises:
      ValueError: its metrics are damaged or hold no evaluation; names the file.
    """
    file = folder / SCALARS
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        points = [line for line in lines if f"eval/{SKILLS[0]}" in line]
        scores = {skill: [float(line[f"eval/{skill}"]) for line in points] for skill in SKILLS}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: damaged, or not of this study: {error}") from error
    if not points:
        raise ValueError(f"{file}: found no evaluation, expected one every `run.eval_every` steps")
    images, tflop = spent(config, [line["step"] for line in points])
    taught = [spent(each, [each.run.steps]) for each in teachers]
    return Curve(images, tflop, scores, (sum(each for (each,), _ in taught), sum(each for _, (each,) in taught)))


def as_markdown(curves: Mapping[str, Curve]) -> str:
    """What each row has spent when it reaches `MARKS`, its teachers' share apart."""
    head = ["", *(f"{skill} {mark:g}" for skill, mark in MARKS.items()), "its teachers"]
    lines = ["Images and TFLOP until a score, in the periodic evaluations:", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, curve in curves.items():
        cells = [_spell(curve.reaches(skill, mark)) for skill, mark in MARKS.items()]
        teachers = _spell(dict(zip(AXES, curve.before, strict=True))) if any(curve.before) else "none"
        lines.append(f"| {' | '.join([name, *cells, teachers])} |")
    return "\n".join(lines)


def _spell(found: Mapping[str, float] | None) -> str:
    return "not reached" if found is None else f"{found['images']:,.0f} images, {found['tflop']:.2f} TFLOP"


def as_fields(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """For JSON."""
    return {
        name: {**dataclasses.asdict(curve), "reaches": {skill: curve.reaches(skill, at) for skill, at in MARKS.items()}}
        for name, curve in curves.items()
    }


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """A column a skill; above against images, below against FLOPs, there also with the teachers' own (dashed).

    Raises:
      ImportError: matplotlib is missing (extra `plots`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(AXES), len(MARKS), figsize=(4 * len(MARKS), 6.4), squeeze=False, sharey="col")
    for (row, axis), (column, skill) in itertools.product(enumerate(AXES), enumerate(MARKS)):
        panel = panels[row][column]
        for name, curve in curves.items():
            (line,) = panel.plot(getattr(curve, axis), curve.scores[skill], label=name)
            if axis == "tflop" and any(curve.before):
                later = [each + curve.before[1] for each in curve.tflop]
                panel.plot(later, curve.scores[skill], linestyle="--", color=line.get_color())
        panel.axhline(MARKS[skill], color="grey", linewidth=0.8, linestyle=":")
        panel.set(xlabel=AXES[axis], title=skill if row == 0 else "")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
