"""The final report of a run: `results.json`, a table with paired standard errors, `samples.png`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from fopd_jax.config.schema import Evaluation
from fopd_jax.console import Progress, progress
from fopd_jax.evaluation.grid import draw_grid
from fopd_jax.evaluation.sampler import Sampler, check_finite
from fopd_jax.evaluation.score import EvalSet, Measured, check_failures, evaluate, noise_keys, reader
from fopd_jax.evaluation.settings import main_setting
from fopd_jax.files import write_json, write_png, write_text
from fopd_jax.parallel.distributed import is_main, warn
from fopd_jax.parallel.sharding import batch_ways
from fopd_jax.performance.host import versions
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.records import PACKAGES
from fopd_jax.worlds.world import World, select_tasks

Scores = Mapping[str, np.ndarray]
Samplers = Mapping[str, Sampler]
"""By the names of their settings, see `evaluation.settings`."""
Found = Mapping[str, Measured]
"""Of every model."""
GRID_COLUMNS = 12
SAMPLES_FILE, RESULTS_FILE, TABLE_FILE = "samples.png", "results.json", "table.txt"


@dataclasses.dataclass(frozen=True)
class Model:
    """A policy to report: its name, the network's variables and the effective adapter on them.

    `sampler`, `others`: of its own network or guidance scale, where that is another than the other models'; see
    `write_report`. `guidance`: that scale, where it is.
    """

    name: str
    variables: Tree
    adapter: Tree
    sampler: Sampler | None = None
    others: Samplers = dataclasses.field(default_factory=dict)
    guidance: float | None = None

    @property
    def policy(self) -> tuple[Tree, Tree]:
        """Variables and adapter."""
        return self.variables, self.adapter


def write_report(
    workdir: Path,
    settings: Evaluation,
    about: Mapping[str, Any],
    sampler: Sampler,
    world: World,
    models: Sequence[Model],
    max_failed: float,
    others: Samplers = MappingProxyType({}),
) -> None:
    """Evaluate every model on the same pairs and write the files; the last model is the student, and it is the only
    one with `eval.alone`.

    `about`: what else to write into `results.json`; `others`: samplers at other settings, at which all of it is done
    again: they are told of below the table and under `settings`. All processes evaluate, process 0 writes.
    `results.json` holds no times, so that it is the same however often the run was interrupted. Where no task has
    scores, there is neither it nor a table. Scores that failed are left out of means, counted and told.

    Raises:
      FloatingPointError: more than the share `max_failed` of a skill's scores failed; names model and skill, and
        nothing is written.
      ValueError: an image is not finite; names its prompt, and the model of a sample.
    """
    models = models[-1:] if settings.alone else models
    tasks = select_tasks(world, settings.tasks or tuple(world.tasks))
    ways = batch_ways(sampler.mesh)
    eval_set = EvalSet(
        tasks, settings.final_samples, settings.batch_size, settings.seed + 1, ways, max_failed,
        read=reader(settings, world),
    )  # fmt: skip
    about = {**about, "prompts": "rewritten"} if settings.rewritten else about
    total = len(models) * len(eval_set.scored()) * eval_set.samples * (1 + len(others))
    found: dict[str, dict[str, Measured]] = {}
    with progress("report", total, "images") as count:
        for setting, each in {main_setting(settings): sampler, **others}.items():
            where = f" at {setting}" if setting in others else ""
            found[setting] = {
                model.name: _measure(_own(model, setting, each), world, eval_set, model, where, count)
                for model in models
            }
    if is_main() and total:
        _write_scores(workdir, about, found, models[-1].name, _scales(models, settings))
    draw_samples(workdir / SAMPLES_FILE, sampler, world, eval_set, models, others)


def _scales(models: Sequence[Model], settings: Evaluation) -> dict[str, float]:
    """The guidance of every model at the main setting, where they are not all under one."""
    apart = any(model.guidance is not None for model in models)
    own = {model.name: settings.guidance if model.guidance is None else model.guidance for model in models}
    return own if apart else {}


def _own(model: Model, setting: str, usual: Sampler) -> Sampler:
    """What draws a model at a setting: its own network's sampler, where it has one."""
    return usual if model.sampler is None else model.others.get(setting, model.sampler)


def _title(model: Model) -> str:
    return model.name if model.guidance is None else f"{model.name}, guidance {model.guidance:g}"


def _measure(sampler: Sampler, world: World, eval_set: EvalSet, model: Model, where: str, count: Progress) -> Measured:
    """Scores of one model at one setting; failures are told, and refused where there are too many."""
    found = evaluate(sampler, world, eval_set, model.variables, model.adapter, count)
    for line in found.told():
        warn(f"scores of {model.name}{where}: {line}")
    check_failures(found, eval_set.max_failed, f" of {model.name}{where}")
    return found


def _write_scores(
    workdir: Path, about: Mapping[str, Any], found: Mapping[str, Found], student: str, scales: Mapping[str, float]
) -> None:
    """`found`: by setting, the main one first; `scales`: see `_scales`."""
    usual, *others = found
    scores = {setting: {name: each.values for name, each in models.items()} for setting, models in found.items()}
    told = _summary(found[usual])
    write_json(
        workdir / RESULTS_FILE,
        {
            "models": told["models"],
            "samples": {skill: len(values) for skill, values in scores[usual][student].items()},
            "failed": told["failed"],
            **({"settings": {name: _summary(found[name]) for name in others}} if others else {}),
            **({"guidance": dict(scales)} if scales else {}),
            **about,
            "versions": versions(PACKAGES),
        },
    )
    tables = [format_table(scores[usual], student), *(format_settings(scores, student) if others else [])]
    if scales:
        tables[0] += f"\nguidance: {', '.join(f'{name} {scale:g}' for name, scale in scales.items())}"
    write_text(workdir / TABLE_FILE, "\n\n".join(tables) + "\n")


