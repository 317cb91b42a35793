"""Files as anybody may have left them are read as far as they go, and told of by name."""

import math
import os
from pathlib import Path

import pytest

from fopd_jax.reporting.reading import (
    as_number,
    distinct,
    numbers_of,
    read_lines,
    read_object,
    read_series,
    read_text,
)


def test_what_is_not_there_is_no_problem(tmp_path: Path):
    missing = tmp_path / "missing"
    assert read_object(missing) == ({}, [])
    assert read_text(missing) == ("", [])
    assert read_lines(missing) == ([], [])
    assert read_series(missing) == ({}, [])


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_damaged_object_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "goodput.json").write_bytes(content)
    found, problems = read_object(tmp_path / "goodput.json")
    assert found == {}
    assert len(problems) == 1
    assert str(tmp_path / "goodput.json") in problems[0]


def test_folders_links_and_pipes_are_named_and_do_not_hang(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "pipe"):
        for read, empty in ((read_object, {}), (read_text, ""), (read_lines, []), (read_series, {})):
            found, problems = read(tmp_path / name)
            assert found == empty
            assert [str(tmp_path / name) in problem for problem in problems] == [True]


def test_damaged_lines_are_left_out_and_numbered(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\nnot json\n\n[3]\n{"step": 2, "a": 2}\n{"step": 3, "a', encoding="utf-8")
    found, problems = read_lines(path)
    assert [line["step"] for line in found] == [1, 2]
    assert problems == [f"{path}: 2 damaged of 4 lines, left out: line 2, 4"]


def test_a_last_line_that_is_being_written_is_no_problem(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, ', encoding="utf-8")
    assert read_lines(path) == ([{"step": 1, "a": 1}], [])
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}', encoding="utf-8")
    assert len(read_lines(path)[0]) == 2


def test_series_are_in_order_and_hold_the_last_value_of_a_step(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = ['{"step": 2, "a": 5, "b": NaN}', '{"step": 1, "a": 1, "c": "text", "d": true}', '{"step": 2, "a": 7}']
    path.write_text("\n".join([*rows, '{"a": 1}', '{"step": "3", "a": 1}', ""]), encoding="utf-8")
    found, problems = read_series(path)
    assert set(found) == {"a", "b"}
    assert found["a"].steps.tolist() == [1, 2]
    assert found["a"].values.tolist() == [1, 7]
    assert math.isnan(found["b"].values[0])
    assert problems == [f"{path}: 2 of 5 lines have no step, left out"]


def test_numbers_are_numbers_alone():
    assert [as_number(value) for value in (1, 0.5, True, "1", None, math.inf, 10**400)] == [1, 0.5, *[None] * 5]
    assert as_number(math.inf, finite=False) == math.inf
    assert numbers_of({"a": 1, "b": "x", "c": math.nan}) == {"a": 1.0}
    assert numbers_of([1]) == {}
    assert distinct("abac") == ["a", "b", "c"]
