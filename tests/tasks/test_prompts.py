"""Prompt files: what they hold, and what is refused with field, file and line."""

from pathlib import Path

import pytest

from fopd_jax.config.schema import RoutedTask
from fopd_jax.tasks.prompts import read_prompts, read_tasks


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
        ("a\nb\n \t\n", ", line 3 is blank, expected a prompt"),
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
    assert {name: (task.name, task.train, task.test, task.score) for name, task in tasks.items()} == {
        "one": ("one", ("one",), ("one_test",), None),
        "two": ("two", ("two",), ("two_test",), None),
    }


@pytest.mark.parametrize("field", ["prompts", "test"])
def test_the_tasks_field_is_named(tmp_path: Path, field: str):
    with pytest.raises(ValueError, match=rf"^tasks\.two\.{field}: cannot read 'missing\.txt'"):
        read_tasks(_tasks(tmp_path, **{field: "missing.txt"}))
