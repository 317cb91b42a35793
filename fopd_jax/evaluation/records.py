"""What an evaluation keeps: a folder of each model, suite and sampler setting, with images, settings, a line an image.

    OUT/MODEL/SUITE/SETTING/settings.json       `Settings`, and where the model came from (`about`)
    OUT/MODEL/SUITE/SETTING/records.jsonl       one `Record` an image, in the suite's order
    OUT/MODEL/SUITE/SETTING/…                   the images, in the layout that the suite's own scorer reads

Such a folder is a `Cell` of tables: comparisons, reports and galleries read nothing else.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fopd_jax.files import write_json, write_text

SETTINGS_FILE, RECORDS_FILE = "settings.json", "records.jsonl"
DIVERSITY = "diversity"
"""A score of every image that has others of its prompt: its mean distance to them, as `rewards.monitors` has it. The
mean over a prompt's images is the mean over its pairs.
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images were made, as far as it moves scores. `sampler`: 'ode', 'sde', 'cps', 'dpm2'; pictures made elsewhere
    say what is known: 'given', and 0 for what is not.
    """

    sampler: str
    steps: int
    guidance: float
    noise_level: float
    resolution: int
    shift: float
    seed: int
    rewritten: bool = False


@dataclasses.dataclass(frozen=True)
class Record:
    """One image: sample `sample` of prompt `prompt_id`. `image`: its file below the cell's folder. `scores` hold what
    could be scored, `failed` why others could not; a name is in one of them. `tags`: what groups prompts (`tag`, …).
    """

    prompt_id: str
    sample: int
    prompt: str
    image: str
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tags: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model on one suite at one setting."""

    model: str
    suite: str
    setting: str
    settings: Settings
    records: Sequence[Record]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_cell(folder: Path, cell: Cell) -> None:
    """Settings last: a folder that has them is whole."""
    lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in cell.records)
    write_text(folder / RECORDS_FILE, "".join(f"{line}\n" for line in lines))
    parts = {"model": cell.model, "suite": cell.suite, "setting": cell.setting, "about": dict(cell.about)}
    write_json(folder / SETTINGS_FILE, {**parts, "settings": dataclasses.asdict(cell.settings)})


def read_cell(folder: Path) -> Cell:
    """
    Raises:
      ValueError: a file is damaged, or no evaluation's; names it and the line.
    """
    file = folder / SETTINGS_FILE
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        settings = Settings(**kept.pop("settings"))
        file = folder / RECORDS_FILE
        lines = file.read_text(encoding="utf-8").splitlines()
        records = tuple(Record(**json.loads(line)) for line in lines)
        return Cell(settings=settings, records=records, **kept)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: damaged, or not of an evaluation: {error}") from error


def read_cells(out: Path) -> list[Cell]:
    """All of an evaluation that are whole, by model, suite and setting."""
    return [read_cell(file.parent) for file in sorted(out.glob(f"*/*/*/{SETTINGS_FILE}"))]
