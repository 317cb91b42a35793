"""Prompt files: what they hold, and what is refused with field, file and line."""

import os
from pathlib import Path

import pytest

from fopd_jax.config.schema import RoutedTask
from fopd_jax.tasks.prompts import check_overlaps, read_prompts, read_tasks
from fopd_jax.tasks.task import Task


def _file(folder: Path, content: bytes | str, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content", ["a b\nc, d\n", "a b\nc, d", "a b\r\nc, d\r\n", "  a b \n\tc, d\n", "\ufeffa b\nc, d\n"]
)
def test_a_prompt_is_a_line_without_the_space_around_it(tmp_path: Path, content: str):
    assert read_prompts(_file(tmp_path, content), "field") == ("a b", "c, d")


def test_order_repeats_and_all_scripts_are_kept(tmp_path: Path):
    prompts = ("zwei grüne Äpfel", "東京の看板", 'a sign that says "HI"', "zwei grüne Äpfel")
    assert read_prompts(_file(tmp_path, "\n".join(prompts)), "field") == prompts


def test_only_line_breaks_separate_prompts(tmp_path: Path):
    """Prompts collected from the web hold other separators, at which Python's `splitlines` would cut them."""
    prompts = ("one\u2028two", "three\x85four", "five\x0bsix\x0cseven\x1ceight")
    assert read_prompts(_file(tmp_path, "\n".join(prompts)), "field") == prompts


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty, expected one prompt a line"),
        ("a\n\nb\n", ", line 2 is blank, expected a prompt"),
        ("\n \n", "is empty, expected one prompt a line"),
        ("\na\n", ", line 1 is blank, expected a prompt"),
        ("a\n\nb\n\nc\n", ", line 2 is blank (one of 2), expected a prompt"),
        ("sign “Ä”".encode("utf-16"), "utf-8"),
        (b"caf\xe9\n", "utf-8"),
    ],
)
def test_what_is_no_list_of_prompts_is_named_with_field_and_file(tmp_path: Path, content: bytes | str, problem: str):
    path = _file(tmp_path, content)
    with pytest.raises(ValueError, match=r"^tasks\.ocr\.prompts: ") as error:
        read_prompts(path, "tasks.ocr.prompts")
    assert str(path) in str(error.value)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path):
    for path, reason in ((tmp_path / "nothing.txt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=rf"^field: cannot read .*{reason}.*expected a text of one prompt a line"):
            read_prompts(path, "field")


# ---- tasks


def _tasks(folder: Path, **changes: str) -> dict[str, RoutedTask]:
    """Two tasks; `changes` replaces fields of the second."""
    files = {name: str(_file(folder, f"{name}\n", f"{name}.txt")) for name in ("one", "one_test", "two", "two_test")}
    tasks = {
        "one": {"prompts": files["one"], "test": files["one_test"], "teacher": "x", "weight": 1.0},
        "two": {"prompts": files["two"], "test": files["two_test"], "teacher": "y", "weight": 3.0} | changes,
    }
    return {name: RoutedTask(**fields) for name, fields in tasks.items()}


def test_every_task_of_a_config_has_its_prompts_and_no_scores(tmp_path: Path):
    tasks = read_tasks(_tasks(tmp_path))
    assert {name: (task.name, task.train, task.test, task.scored) for name, task in tasks.items()} == {
        "one": ("one", ("one",), ("one_test",), ()),
        "two": ("two", ("two",), ("two_test",), ()),
    }


@pytest.mark.parametrize("field", ["prompts", "test"])
def test_the_tasks_field_is_named(tmp_path: Path, field: str):
    with pytest.raises(ValueError, match=rf"^tasks\.two\.{field}: cannot read 'missing\.txt'"):
        read_tasks(_tasks(tmp_path, **{field: "missing.txt"}))


# ---- what prompts hold, and what is no list of prompts


def test_blank_lines_at_the_end_are_no_prompts(tmp_path: Path):
    for end in ("\n\n", "\n \t\n\n", "\r\n\r\n", "\n\n \n"):
        assert read_prompts(_file(tmp_path, f"a\nb{end}"), "field") == ("a", "b")


def test_control_characters_are_counted_and_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = _file(tmp_path, "a\n\x1b[31mred\nb\tc\nbell\x07\n")
    assert len(read_prompts(path, "tasks.x.prompts")) == 4
    told = f"warning: tasks.x.prompts: {path}: 2 of 4 prompts hold control characters, the first in line 2\n"
    assert capsys.readouterr().err == told
    read_prompts(_file(tmp_path, "a\nb\tc\n"), "field")
    assert capsys.readouterr().err == ""


GENEVAL = '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of 2 cats"}\n'
OTHERS: dict[str, tuple[bytes | str, str]] = {
    "GenEval": (GENEVAL * 2, "GenEval's metadata: line 1 is a JSON object; keep its 'prompt'"),
    "one line of GenEval": (GENEVAL, "GenEval's metadata"),
    "GenEval after a prompt": ("a cat\n" + GENEVAL, "GenEval's metadata: line 2"),
    "JSON lines": ('{"text": "a"}\n{"text": "b"}\n', "JSON lines: line 1 is a JSON object with text"),
    "lists": ('["a", 1]\n["b", 2]\n', "JSON lines: line 1 is a JSON value"),
    "a JSON list": ('[\n  "a cat",\n  "a dog"\n]\n', "one JSON value (a list or an object)"),
    "a JSON object": ('{\n  "prompts": ["a"]\n}\n', "one JSON value (a list or an object)"),
    "CSV": ("id,prompt\n1,a cat\n", "a table (CSV) with the columns id, prompt"),
    "quoted CSV": ('"prompt","seed"\n"a, b",3\n', "a table (CSV) with the columns prompt, seed"),
    "TSV": ("Prompt\tCategory\tChallenge\na cat\tx\ty\n", "a table (TSV) with the columns prompt, category, challenge"),
    "one column": ("prompt\na cat\na dog\n", "a table with the one column 'prompt'"),
    "HTML": ("<!DOCTYPE html>\n<html>\n", "a web page or XML"),
    "XML": ('<?xml version="1.0"?>\n<a/>\n', "a web page or XML"),
    "git-lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "a git-lfs pointer; fetch"),
    "UTF-16": ("a cat\na dog\n".encode("utf-16"), "UTF-16 text"),
    "UTF-16 without mark": ("a cat\na dog\n".encode("utf-16-le"), "UTF-16 text or a binary file"),
    "UTF-32": ("a cat".encode("utf-32"), "UTF-32 text"),
    "ZIP": (b"PK\x03\x04abc", "a ZIP archive"),
    "gzip": (b"\x1f\x8b\x08abc", "a gzip archive"),
    "Parquet": (b"PAR1abc", "a Parquet table"),
    "an image": (b"\x89PNG\r\n\x1a\nabc", "a PNG image"),
    "XML of its own": ("<prompts>\n<p>a cat</p>\n</prompts>\n", "XML"),
    "a Python list": ("['a cat', 'a dog']\n", "a list as Python writes it"),
    "a Python list in lines": ("['a cat',\n'a dog']\n", "a list as Python writes it"),
    "YAML": ("prompts:\n- a cat\n- a dog\n", "a list (Markdown or YAML): every line begins like '-'"),
    "Markdown": ("# Prompts\n* a cat\n* a dog\n", "a list (Markdown or YAML): every line begins like '*'"),
    "numbers": ("1. a cat\n2. a dog\n", "a numbered list: every line begins like '1.'"),
    "TOML": ('[prompts]\na = "a cat"\nb = "a dog"\n', "TOML or INI: every line is a name and its value"),
    "binary": (bytes(range(32)) * 9 + b"\0" * 30, "a binary file"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_refused_by_their_names(kind: str, tmp_path: Path):
    content, what = OTHERS[kind]
    path = _file(tmp_path, content)
    with pytest.raises(ValueError, match=r"^tasks\.ocr\.test: ") as error:
        read_prompts(path, "tasks.ocr.test")
    assert f"{path} looks like {what}" in str(error.value)
    assert str(error.value).endswith("expected a text of one prompt a line")
    assert "\n" not in str(error.value)


def test_prompts_that_only_look_so_are_prompts(tmp_path: Path):
    prompts = (
        "text, red on blue", "a caption, a picture", "[a cat], detailed", "{a|b} c", '"a sign"', "<b> as art", "1",
        "a;b", "version 2 of a robot", "prompt", "a | b", "- a dash", "1. a number", "(a cat:1.2), [a dog]", "x = 'a'",
        "<lora:a:1> a cat", "[cat]", "null", "PK", "prompt engineering, as a painting",
    )  # fmt: skip
    assert read_prompts(_file(tmp_path, "\n".join(prompts)), "field") == prompts


def test_a_nul_is_refused_with_its_line(tmp_path: Path):
    text = "a cat\n" * 40 + "a\0b\n" + "a dog\n" * 40
    with pytest.raises(ValueError, match=r"line 41 holds a NUL character, expected text$"):
        read_prompts(_file(tmp_path, text), "field")


def test_held_out_prompts_that_are_trained_on_are_counted_and_told(capsys: pytest.CaptureFixture[str]):
    tasks = {"a": Task("a", ("one", "Two  words"), ("x", "two words")), "b": Task("b", ("three",), ("four",))}
    check_overlaps(tasks)
    told = "warning: tasks.a.test: 1 of 2 prompts are training prompts, too, such as 'two words'\n"
    assert capsys.readouterr().err == told
    check_overlaps({"a": tasks["b"]})
    assert capsys.readouterr().err == ""


def test_a_task_that_holds_nothing_out_is_refused():
    tasks = {"a": Task("a", ("one", "two"), ("x",)), "b": Task("b", ("three",), ("one", "three", "one"))}
    with pytest.raises(ValueError, match=r"^tasks\.b\.test: all 2 prompts are training prompts of a, b, expected held"):
        check_overlaps(tasks)


def test_what_may_be_wrong_with_prompts_is_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    read_prompts(_file(tmp_path, "# a comment\na cat #1\ncaf\ufffd\n\ufeffa dog\na \u202ecat\n"), "field")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("prompts.txt: ")[2] for line in lines] == [
        "1 of 5 prompts begin with '# ', which is read as part of the prompt, the first in line 1",
        "1 of 5 prompts hold U+FFFD, which stands for what another program could not decode, the first in line 3",
        "2 of 5 prompts hold byte order marks or marks of direction, which are not seen, the first in line 4",
    ]


def test_a_line_of_which_nothing_is_seen_is_blank(tmp_path: Path):
    with pytest.raises(ValueError, match=r", line 2 is blank, expected a prompt$"):
        read_prompts(_file(tmp_path, "a\n\u200b\u2060\nb\n"), "field")


def test_what_may_never_end_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match=r"^field: cannot read .*a pipe, a socket or a device, not a regular file"):
            read_prompts(path, "field")
