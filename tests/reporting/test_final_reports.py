"""Tables of final reports: own models first, given ones once, other settings in tables of their own."""

import dataclasses
from pathlib import Path

import pytest

from fopd_jax.reporting.final_reports import report_table, report_tables
from fopd_jax.reporting.workdirs import read_run
from tests.reporting import made


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


def test_other_settings_have_tables_of_their_own(tmp_path: Path):
    runs = [read_run(name, made.make_run(tmp_path / name, name)) for name in ("opd", "grpo-mix")]
    other = {"models": {"base": {"ocr": 0.2}, "student": {"ocr": 0.4}}, "failed": {"student": {"ocr": 3}}}
    runs[0] = dataclasses.replace(runs[0], results={**runs[0].results, "settings": {"steps 4": other}})
    usual, few = report_tables(runs)
    assert (usual["setting"], few["setting"]) == ("", "steps 4")
    assert [row["label"] for row in few["rows"]] == ["opd", "base"]
    assert few["rows"][0]["cells"]["ocr"] == {"mean": 0.4, "images": 4, "failed": 3, "mark": "best"}
    assert few["rows"][0]["settings"]["here"] == "steps 4"
    assert few["rows"][0]["leads"] == {}