def _summary(found: Found) -> dict[str, Any]:
    means = {name: {skill: round(mean, 6) for skill, mean in each.means().items()} for name, each in found.items()}
    return {"models": means, "failed": {name: failed for name, each in found.items() if (failed := each.failed())}}


def format_table(scores: Mapping[str, Scores], student: str) -> str:
    """Mean score by model and skill; in brackets the student's lead over that model ± its paired standard error.

    Of pairs that have a score; where some have none (NaN), the mean has a mark.
    """
    lines, marked = _rows(scores, student)
    lines.append(f"(student minus model ± standard error of the paired differences; n = {_counts(scores[student])})")
    if marked:
        lines.append(f"* of the pairs whose scores did not fail; failed: {_failures(scores)}")
    return "\n".join(lines)


def format_settings(scores: Mapping[str, Mapping[str, Scores]], student: str) -> list[str]:
    """Of each skill a table whose columns are the settings, by setting and model; leads are over the same setting's."""
    _, usual = next(iter(scores.items()))
    tables = []
    for skill in usual[student]:
        columns = {name: {setting: models[name][skill] for setting, models in scores.items()} for name in usual}
        lines, marked = _rows(columns, student, skill)
        tables.append("\n".join([*lines, *(["* of the pairs whose scores did not fail"] if marked else [])]))
    return tables


def _rows(scores: Mapping[str, Scores], student: str, corner: str = "") -> tuple[list[str], bool]:
    """Heads and a line a model; and whether some cells have a mark."""
    columns = list(scores[student])
    marked = any(np.isnan(values).any() for each in scores.values() for values in each.values())
    width, wide = max(map(len, [*scores, corner])), max([24, *map(len, columns)])
    lines = [f"{corner:<{width}}" + "".join(f"  {column:>{wide}}" for column in columns)]
    for name, each in scores.items():
        leads = [None if name == student else scores[student][column] for column in columns]
        cells = [_cell(each[column], lead, marked) for column, lead in zip(columns, leads, strict=True)]
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>{wide}}" for cell in cells))
    return lines, marked


def _cell(values: np.ndarray, student: np.ndarray | None, marked: bool) -> str:
    """`marked`: whether some cells of the table are, so that all have room for it."""
    mark = ("*" if np.isnan(values).any() else " ") if marked else ""
    mean = f"{np.nanmean(values):.3f}{mark}"
    if student is None:
        return f"{mean}{'':17}"
    difference = student - values
    difference = difference[~np.isnan(difference)]
    if len(difference) == 0:
        return f"{mean} (no pair has both)"
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return f"{mean} ({difference.mean():+.3f} ± {error:.3f})"


def _failures(scores: Mapping[str, Scores]) -> str:
    counts = {f"{name} {skill}": int(np.isnan(v).sum()) for name, each in scores.items() for skill, v in each.items()}
    return ", ".join(f"{what} {count}" for what, count in counts.items() if count)


def _counts(scores: Scores) -> str:
    return ", ".join(f"{skill} {len(values)}" for skill, values in scores.items())


def draw_samples(
    path: Path,
    sampler: Sampler,
    world: World,
    eval_set: EvalSet,
    models: Sequence[Model],
    others: Samplers = MappingProxyType({}),
) -> None:
    """Write the grid that `sample_grid` draws; all processes draw it, process 0 writes."""
    picture = sample_grid(sampler, world, eval_set, models, others)
    if is_main():
        write_png(path, picture)


def sample_grid(
    sampler: Sampler,
    world: World,
    eval_set: EvalSet,
    models: Sequence[Model],
    others: Samplers = MappingProxyType({}),
) -> Image.Image:
    """Rows are models, columns the same pairs, spread evenly over each task's first batch so that all kinds show.

    Below them stands the last model at the `others`' settings.

    Raises:
      ValueError: an image is not finite; names its model and prompt.
    """
    count = min(GRID_COLUMNS // len(eval_set.tasks), eval_set.batch_size)
    columns = np.arange(count) * eval_set.batch_size // count
    first = {task.name: next(eval_set.pairs(task)) for task in eval_set.tasks.values()}
    batches = {name: (list(map(eval_set.read, prompts)), index) for name, (prompts, index) in first.items()}
    labels = [prompts[column] for prompts, _ in batches.values() for column in columns]

    def row(label: str, model: Model, drawn_by: Sampler) -> np.ndarray:
        images = [
            drawn_by(world, model.variables, model.adapter, prompts, noise_keys(eval_set.seed, name, index))[columns]
            for name, (prompts, index) in batches.items()
        ]
        whole = np.concatenate(images)
        check_finite(whole, [f"{label}, prompt {prompt!r}" for prompt in labels])
        return whole

    rows = {_title(model): (model, model.sampler or sampler) for model in models}
    rows |= {
        f"{models[-1].name}, {setting}": (models[-1], _own(models[-1], setting, other))
        for setting, other in others.items()
    }
    return draw_grid(np.stack([row(label, *each) for label, each in rows.items()]), list(rows), labels)
