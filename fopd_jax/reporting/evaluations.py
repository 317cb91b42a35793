"""Cells of evaluations as a report takes them: damaged lines are left out and told; without settings none is whole.

`evaluation.records.read_cell` refuses what is damaged, since tables that people publish rest on it; a page that is
looked at while files are written shows the rest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fopd_jax.evaluation.records import RECORDS_FILE, SETTINGS_FILE, Cell, Record, Settings
from fopd_jax.reading import real_path
from fopd_jax.reporting.reading import Problems, as_number, as_object, distinct, numbers_of, read_lines, read_object

Key = tuple[str, int]
"""Prompt and sample: the same of every model, so that their images are pairs."""


class Kept(NamedTuple):
    """A cell and the folder that its images are in."""

    cell: Cell
    folder: Path

    @property
    def by_key(self) -> dict[Key, Record]:
        return {(record.prompt_id, record.sample): record for record in self.cell.records}

    def image(self, record: Record) -> Path | None:
        """Its file; None where that is none, or lies outside of the cell's folder."""
        path = real_path(self.folder / record.image)
        inside = path.is_relative_to(real_path(self.folder))
        return path if record.image and inside and path.is_file() else None


def is_evaluation(out: Path) -> bool:
    """Whether any cell is there."""
    return next(out.glob(f"*/*/*/{SETTINGS_FILE}"), None) is not None


def read_evaluation(out: Path) -> tuple[list[Kept], Problems]:
    """Its whole cells, by model, suite and setting."""
    kept: list[Kept] = []
    problems: Problems = []
    for file in sorted(out.glob(f"*/*/*/{SETTINGS_FILE}")):
        cell, said = _read_cell(file.parent)
        kept += [Kept(cell, file.parent)] if cell is not None else []
        problems += said
    return kept, problems


def skills_of(cells: Sequence[Kept]) -> list[str]:
    """Names of their scores, failed ones too."""
    return distinct(name for each in cells for record in each.cell.records for name in (*record.scores, *record.failed))


def _read_cell(folder: Path) -> tuple[Cell | None, Problems]:
    about, problems = read_object(folder / SETTINGS_FILE)
    if problems:
        return None, problems
    try:
        settings = Settings(**_known(Settings, as_object(about.get("settings"))))
        model, suite, setting = (about[name] for name in ("model", "suite", "setting"))
        if not all(isinstance(name, str) and name for name in (model, suite, setting)):
            raise ValueError("model, suite and setting are texts")
    except (TypeError, KeyError, ValueError) as error:
        return None, [f"{folder / SETTINGS_FILE}: damaged, or not of an evaluation ({error})"]
    lines, problems = read_lines(folder / RECORDS_FILE)
    records = [_record(line) for line in lines]
    whole = [record for record in records if record is not None]
    if wrong := len(records) - len(whole):
        first = records.index(None) + 1
        problems.append(f"{folder / RECORDS_FILE}: {wrong} of {len(records)} lines are no records, the first: {first}")
    return Cell(model, suite, setting, settings, tuple(whole), as_object(about.get("about"))), problems


def _record(line: Mapping[str, Any]) -> Record | None:
    """None where the fields that a report rests on are not there or of another type."""
    types = {"prompt_id": str, "sample": int, "prompt": str, "image": str}
    if any(type(line.get(name)) is not kind for name, kind in types.items()) or not 0 <= line["sample"] < 10_000:
        return None
    failed = {name: str(why) for name, why in as_object(line.get("failed")).items()}
    lost = {n: "is no number" for n, value in as_object(line.get("scores")).items() if as_number(value) is None}
    known = _known(Record, line)
    known.update(scores=numbers_of(line.get("scores")), failed=lost | failed, tags=as_object(line.get("tags")))
    return Record(**known)


def _known(kind: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those that this version knows: later ones may write more."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in fields.items() if name in names}
