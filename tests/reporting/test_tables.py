"""Tables of evaluations: columns and intervals as tables have them, marks, pairs, and what is unfair."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fopd_jax.evaluation.columns import columns_of
from fopd_jax.evaluation.comparison import sums_of
from fopd_jax.evaluation.records import Cell, read_cells
from fopd_jax.evaluation.statistics import Interval, interval
from fopd_jax.reporting.tables import evaluation_tables, mark, unequal
from tests.reporting import made


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    return read_cells(made.make_evaluation(tmp_path / "eval", prompts=60, side=8))


def test_an_evaluation_has_means_intervals_pairs_and_failures(cells: list[Cell]):
    (table,), problems = evaluation_tables(cells)
    assert problems == []
    assert table["skills"] == ["geneval", "ocr", "pickscore"]
    rows = {row["label"]: row for row in table["rows"]}
    for cell in cells:
        shown = rows[cell.model]["cells"]["ocr"]
        scores = [record.scores["ocr"] for record in cell.records if "ocr" in record.scores]
        assert shown["mean"] == pytest.approx(np.mean(scores))
        assert (shown["images"], shown["failed"], shown["why"]) == (59, 1, "server gone")
        sums = sums_of(next(column for column in columns_of(cell) if column.name == "ocr"))
        assert sums is not None
        assert (shown["mean"], shown["low"], shown["high"]) == interval(sums)
    best = max(rows, key=lambda label: rows[label]["cells"]["geneval"]["mean"])
    assert [label for label in rows if rows[label]["cells"]["geneval"].get("mark") == "best"] == [best]
    assert "mark" not in rows["base"]["cells"]["geneval"]
    pair, other = table["pairs"]["geneval"]["opd"]["base"], table["pairs"]["geneval"]["base"]["opd"]
    means = [rows[label]["cells"]["geneval"]["mean"] for label in ("opd", "base")]
    assert pair.value == pytest.approx(means[0] - means[1])
    assert other == (-pair.value, -pair.high, -pair.low)
    assert table["warnings"] == []


def test_published_columns_and_the_average_are_those_of_tables(cells: list[Cell]):
    """GenEval's tag means, its tags in a table of their own, and the paper's average of four suites."""
    own = cells[0]

    def suite(name: str, scores: dict[str, float]) -> Cell:
        records = [dataclasses.replace(record, scores=scores, failed={}) for record in own.records]
        return dataclasses.replace(own, suite=name, records=records)

    four = [
        suite("geneval", {"geneval": 0.5, "geneval/official": 1.0}), suite("ocr", {"ocr": 0.5}),
        suite("deqa", {"deqa": 4.0}), suite("pickscore", {"pickscore": 19.5}),
    ]  # fmt: skip
    tables, problems = evaluation_tables(four)
    assert problems == []
    titles = [(table["suite"], table["setting"].removeprefix(own.setting)) for table in tables]
    assert titles == [
        ("average", ""),
        ("geneval", ""),
        ("geneval", ", by tag"),
        ("ocr", ""),
        ("deqa", ""),
        ("pickscore", ""),
    ]
    average = tables[0]["rows"][0]["cells"]["average"]
    assert average["mean"] == pytest.approx((1.0 + 0.5 + 4 / 5 + 19.5 / 26) / 4)
    assert tables[1]["skills"][:2] == ["official tag mean", "official image mean"]
    assert "tag means are of" in tables[1]["notes"][0]


def test_a_cell_that_no_columns_can_be_made_of_is_told(cells: list[Cell]):
    broken = dataclasses.replace(cells[0], records=[*cells[0].records, cells[0].records[0]])
    (table,), problems = evaluation_tables([broken, *cells[1:]])
    assert [row["label"] for row in table["rows"]] == [cell.model for cell in cells[1:]]
    assert len(problems) == 1
    assert "is there twice" in problems[0]
    assert evaluation_tables([broken])[0] == []
    assert evaluation_tables([]) == ([], [])


def test_ties_are_all_best_and_leads_that_may_be_none_are_level():
    means = {"a": 2.0, "b": 2.0, "c": 1.9, "d": 1.0}
    rows = [{"label": name, "cells": {"s": {"mean": mean}}} for name, mean in means.items()]
    pairs = {"a": {"c": Interval(0.1, -0.1, 0.3), "d": Interval(1.0, 0.5, 1.5)}}
    mark(rows, "s", pairs)
    assert [row["cells"]["s"].get("mark") for row in rows] == ["best", "best", "level", None]


def test_a_column_with_one_value_has_no_best():
    rows = [{"label": "a", "cells": {"s": {"mean": 2.0}}}, {"label": "b", "cells": {}}]
    mark(rows, "s", {})
    assert "mark" not in rows[0]["cells"]["s"]


def test_unequal_settings_and_prompts_are_told(cells: list[Cell]):
    assert unequal(cells) == []
    settings = dataclasses.replace(cells[0].settings, guidance=1.0)
    other = dataclasses.replace(cells[0], settings=settings, records=cells[0].records[1:])
    said = unequal([other, cells[1]])
    assert said[0].startswith("prompts of base and grpo-mix: 59 and 60 prompts")
    assert said[1] == "guidance of base and grpo-mix: 1 and 4.5"
