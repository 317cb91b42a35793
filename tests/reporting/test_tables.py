"""Tables: means, marks, pairs, and what makes a comparison unfair."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fopd_jax.reporting.evaluations import Kept, read_evaluation
from fopd_jax.reporting.intervals import Interval
from fopd_jax.reporting.tables import compared, evaluation_tables, mark, report_table, unequal
from fopd_jax.reporting.workdirs import read_run
from tests.reporting import made


@pytest.fixture
def cells(tmp_path: Path) -> list[Kept]:
    return read_evaluation(made.make_evaluation(tmp_path / "eval", prompts=60, side=8))[0]


def test_an_evaluation_has_means_intervals_pairs_and_failures(cells: list[Kept]):
    (table,) = evaluation_tables(cells)
    assert table["skills"] == ["geneval", "pickscore", "ocr"]
    rows = {row["label"]: row for row in table["rows"]}
    for kept in cells:
        cell = rows[kept.cell.model]["cells"]["ocr"]
        scores = [record.scores["ocr"] for record in kept.cell.records if "ocr" in record.scores]
        assert cell["mean"] == pytest.approx(np.mean(scores))
        assert (cell["images"], cell["failed"], cell["why"]) == (59, 1, "server gone")
        assert cell["low"] < cell["mean"] < cell["high"]
    best = max(rows, key=lambda label: rows[label]["cells"]["geneval"]["mean"])
    assert [label for label in rows if rows[label]["cells"]["geneval"].get("mark") == "best"] == [best]
    assert "mark" not in rows["base"]["cells"]["geneval"]
    pair = table["pairs"]["geneval"]["opd"]["base"]
    means = [rows[label]["cells"]["geneval"]["mean"] for label in ("opd", "base")]
    assert pair.mean == pytest.approx(means[0] - means[1])
    assert table["pairs"]["geneval"]["base"]["opd"].mean == pytest.approx(-pair.mean)
    assert table["warnings"] == []


def test_pairs_are_of_the_images_that_both_have():
    one, other = np.asarray([[1.0], [2.0], [np.nan]]), np.asarray([[0.5], [np.nan], [7.0]])
    assert compared({"a": one, "b": other})["a"]["b"] == (0.5, None, None, 1)
    assert compared({"a": one, "b": np.full((3, 1), np.nan)}) == {}


def test_ties_are_all_best_and_leads_that_may_be_none_are_level():
    rows = [
        {"label": name, "cells": {"s": {"mean": mean}}} for name, mean in (("a", 2.0), ("b", 2.0), ("c", 1.9), ("d", 1))
    ]
    pairs = {"a": {"c": Interval(0.1, -0.1, 0.3, 9), "d": Interval(1.0, 0.5, 1.5, 9)}}
    mark(rows, "s", pairs)
    assert [row["cells"]["s"].get("mark") for row in rows] == ["best", "best", "level", None]


def test_a_column_with_one_value_has_no_best():
    rows = [{"label": "a", "cells": {"s": {"mean": 2.0}}}, {"label": "b", "cells": {"s": {}}}]
    mark(rows, "s", {})
    assert "mark" not in rows[0]["cells"]["s"]


def test_unequal_settings_and_prompts_are_told(cells: list[Kept]):
    assert unequal(cells) == []
    cell = cells[0].cell
    settings = dataclasses.replace(cell.settings, guidance=1.0)
    other = Kept(dataclasses.replace(cell, settings=settings, records=cell.records[1:]), cells[0].folder)
    said = unequal([other, cells[1]])
    assert said[0] == "guidance differs: base 1.0, grpo-mix 4.5"
    assert said[1].startswith("not the same prompts and samples; images: base 59, grpo-mix 60")


def test_reports_of_runs_share_the_models_that_they_measured_alike(tmp_path: Path):
    runs = [read_run(name, made.make_run(tmp_path / name, name)) for name in made.ENDS]
    table = report_table(runs)
    assert table is not None
    assert [row["label"] for row in table["rows"]] == ["opd", "opd-direct", "grpo-mix", "base"]
    base = table["rows"][-1]
    assert base["measured"] == ["opd", "opd-direct", "grpo-mix"]
    assert base["given"]
    marks = {skill: [row["cells"][skill].get("mark") for row in table["rows"]] for skill in made.SKILLS}
    assert marks == {
        "geneval": ["best", None, None, None],
        "ocr": [None, "best", None, None],
        "pickscore": [None, None, "best", None],
    }  # fmt: skip
    assert table["rows"][0]["leads"]["base"]["ocr"].mean == pytest.approx(0.4, abs=5e-4)
    assert table["rows"][0]["settings"]["guidance"] == 4.5
    assert report_table(runs[3:]) is None


def test_given_models_that_differ_keep_their_runs_names(tmp_path: Path):
    runs = [read_run(name, made.make_run(tmp_path / name, name)) for name in ("opd", "grpo-mix")]
    models = {"base": {"geneval": 0.1}, "student": {"geneval": 0.2}}
    runs[1] = dataclasses.replace(runs[1], results={"models": models}, config={"eval.guidance": 1.0})
    table = report_table(runs)
    assert table is not None
    assert [row["label"] for row in table["rows"]] == ["opd", "grpo-mix", "base (opd)", "base (grpo-mix)"]
    assert table["warnings"] == ["eval.guidance differs: opd 4.5, grpo-mix 1.0"]
