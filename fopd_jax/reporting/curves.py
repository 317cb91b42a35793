"""What runs measured over their steps: curves, gaps by timestep, and how steps become images and hours."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fopd_jax.evaluation.fixed_states import GROUPS
from fopd_jax.reporting.reading import Series, distinct
from fopd_jax.reporting.thinning import thin
from fopd_jax.reporting.workdirs import Run, hours_at
from fopd_jax.running.metrics import EVALUATION

_GAP = re.compile(r"train/gap/(?P<task>.+)/t(?P<step>\d+)")
_NO_SKILL = re.compile(r"(monitors|fixed|disagreement|teachers|rewards)/")
"""Of an evaluation what is no score of a skill."""
MOST_GAPS = 60
"""Steps at which gaps by timestep are kept."""


def curves(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By metric and run `x` (steps) and `y`; gaps by timestep are apart."""
    names = distinct(name for run in runs for name in run.scalars if not _GAP.fullmatch(name))
    return {name: {run.name: points(thin(run.scalars[name])) for run in runs if name in run.scalars} for name in names}


def skills(runs: Sequence[Run]) -> list[str]:
    """Scores of evaluations during training, without their prefix."""
    names = distinct(name for run in runs for name in run.scalars if name.startswith(EVALUATION))
    bare = (name.removeprefix(EVALUATION) for name in names)
    return [name for name in bare if not _NO_SKILL.match(name)]


def gaps(run: Run) -> dict[str, Any]:
    """By task the timesteps, the steps of training at which they were measured, and the values `[steps][timesteps]`."""
    found: dict[str, dict[int, Series]] = {}
    for name, series in run.scalars.items():
        if match := _GAP.fullmatch(name):
            found.setdefault(match["task"], {})[int(match["step"])] = series
    return {task: _gap_table(by_timestep) for task, by_timestep in found.items()}


def _gap_table(by_timestep: Mapping[int, Series]) -> dict[str, Any]:
    timesteps = sorted(by_timestep)
    every = np.unique(np.concatenate([by_timestep[t].steps for t in timesteps]))
    if len(every) > MOST_GAPS:
        every = every[np.unique(np.linspace(0, len(every) - 1, MOST_GAPS).round().astype(int))]
    columns = []
    for t in timesteps:
        known = dict(zip(*by_timestep[t], strict=True))
        columns.append([known.get(step, np.nan) for step in every])
    return {
        "timesteps": timesteps, "steps": [int(step) for step in every],
        "values": [[_plain(value) for value in row] for row in np.transpose(columns)],
    }  # fmt: skip


def fixed_gaps(run: Run) -> dict[str, Any]:
    """The newest gaps at fixed states by task, kind of state and noise level."""
    found: dict[str, dict[str, float | None]] = {}
    for name, series in run.scalars.items():
        parts = name.removeprefix(f"{EVALUATION}fixed/").rsplit("/", 2)
        if name.startswith(f"{EVALUATION}fixed/") and len(parts) == 3 and parts[2] in GROUPS:
            found.setdefault(f"{parts[0]}, {parts[1]}", {})[parts[2]] = _plain(series.values[-1])
    return found


def clock(run: Run) -> dict[str, Any]:
    """Hours at steps, thinned; empty where no time was taken."""
    hours = hours_at(run)
    return {} if hours is None else points(thin(hours))


def points(series: Series) -> dict[str, Any]:
    """In JSON types; what is no finite number is null."""
    return {"x": [int(step) for step in series.steps], "y": [_plain(value) for value in series.values]}


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
