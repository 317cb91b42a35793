"""The numbers of an evaluation with their intervals, and what can be said of models' differences."""

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fopd_jax.evaluation.columns import AVERAGE, AVERAGED, average_of, columns_of
from fopd_jax.evaluation.comparison import Column, check_choices, check_comparable, paired, sums_of
from fopd_jax.evaluation.records import Cell
from fopd_jax.evaluation.statistics import CONFIDENCE, EXACT, RESAMPLES, SEED, Interval, holm, interval, p_value

METHOD = {
    "confidence": CONFIDENCE,
    "resamples": RESAMPLES,
    "seed": SEED,
    "intervals": "percentile bootstrap over prompts, all images of a prompt together; prompts are drawn within their "
    "tag where a number is a mean over tags, within their suite where it is one over suites",
    "differences": "paired: of images, prompt and sample alike, that both models have a score of",
    "p": f"two-sided randomisation test by the signs of prompts' differences: all patterns up to {EXACT} prompts that "
    f"differ, else (1 + k) / (1 + {RESAMPLES}) of random ones",
    "p_holm": "Holm's correction over all differences of a suite at one setting",
}
"""How the numbers were made, for `results.json`."""
_HEADS = ("model", "suite", "setting", "column", "value", "low", "high", "n", "failed")
_DIGITS = 6
Place = tuple[str, str, str]
"""Model, suite, setting."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A number of a model; `n` images have it, `failed` ones have not. `table`: which of its suite's it stands in.

    `ranked`: whether larger is better.
    """

    model: str
    suite: str
    setting: str
    column: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    failed: int
    table: str = ""
    ranked: bool = True


@dataclasses.dataclass(frozen=True)
class Difference:
    """`against` minus `model`, over `n` pairs of images; `left_out` more failed in either. See `METHOD`."""

    model: str
    against: str
    suite: str
    setting: str
    column: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    left_out: int
    p: float | None
    p_holm: float | None = None
    table: str = ""


