"""An evaluation's results and files: numbers, families of comparisons, layouts, captions, and the same bytes always."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fopd_jax.evaluation.records import Cell, Settings
from fopd_jax.evaluation.results import results_of
from fopd_jax.evaluation.statistics import holm
from fopd_jax.evaluation.tables import cells_of, spell_cells, spell_settings, write_results
from tests.evaluation.cells import SETTINGS, cell_of, keep, random, shuffled

FILES = ("results.csv", "results.json", "results.md", "results.tex")
NAMES = {"base": 0.0, "merge": 0.1, "student": 0.3}


def cells() -> list[Cell]:
    """Three models on two suites, one of them at two settings; one score of the student's failed."""
    found = []
    for seed, (model, lead) in enumerate(NAMES.items()):
        text = random(seed, 6, 2) + lead
        if model == "student":
            text[2, 1] = np.nan
        quality = random(seed + 5, 6, 2)
        found.append(cell_of(model, "text", {"text": text, "quality": quality}))
        for steps in (40, 8):
            settings = dataclasses.replace(SETTINGS, steps=steps)
            found.append(
                cell_of(model, "ocr", {"ocr": random(seed, 5, 1)}, setting=f"steps {steps}", settings=settings)
            )
    return found


def write_tables(out: Path, allow_unequal: Sequence[str] = ()) -> str:
    """Of what a folder holds."""
    return write_results(out, results_of(cells_of(out), allow_unequal=allow_unequal))


def test_values_and_differences_are_of_the_right_images():
    results = results_of(cells())
    assert results.against == "student"
    values = {(each.model, each.suite, each.setting, each.column): each for each in results.values}
    assert len(values) == len(results.values) == 3 * (2 + 2)
    failed = values["student", "text", "steps 40", "text"]
    assert (failed.n, failed.failed) == (11, 1)
    there = ~np.isnan(student := np.where(np.arange(12).reshape(6, 2) == 5, np.nan, random(2, 6, 2) + 0.3))
    assert failed.value == pytest.approx(student[there].mean(), abs=1e-6)
    leads = {(each.model, each.suite, each.setting, each.column): each for each in results.differences}
    lead = leads["base", "text", "steps 40", "text"]
    assert (lead.n, lead.left_out) == (11, 1)
    assert lead.value == pytest.approx((student - random(0, 6, 2))[there].mean(), abs=1e-6)
    assert lead.low is not None
    assert lead.high is not None
    assert lead.low < lead.value < lead.high


def test_a_family_is_a_suite_at_a_setting():
    results = results_of(cells())
    for suite, setting, size in (("text", "steps 40", 4), ("ocr", "steps 40", 2), ("ocr", "steps 8", 2)):
        family = [each for each in results.differences if (each.suite, each.setting) == (suite, setting)]
        assert len(family) == size
        p = [each.p for each in family if each.p is not None]
        assert [each.p_holm for each in family] == pytest.approx(holm(p), abs=1e-6)


def test_any_model_can_be_the_one_whose_leads_are_told():
    results = results_of(cells(), "merge")
    assert {each.model for each in results.differences} == {"base", "student"}
    assert list(dict.fromkeys(each.model for each in results.values)) == ["base", "student", "merge"]
    opposite = next(each for each in results.differences if (each.model, each.column) == ("student", "quality"))
    mine = next(each for each in results_of(cells()).differences if (each.model, each.column) == ("merge", "quality"))
    assert (opposite.value, opposite.low, opposite.high) == pytest.approx(
        (-mine.value, -mine.high, -mine.low), abs=0.02
    )
    assert opposite.p == mine.p
    with pytest.raises(ValueError, match="against: found 'x', expected one of base, merge, student"):
        results_of(cells(), "x")


def test_a_model_that_is_not_on_a_suite_has_no_leads_there():
    results = results_of([cell for cell in cells() if (cell.model, cell.suite) != ("student", "ocr")])
    assert {each.suite for each in results.differences} == {"text"}
    assert {each.suite for each in results.values} == {"text", "ocr"}


def test_unequal_cells_are_refused_by_name_unless_that_is_asked_for(tmp_path: Path):
    found = cells()
    found[0] = dataclasses.replace(found[0], settings=dataclasses.replace(SETTINGS, guidance=1.0))
    keep(tmp_path, found)
    with pytest.raises(
        ValueError, match=r"base, text, steps 40 and student, text, steps 40 .*guidance: found 1 and 4\.5"
    ):
        write_tables(tmp_path)
    assert not list(tmp_path.glob("results.*"))
    text = write_tables(tmp_path, allow_unequal=["guidance"])
    assert "- compared though unequal in: guidance" in text
    assert "base: guidance 1; merge, student: guidance 4.5." in text
    with pytest.raises(ValueError, match="allow_unequal: found 'cfg', expected some of"):
        write_tables(tmp_path, allow_unequal=["cfg"])
    with pytest.raises(ValueError, match="base, text, steps 40: found twice, expected one cell"):
        results_of([*found, found[0]], allow_unequal=["guidance"])


