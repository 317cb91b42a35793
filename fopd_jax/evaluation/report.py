"""The final report of a run: `results.json`, a table with paired standard errors, `samples.png`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fopd_jax.config.schema import Evaluation
from fopd_jax.console import progress
from fopd_jax.evaluation.grid import draw_grid
from fopd_jax.evaluation.sampler import Sampler, check_finite
from fopd_jax.evaluation.score import EvalSet, Measured, check_failures, evaluate, noise_keys, reader
from fopd_jax.files import write_json, write_png, write_text
from fopd_jax.parallel.distributed import is_main, warn
from fopd_jax.parallel.sharding import batch_ways
from fopd_jax.performance.host import versions
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.records import PACKAGES
from fopd_jax.worlds.world import World, select_tasks

Scores = Mapping[str, np.ndarray]
GRID_COLUMNS = 12
SAMPLES_FILE, RESULTS_FILE, TABLE_FILE = "samples.png", "results.json", "table.txt"


@dataclasses.dataclass(frozen=True)
class Model:
    """A policy to report: its name, the network's variables and the effective adapter on them."""

    name: str
    variables: Tree
    adapter: Tree

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
) -> None:
    """Evaluate every model on the same pairs and write the files; the last model is the student.

    `about`: what else to write into `results.json`. All processes evaluate, process 0 writes.
    `results.json` holds no times, so that it is the same however often the run was interrupted. Where no task has
    scores, there is neither it nor a table. Scores that failed are left out of means, counted and told.

    Raises:
      FloatingPointError: more than the share `max_failed` of a skill's scores failed; names model and skill, and
        nothing is written.
      ValueError: an image is not finite; names its prompt, and the model of a sample.
    """
    tasks = select_tasks(world, settings.tasks or tuple(world.tasks))
    ways = batch_ways(sampler.mesh)
    eval_set = EvalSet(
        tasks, settings.final_samples, settings.batch_size, settings.seed + 1, ways, max_failed,
        read=reader(settings, world),
    )  # fmt: skip
    about = {**about, "prompts": "rewritten"} if settings.rewritten else about
    found: dict[str, Measured] = {}
    total = len(models) * len(eval_set.scored()) * eval_set.samples
    with progress("report", total, "images") as count:
        for model in models:
            found[model.name] = each = evaluate(sampler, world, eval_set, model.variables, model.adapter, count)
            for line in each.told():
                warn(f"scores of {model.name}: {line}")
            check_failures(each, max_failed, f" of {model.name}")
    if is_main() and total:
        _write_scores(workdir, about, found, models[-1].name)
    draw_samples(workdir / SAMPLES_FILE, sampler, world, eval_set, models)


def _write_scores(workdir: Path, about: Mapping[str, Any], found: Mapping[str, Measured], student: str) -> None:
    scores = {name: each.values for name, each in found.items()}
    write_json(
        workdir / RESULTS_FILE,
        {
            "models": {
                name: {skill: round(value, 6) for skill, value in each.means().items()} for name, each in found.items()
            },
            "samples": {skill: len(values) for skill, values in scores[student].items()},
            "failed": {name: failed for name, each in found.items() if (failed := each.failed())},
            **about,
            "versions": versions(PACKAGES),
        },
    )
    write_text(workdir / TABLE_FILE, format_table(scores, student) + "\n")


def format_table(scores: Mapping[str, Scores], student: str) -> str:
    """Mean score by model and skill; in brackets the student's lead over that model ± its paired standard error.

    Of pairs that have a score; where some have none (NaN), the mean has a mark.
    """
    skills = list(scores[student])
    marked = any(np.isnan(values).any() for each in scores.values() for values in each.values())
    width = max(map(len, scores))
    lines = [" " * width + "".join(f"  {skill:>24}" for skill in skills)]
    for name, each in scores.items():
        cells = "".join(
            f"  {_cell(each[skill], None if name == student else scores[student][skill], marked):>24}"
            for skill in skills
        )
        lines.append(f"{name:<{width}}{cells}")
    lines.append(f"(student minus model ± standard error of the paired differences; n = {_counts(scores[student])})")
    if marked:
        lines.append(f"* of the pairs whose scores did not fail; failed: {_failures(scores)}")
    return "\n".join(lines)


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


def draw_samples(path: Path, sampler: Sampler, world: World, eval_set: EvalSet, models: Sequence[Model]) -> None:
    """Write the grid that `sample_grid` draws; all processes draw it, process 0 writes."""
    picture = sample_grid(sampler, world, eval_set, models)
    if is_main():
        write_png(path, picture)


def sample_grid(sampler: Sampler, world: World, eval_set: EvalSet, models: Sequence[Model]) -> Image.Image:
    """Rows are models, columns the same pairs, spread evenly over each task's first batch so that all kinds show.

    Raises:
      ValueError: an image is not finite; names its model and prompt.
    """
    count = min(GRID_COLUMNS // len(eval_set.tasks), eval_set.batch_size)
    columns = np.arange(count) * eval_set.batch_size // count
    first = {task.name: next(eval_set.pairs(task)) for task in eval_set.tasks.values()}
    batches = {name: (list(map(eval_set.read, prompts)), index) for name, (prompts, index) in first.items()}
    labels = [prompts[column] for prompts, _ in batches.values() for column in columns]

    def row(model: Model) -> np.ndarray:
        images = [
            sampler(world, model.variables, model.adapter, prompts, noise_keys(eval_set.seed, name, index))[columns]
            for name, (prompts, index) in batches.items()
        ]
        whole = np.concatenate(images)
        check_finite(whole, [f"{model.name}, prompt {prompt!r}" for prompt in labels])
        return whole

    return draw_grid(np.stack([row(model) for model in models]), [model.name for model in models], labels)
