"""Cells of evaluations: whole ones as they were written, damaged ones in part, with a line."""

import json
from pathlib import Path

import pytest

from fopd_jax.evaluation.records import read_cells
from fopd_jax.reporting.evaluations import is_evaluation, read_evaluation, skills_of
from tests.reporting import made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return made.make_evaluation(tmp_path / "eval", prompts=10, side=8)


def test_cells_are_those_that_were_written(out: Path):
    kept, problems = read_evaluation(out)
    assert problems == []
    assert [each.cell for each in kept] == read_cells(out)
    assert is_evaluation(out)
    assert not is_evaluation(out / "base")


def test_skills_are_those_of_any_model_failed_ones_too(out: Path):
    kept, _ = read_evaluation(out)
    assert skills_of(kept) == ["geneval", "pickscore", "ocr"]


def test_damaged_lines_and_records_are_told(out: Path):
    path = out / "opd" / "geneval" / "steps_40" / "records.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    later = json.dumps({**json.loads(lines[2]), "of_a_later_version": 3, "scores": {"geneval": "high", "ocr": 1}})
    path.write_text("\n".join([lines[0], "{", later, '{"prompt_id": 3}', *lines[4:], ""]), encoding="utf-8")
    kept, problems = read_evaluation(out)
    cell = next(each.cell for each in kept if each.cell.model == "opd")
    assert len(cell.records) == 8
    assert cell.records[1].scores == {"ocr": 1.0}
    assert cell.records[1].failed == {"geneval": "is no number"}
    assert problems == [
        f"{path}: 1 damaged of 10 lines, left out: line 2",
        f"{path}: 1 of 9 lines are no records, the first: 3",
    ]


@pytest.mark.parametrize("content", ["{", "[]", '{"model": "a"}', '{"settings": {}}'])
def test_damaged_settings_leave_a_cell_out(out: Path, content: str):
    path = out / "opd" / "geneval" / "steps_40" / "settings.json"
    path.write_text(content, encoding="utf-8")
    kept, problems = read_evaluation(out)
    assert [each.cell.model for each in kept] == ["base", "grpo-mix", "teacher-composition"]
    assert len(problems) == 1
    assert str(path) in problems[0]


def test_images_outside_of_the_folder_are_none(out: Path, tmp_path: Path):
    made.picture(tmp_path / "private.png", 8, ("red", "circle"), ("blue", "circle"), 0)
    kept = read_evaluation(out)[0][0]
    record = kept.cell.records[0]
    assert kept.image(record) == (kept.folder / record.image).resolve()
    (kept.folder / "link.png").symlink_to(tmp_path / "private.png")
    for image in ("../../../../private.png", str(tmp_path / "private.png"), "link.png", "missing.png", "", "images"):
        assert kept.image(made.Record("0", 0, "", image)) is None