def test_scales_of_models_own_may_be_unequal():
    pair = [
        cell_of(name, "text", {"text": random(0, 3, 1)}, setting="steps 40, guidance own",
                settings=dataclasses.replace(SETTINGS, guidance=scale))
        for name, scale in (("base", 4.5), ("student", 1.0))
    ]  # fmt: skip
    assert len(results_of(pair).differences) == 1
    assert spell_cells(pair, "text", ["steps 40, guidance own"]) == (
        "3 prompts × 1 sample, sampler ode, 40 steps, 512 px, shift 3, seed 1; base: guidance 4.5; student: guidance 1."
    )


def test_the_files_are_the_same_whatever_the_order_and_hold_all_numbers(tmp_path: Path):
    for name, found in (("one", cells()), ("other", [shuffled(cell, k) for k, cell in enumerate(reversed(cells()))])):
        (tmp_path / name).mkdir()
        keep(tmp_path / name, found)
        write_tables(tmp_path / name)
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    kept = json.loads((tmp_path / "one" / "results.json").read_text(), parse_constant=pytest.fail)
    with (tmp_path / "one" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == "model,suite,setting,column,value,low,high,n,failed"
    assert len(rows) == len(kept["values"])
    for row, value in zip(rows, kept["values"], strict=True):
        assert {name: str(value[name]) for name in row} == row
    assert kept["failed"] == [
        {"model": "student", "suite": "text", "setting": "steps 40", "score": "text", "prompt_id": "2", "sample": 1,
         "reason": "server gone"}
    ]  # fmt: skip
    assert kept["cells"][0]["settings"] == dataclasses.asdict(SETTINGS)
    assert kept["method"]["resamples"] == 10_000


def test_tables_to_read(tmp_path: Path):
    keep(tmp_path, cells())
    text = write_tables(tmp_path)
    assert text == (tmp_path / "results.md").read_text()
    assert "| model | steps 40 | steps 8 |" in text  # columns are settings, where there are several
    assert (
        "5 prompts × 1 sample, sampler ode, guidance 4.5, 512 px, shift 3, seed 1; steps 40: 40 steps; steps 8: "
        in text
    )
    assert "| model | quality | text |" in text
    assert "6 prompts × 2 samples, sampler ode, 40 steps, guidance 4.5, 512 px, shift 3, seed 1." in text
    assert "| student minus | quality | text |" in text
    assert "Holm's method for the 4 differences of this suite." in text
    assert "- student, text, steps 40, text: 1 failed: prompt 2, sample 1: server gone" in text
    bold = [line for line in text.splitlines() if "**" in line]
    assert len(bold) == len(set(bold)) >= 2
    tex = (tmp_path / "results.tex").read_text()
    assert tex.count("\\begin{table}") == tex.count("\\end{table}") == 4
    assert len(labels := [line for line in tex.splitlines() if line.startswith("\\label")]) == len({*labels})


def test_a_score_that_failed_everywhere_has_no_number_and_no_lead(tmp_path: Path):
    pair = [cell_of("a", "ocr", {"ocr": np.full((3, 2), np.nan)}), cell_of("b", "ocr", {"ocr": np.ones((3, 2))})]
    (value, other), (lead,) = results_of(pair).values, results_of(pair).differences
    assert (value.value, value.n, value.failed) == (None, 0, 6)
    assert other.value == 1.0
    assert (lead.value, lead.p, lead.p_holm, lead.left_out) == (None, None, None, 6)
    keep(tmp_path, pair)
    assert "| a | –\\* |" in write_tables(tmp_path)


def test_a_folder_without_an_evaluation_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"found no evaluation, expected MODEL/SUITE/SETTING/settings\.json"):
        write_tables(tmp_path)


def test_settings_in_words():
    assert spell_settings(Settings("sde", 10, 1.0, 0.7, 512, 3.0, 5, True)) == [
        "sampler sde", "noise level 0.7", "10 steps", "guidance 1", "512 px", "shift 3", "seed 5", "prompts rewritten",
    ]  # fmt: skip
    assert spell_settings(Settings("given", 0, 0.0, 0.0, 0, 0.0, 0)) == ["images made elsewhere"]
    assert spell_settings(Settings("given", 28, 0.0, 0.0, 1024, 0.0, 0)) == [
        "images made elsewhere",
        "28 steps",
        "1024 px",
    ]
