"""Cells go to disk and back; damaged ones are named."""

from pathlib import Path

import pytest

from fopd_jax.evaluation.records import RECORDS_FILE, Cell, Record, Settings, read_cell, read_cells, write_cell

CELL = Cell(
    "student",
    "geneval",
    "steps 40",
    Settings("ode", 40, 4.5, 0.0, 512, 3.0, 1),
    (
        Record("0", 0, "a café", "00000/samples/0000.png", {"geneval": 0.5}, {"ocr": "server gone"}, {"tag": "colors"}),
        Record("1", 0, "two dogs", "00001/samples/0000.png"),
    ),
    {"from": "runs/x"},
)


def test_cells_come_back_as_they_were(tmp_path: Path) -> None:
    folder = tmp_path / "student" / "geneval" / "steps_40"
    folder.mkdir(parents=True)
    assert read_cells(tmp_path) == []
    write_cell(folder, CELL)
    assert read_cells(tmp_path) == [CELL]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write_cell(tmp_path, CELL)
    (tmp_path / RECORDS_FILE).write_text('{"prompt_id": "0"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"records\.jsonl: damaged, or not of an evaluation"):
        read_cell(tmp_path)
