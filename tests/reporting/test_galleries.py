"""Galleries: the same prompts side by side, cut where they are long."""

from pathlib import Path

import pytest

from fopd_jax.reporting.evaluations import Kept, read_evaluation
from fopd_jax.reporting.galleries import LONGEST_PROMPT, choose, galleries
from fopd_jax.reporting.pictures import Album
from tests.reporting import made


@pytest.fixture
def cells(tmp_path: Path) -> list[Kept]:
    return read_evaluation(made.make_evaluation(tmp_path / "eval", prompts=30, side=8))[0]


def test_a_row_has_every_model_with_image_scores_and_failures(cells: list[Kept]):
    album = Album(10**7)
    (gallery,) = galleries(cells, album, 100)
    assert gallery["models"] == ["base", "grpo-mix", "opd", "teacher-composition"]
    assert (gallery["total"], len(gallery["rows"]), gallery["note"]) == (30, 30, "")
    row = gallery["rows"][7]
    record = cells[2].cell.records[7]
    assert (row["prompt"], row["id"], row["tags"]) == (record.prompt, "00007", {"tag": "colors"})
    shown = row["models"]["opd"]
    assert shown["scores"] == record.scores
    assert shown["failed"] == {"ocr": "server gone"}
    assert shown["image"] in album.pictures


def test_a_long_one_shows_where_models_differ_most_and_says_what_it_leaves_out(cells: list[Kept]):
    (gallery,) = galleries(cells, Album(10**7), 10)
    assert len(gallery["rows"]) == 10
    assert gallery["note"].startswith("10 of 30 rows are shown")
    kept = {row["id"] for row in gallery["rows"]}
    by_model = {each.cell.model: each.by_key for each in cells}
    geneval = {key: [records[key].scores["geneval"] for records in by_model.values()] for key in by_model["opd"]}
    keys = list(geneval)
    chosen = choose(keys, by_model, ["geneval"], 10)
    assert chosen == sorted(chosen)
    spread = {key: max(values) - min(values) for key, values in geneval.items()}
    assert sum(spread[key] == 1.0 for key in chosen) >= 5
    assert len(kept) == 10


def test_models_that_lack_a_row_or_an_image_leave_a_gap(cells: list[Kept]):
    first = cells[0]
    (first.folder / first.cell.records[1].image).unlink()
    cut = first._replace(
        cell=made.Cell("base", "geneval", first.cell.setting, first.cell.settings, first.cell.records[1:])
    )
    (gallery,) = galleries([cut, *cells[1:]], Album(10**7), 100)
    rows = {row["id"]: row for row in gallery["rows"]}
    assert len(rows) == 30
    assert "base" not in rows["00000"]["models"]
    assert rows["00001"]["models"]["base"]["image"] == ""


def test_a_page_that_is_full_says_so(cells: list[Kept]):
    (gallery,) = galleries(cells, Album(4000), 100)
    assert "images did not fit into the page's limit" in gallery["note"]


def test_long_prompts_are_cut(cells: list[Kept]):
    record = made.Record("0", 0, "word " * 1000, "images/0000.png")
    kept = cells[0]._replace(cell=made.Cell("m", "s", "t", cells[0].cell.settings, (record,)))
    (gallery,) = galleries([kept], Album(10**6), 1)
    assert len(gallery["rows"][0]["prompt"]) == LONGEST_PROMPT + 2
