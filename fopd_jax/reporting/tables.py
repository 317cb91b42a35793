"""Tables of a page: scores by model, with intervals, what is best, and what cannot be told apart from it.

Columns and intervals are those of `evaluation.columns` and `evaluation.statistics`: a page says what tables say.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fopd_jax.evaluation.columns import AVERAGE, AVERAGED, average_of, columns_of
from fopd_jax.evaluation.comparison import Column, differences, paired, sums_of
from fopd_jax.evaluation.records import Cell
from fopd_jax.evaluation.statistics import Interval, interval
from fopd_jax.reporting.reading import Problems, distinct

MOST_COMPARED = 12
"""Models of which each is compared with each."""
BEST, LEVEL = "best", "level"
"""Marks of a column's largest mean, and of those that are not told apart from it."""
Columns = Mapping[str, Mapping[str, Column]]
"""By model and name."""


def evaluation_tables(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], Problems]:
    """Those of each suite at each setting, the paper's average first where there is one; what has no columns is told.

    Rows are models; `pairs`: differences by column and two models.
    """
    tables: list[dict[str, Any]] = []
    problems: Problems = []
    for suite, setting in distinct((cell.suite, cell.setting) for cell in cells):
        own = [cell for cell in cells if (cell.suite, cell.setting) == (suite, setting)]
        columns: dict[str, dict[str, Column]] = {}
        for cell in own:
            try:
                columns[cell.model] = {column.name: column for column in columns_of(cell)}
            except ValueError as error:
                problems.append(str(error))
        whole = [cell for cell in own if cell.model in columns]
        parts = distinct(column.table for by_name in columns.values() for column in by_name.values())
        tables += [_table(whole, columns, part) for part in parts]
    return [*_averages(cells), *tables], problems


def _averages(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The paper's average at every setting where some model has all of its suites."""
    tables = []
    for setting in distinct(cell.setting for cell in cells):
        own = [cell for cell in cells if cell.setting == setting and cell.suite in AVERAGED]
        columns: dict[str, dict[str, Column]] = {}
        for model in distinct(cell.model for cell in own):
            try:
                average = average_of([cell for cell in own if cell.model == model])
            except ValueError:
                continue  # told where the suite's own table is made
            if average.parts:
                columns[model] = {average.name: average}
        first = [next(cell for cell in own if cell.model == model) for model in columns]
        tables += [_table([dataclasses.replace(cell, suite=AVERAGE) for cell in first], columns, "")] if first else []
    return tables


def _table(cells: Sequence[Cell], columns: Columns, part: str) -> dict[str, Any]:
    """`part`: which of a suite's tables."""
    own = {model: {n: c for n, c in by_name.items() if c.table == part} for model, by_name in columns.items()}
    known = {name: column for by_name in own.values() for name, column in by_name.items()}
    rows = [
        {
            "label": cell.model,
            "entity": cell.model,
            "about": {name: str(value) for name, value in cell.about.items() if isinstance(value, str | int | float)},
            "settings": dataclasses.asdict(cell.settings),
            "cells": {name: _cell(column) for name, column in own[cell.model].items()},
        }
        for cell in cells
    ]
    pairs = {name: compared({model: each[name] for model, each in own.items() if name in each}) for name in known}
    for name, column in known.items():
        if column.ranked:
            mark(rows, name, pairs[name])
    notes = distinct(column.note for column in known.values() if column.note)
    return {
        "suite": cells[0].suite, "setting": ", ".join(filter(None, (cells[0].setting, part))), "skills": list(known),
        "rows": rows, "pairs": pairs, "prompts": len({record.prompt_id for cell in cells for record in cell.records}),
        "warnings": unequal(cells), "notes": notes,
    }  # fmt: skip


def _cell(column: Column) -> dict[str, Any]:
    """Mean, interval and numbers of images; of what failed also the first reason."""
    reasons = [why for part in column.parts.values() for why in part.failed.values()]
    told = {"failed": column.failed, "why": reasons[0][:200]} if reasons else {}
    found = _measured(column)
    if found is None:
        return told
    return {"mean": found.value, "low": found.low, "high": found.high, "images": column.count, **told}


def _measured(column: Column | None) -> Interval | None:
    sums = sums_of(column) if column is not None and column.parts else None
    found = interval(sums) if sums is not None else None
    return None if found is None or math.isnan(found.value) else found  # a part may have no value


def compared(columns: Mapping[str, Column]) -> dict[str, dict[str, Interval]]:
    """Mean of one model's values minus another's over the images that both have, each way; the first dozen models."""
    found: dict[str, dict[str, Interval]] = {}
    for one, other in itertools.combinations(list(columns)[:MOST_COMPARED], 2):
        lead = _measured(paired(columns[one], columns[other]))
        if lead is not None:
            found.setdefault(one, {})[other] = lead
            found.setdefault(other, {})[one] = _reversed(lead)
    return found


def _reversed(lead: Interval) -> Interval:
    """Of the other over the one."""
    low, high = (None if bound is None else -bound for bound in (lead.high, lead.low))
    return Interval(-lead.value, low, high)


def mark(rows: Sequence[dict[str, Any]], skill: str, pairs: Mapping[str, Mapping[str, Interval]]) -> None:
    """Write marks into a column's cells; larger is better. Level is what the best one's lead over may well be none."""
    means = {row["label"]: row["cells"][skill].get("mean") for row in rows if skill in row["cells"]}
    known = [mean for mean in means.values() if mean is not None]
    if len(known) < 2:
        return
    best = [label for label, mean in means.items() if mean == max(known)]
    for row in (row for row in rows if skill in row["cells"]):
        lead = pairs.get(best[0], {}).get(row["label"])
        if row["label"] in best:
            row["cells"][skill]["mark"] = BEST
        elif lead is not None and lead.low is not None and lead.low <= 0:
            row["cells"][skill]["mark"] = LEVEL


def unequal(cells: Sequence[Cell]) -> list[str]:
    """In what a table's models are unequal to the first one, which makes their comparison unfair."""
    first, *others = cells
    return [
        f"{name} of {first.model} and {cell.model}: {said}"
        for cell in others
        for name, said in differences(first, cell).items()
    ]
