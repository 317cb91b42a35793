"""Scores of runs become tables."""

import csv
import json
import statistics
from pathlib import Path

import pytest

from fopd_jax.studies.students import Student
from fopd_jax.studies.summary import Row, as_markdown, read_scores, write_summary
from fopd_jax.studies.tables import SKILLS, Table

TABLE = Table("Steps", {"plain": Student()}, ("steps 4", "rewritten"))


def scores(value: float) -> dict[str, float]:
    return dict.fromkeys(SKILLS, value)


def leave(folder: Path) -> None:
    (folder / "rewritten").mkdir(parents=True)
    kept = {"models": {"student": scores(0.5)}, "settings": {"steps 4": {"models": {"student": scores(0.25)}}}}
    (folder / "results.json").write_text(json.dumps(kept))
    (folder / "rewritten" / "results.json").write_text(json.dumps({"models": {"student": scores(0.125)}}))


def test_scores_come_from_settings_and_evaluations(tmp_path: Path) -> None:
    leave(tmp_path)
    found = read_scores(tmp_path, TABLE, "student")
    assert found == scores(0.5) | {
        f"{skill}, {column}": value for column, value in (("steps 4", 0.25), ("rewritten", 0.125)) for skill in SKILLS
    }
    with pytest.raises(ValueError, match=r"results\.json: damaged, or not of this study: 'other'"):
        read_scores(tmp_path, TABLE, "other")
    (tmp_path / "rewritten" / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"rewritten/results\.json: damaged"):
        read_scores(tmp_path, TABLE, "student")


def test_means_and_deviations_over_seeds_with_the_best_bold(tmp_path: Path) -> None:
    table = Table("Two", {"one": Student(), "two": Student()})
    values = (0.51, 0.55, 0.53)
    rows = [
        Row("base", None, {0: scores(0.9)}),
        Row("one", Student(), {seed: scores(value) for seed, value in enumerate(values)}),
        Row("two", Student(fields={"mix": lambda *_: 1}), {0: scores(0.4)}, {"mix": 1}),
    ]
    page = as_markdown(table, rows).splitlines()
    assert page[4:] == [
        "| base |" + " 0.900 |" * 4,
        "| one |" + f" **{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}** |" * 4,
        "| two |" + " 0.400 |" * 4,
    ]
    write_summary(tmp_path, {"two": (table, rows)}, {}, {"commit": "abc"})
    kept = json.loads((tmp_path / "tables.json").read_text())
    assert kept["commit"] == "abc"
    assert kept["tables"]["two"]["rows"]["one"]["scores"]["1"] == scores(0.55)
    assert kept["tables"]["two"]["rows"]["two"]["fields"] == {"mix": 1}  # as it was trained
    with (tmp_path / "tables.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * len(SKILLS)
    assert lines[4] == {"table": "two", "row": "one", "seed": "0", "column": "text", "score": "0.51"}
    assert (tmp_path / "tables.md").read_text().startswith("### Two\n")
