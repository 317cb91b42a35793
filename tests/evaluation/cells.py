"""Cells of evaluations for tests of what reads them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fopd_jax.evaluation.records import Cell, Record, Settings, write_cell

SETTINGS = Settings("ode", 40, 4.5, 0.0, 512, 3.0, 1)


def cell_of(
    model: str,
    suite: str,
    scores: Mapping[str, np.ndarray],
    tags: Callable[[int], Mapping[str, Any]] = lambda prompt: {},
    setting: str = "steps 40",
    settings: Settings = SETTINGS,
) -> Cell:
    """Scores `[prompts, samples]` by name; NaN failed."""
    prompts, samples = next(iter(scores.values())).shape

    def record(prompt: int, sample: int) -> Record:
        found = {name: float(values[prompt, sample]) for name, values in scores.items()}
        known = {name: value for name, value in found.items() if not math.isnan(value)}
        failed = {name: "server gone" for name in found if name not in known}
        return Record(str(prompt), sample, f"prompt {prompt}", f"{prompt}_{sample}.png", known, failed, tags(prompt))

    records = [record(prompt, sample) for prompt in range(prompts) for sample in range(samples)]
    return Cell(model, suite, setting, settings, tuple(records))


def shuffled(cell: Cell, seed: int = 0) -> Cell:
    """The same with its records in another order."""
    order = np.random.default_rng(seed).permutation(len(cell.records))
    return dataclasses.replace(cell, records=tuple(cell.records[place] for place in order))


def keep(out: Path, cells: Sequence[Cell]) -> None:
    """Write an evaluation."""
    for cell in cells:
        folder = out / cell.model.replace("/", "_") / cell.suite / (cell.setting.replace(" ", "_") or "default")
        folder.mkdir(parents=True)
        write_cell(folder, cell)


def random(seed: int, prompts: int, samples: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, (prompts, samples))