@dataclasses.dataclass(frozen=True)
class Results:
    """`cells`, `values` and `differences` in the order of tables' rows, `against` last. `notes` are for people.

    `allowed`: in what models may be unequal.
    """

    against: str
    allowed: tuple[str, ...]
    cells: tuple[Cell, ...]
    values: tuple[Value, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def results_of(cells: Sequence[Cell], against: str = "", allow_unequal: Sequence[str] = ()) -> Results:
    """All numbers of cells, and the lead of one model, by default the last one's, over every other.

    `allow_unequal`: names of `comparison.CHOICES` in which models may be unequal.

    Raises:
      ValueError: there is no such model or no such name, or cells of a suite and setting are not comparable.
    """
    check_choices(allow_unequal)
    models = list(dict.fromkeys(cell.model for cell in cells))
    against = against or models[-1]
    if against not in models:
        raise ValueError(f"against: found {against!r}, expected one of {', '.join(models)}")
    models = [*(model for model in models if model != against), against]
    by_place = {(cell.model, cell.suite, cell.setting): cell for cell in cells}
    if len(by_place) < len(cells):
        twice = next(place for place in by_place if sum(place == (c.model, c.suite, c.setting) for c in cells) > 1)
        raise ValueError(f"{', '.join(part for part in twice if part)}: found twice, expected one cell")
    check_all(list(by_place.values()), against, allow_unequal)
    places = sorted(by_place, key=lambda place: models.index(place[0]))
    columns = {place: columns_of(by_place[place]) for place in places}
    columns |= _averages([by_place[place] for place in places])
    values = [_value(*place, each) for place, found in columns.items() for each in found if each.parts]
    compared = [
        difference
        for suite, setting in dict.fromkeys(place[1:] for place in columns)
        for difference in _family(columns, models, suite, setting)
    ]
    notes = [_note(place, each) for place, found in columns.items() for each in found if each.note]
    ordered = tuple(by_place[place] for place in places)
    return Results(against, tuple(allow_unequal), ordered, tuple(values), tuple(compared), tuple(dict.fromkeys(notes)))


def check_all(cells: Sequence[Cell], against: str, allow_unequal: Sequence[str]) -> None:
    """Raises ValueError where models of a suite and setting are not comparable, see `comparison.check_comparable`."""
    for suite, setting in dict.fromkeys((cell.suite, cell.setting) for cell in cells):
        alike = [cell for cell in cells if (cell.suite, cell.setting) == (suite, setting)]
        reference = next((cell for cell in alike if cell.model == against), alike[-1])
        for cell in alike:
            check_comparable(cell, reference, allow_unequal)


def _averages(cells: Sequence[Cell]) -> dict[Place, list[Column]]:
    """The paper's average of every model at every setting, where there are two of its suites at least."""
    found = {}
    for model, setting in dict.fromkeys((cell.model, cell.setting) for cell in cells):
        own = [cell for cell in cells if (cell.model, cell.setting) == (model, setting) and cell.suite in AVERAGED]
        if len(own) > 1:
            found[model, AVERAGE, setting] = [average_of(own)]
    return found


def _value(model: str, suite: str, setting: str, column: Column) -> Value:
    measured = _measure(column)
    return Value(
        model, suite, setting, column.name, *measured, column.count, column.failed, column.table, column.ranked
    )


def _family(
    columns: Mapping[Place, Sequence[Column]], models: Sequence[str], suite: str, setting: str
) -> list[Difference]:
    """The leads of the last model on a suite at a setting, their p-values corrected for their number."""
    *others, against = models
    own = {column.name: column for column in columns.get((against, suite, setting), ())}
    found = [
        _difference((other, against, suite, setting), own[column.name], column)
        for other in others
        for column in columns.get((other, suite, setting), ())
        if column.name in own
    ]
    known = [place for place, each in enumerate(found) if each.p is not None]
    corrected = dict(zip(known, holm([p for each in found if (p := each.p) is not None]), strict=True))
    return [
        dataclasses.replace(each, p_holm=_rounded(corrected[place])) if place in corrected else each
        for place, each in enumerate(found)
    ]


def _difference(about: tuple[str, str, str, str], one: Column, other: Column) -> Difference:
    pairs = paired(one, other) or dataclasses.replace(one, parts={})
    sums = sums_of(pairs)
    p = p_value(sums) if sums else math.nan
    return Difference(*about, one.name, *_measure(pairs), pairs.count, pairs.failed, _rounded(p), table=one.table)


def _measure(column: Column) -> tuple[float | None, float | None, float | None]:
    sums = sums_of(column)
    value, low, high = interval(sums) if sums else Interval(math.nan, None, None)
    return _rounded(value), _rounded(low), _rounded(high)


def _rounded(number: float | None) -> float | None:
    """So far that all machines agree; None for what is not known."""
    return None if number is None or math.isnan(number) else round(number, _DIGITS) + 0.0  # no -0


def _note(place: Place, column: Column) -> str:
    return f"{', '.join(part for part in place if part)}: {column.note}"


# ---- failures


def failures(cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Every score that failed: of which image, and why."""
    for cell in cells:
        for record in sorted(cell.records, key=lambda record: (record.prompt_id, record.sample)):
            for score, reason in sorted(record.failed.items()):
                yield {
                    "model": cell.model, "suite": cell.suite, "setting": cell.setting, "score": score,
                    "prompt_id": record.prompt_id, "sample": record.sample, "reason": reason,
                }  # fmt: skip


# ---- files


def as_json(results: Results) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "against": results.against,
        "allow_unequal": list(results.allowed),
        "method": METHOD,
        "cells": [
            {
                "model": cell.model, "suite": cell.suite, "setting": cell.setting, "about": dict(cell.about),
                "settings": dataclasses.asdict(cell.settings), "images": len(cell.records),
                "prompts": len({record.prompt_id for record in cell.records}),
            }
            for cell in results.cells
        ],
        "values": [dataclasses.asdict(value) for value in results.values],
        "differences": [dataclasses.asdict(difference) for difference in results.differences],
        "failed": list(failures(results.cells)),
        "notes": list(results.notes),
    }  # fmt: skip


def as_csv(values: Sequence[Value]) -> str:
    """A line each; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADS)
    writer.writerows([getattr(value, head) for head in _HEADS] for value in values)
    return text.getvalue()
