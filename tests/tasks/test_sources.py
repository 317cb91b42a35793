"""Words that name prompts: files, generated sets, and the rows of either that a column selects."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fopd_jax.config.schema import RoutedTask
from fopd_jax.tasks import sources
from fopd_jax.tasks.prompts import read_tasks
from fopd_jax.tasks.sources import Source, file_of, parse_source, read_set, read_sets


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A generated set `ocr`, and what it was asked for."""
    asked: list[tuple] = []

    def generate(split: str, count: int | None, seed: int) -> tuple[list[str], list[dict]]:
        asked.append((split, count, seed))
        if split not in ("train", "test"):
            raise ValueError(f"split: found {split!r}, expected train or test")
        texts = [f'{split} "{seed + i}"' for i in range(count or 5)]
        return texts, [{"target": str(seed + i), "odd": i % 2 == 1} for i in range(count or 5)]

    module = ModuleType("made_up_generator")
    module.generate = generate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up_generator", module)
    monkeypatch.setattr(sources, "GENERATORS", {"ocr": "made_up_generator"})
    return asked


def _mixed(folder: Path) -> Path:
    path = folder / "mixed.jsonl"
    tasks = ["ocr", "ocr", "geneval", "other", "geneval", "ocr"]
    rows = [{"prompt": f"p{i}", "task": task, "n": i % 2} for i, task in enumerate(tasks)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- words


def test_words_mean_files_sets_and_columns(generator: list):
    assert parse_source("data/a.txt", "f") == Source("data/a.txt", Path("data/a.txt"))
    made = parse_source("ocr:train?count=7&seed=3#odd=true", "f")
    assert (made.path, made.generator, made.split, made.count, made.seed) == (None, "ocr", "train", 7, 3)
    assert (made.name, made.column, made.value) == ("ocr:train?count=7&seed=3", "odd", "true")
    named = parse_source("a.jsonl#task=two words", "f")
    assert (named.path, named.column, named.value) == (Path("a.jsonl"), "task", "two words")
    assert file_of("ocr:test", "f") is None
    assert file_of("a.jsonl#task=x", "f") == Path("a.jsonl")


def test_a_file_that_is_there_is_meant_whatever_its_name(tmp_path: Path, generator: list):
    for name in ("a#b=c", "ocr:train"):
        path = tmp_path / name
        path.write_text("a cat\n")
        assert parse_source(str(path), "f") == Source(str(path), path)
        assert read_set(str(path), "f").texts == ("a cat",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("orc:train", "found 'orc:train', expected a file, or a generated set such as ocr:train"),
        ("ocr:train?size=3", "found the parameter 'size', expected count or seed"),
        ("ocr:train?count=0", "found count=0, expected a whole number from 1 to"),
        ("ocr:train?count=99999999999", "found count=99999999999, expected a whole number from 1 to"),
        ("ocr:train?seed=-1", "found seed=-1, expected a whole number from 0"),
        ("ocr:train?seed=x", "found seed=x, expected"),
        ("ocr:validation", "split: found 'validation', expected train or test"),
        ("a" * 5000, "cannot read '"),
        ("", "cannot read '.'"),
    ],
)
def test_words_that_mean_nothing_are_named_with_their_field(generator: list, text: str, problem: str):
    with pytest.raises(ValueError, match=r"^tasks\.x\.prompts: ") as error:
        read_set(text, "tasks.x.prompts")
    assert problem in str(error.value)


def test_a_generated_set_is_made_as_asked(generator: list):
    found = read_set("ocr:test", "f")
    assert found.texts[:2] == ('test "0"', 'test "1"')
    assert found.metadata[1] == {"target": "1", "odd": True}
    assert len(read_set("ocr:train?count=3&seed=8", "f")) == 3
    assert generator == [("test", None, 0), ("train", 3, 8)]
    assert read_set("ocr:train#odd=true", "f").texts == ('train "1"', 'train "3"')


def test_the_generated_sets_of_this_package_are_known_by_their_names():
    assert [len(read_set(f"{name}:train?count=40", "f")) for name in sources.GENERATORS] == [40, 40]
    official = read_set("geneval:test", "f")
    assert len(official) == 553
    assert {each["tag"] for each in official.metadata} > {"counting", "position"}
    counting = read_set("geneval:train?count=300&seed=1#tag=counting", "f")
    assert 0 < len(counting) < 300
    assert {each["tag"] for each in counting.metadata} == {"counting"}
    with pytest.raises(ValueError, match=r"^tasks\.x\.test: .*'val'"):
        read_set("ocr:val", "tasks.x.test")


# ---- columns


def test_one_file_feeds_several_tasks_and_is_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = _mixed(tmp_path)
    path.write_text(path.read_text() + "\n" + json.dumps({"prompt": " p0", "task": "ocr", "n": 0}))
    tasks = {
        name: RoutedTask("teacher", prompts=f"{path}#task={name}", test=f"{path}#n=1") for name in ("ocr", "geneval")
    }
    made = read_tasks(tasks)
    assert made["ocr"].train == ("p0", "p1", "p5", "p0")
    assert made["ocr"].train_metadata[1] == {"task": "ocr", "n": 1}
    assert made["geneval"].train == ("p2", "p4")
    assert made["geneval"].test == ("p1", "p3", "p5")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1  # all rows are of some set
    evened = "1 blank line left out; 1 prompt had spaces at an edge; 1 repeat an earlier one and stay"
    assert told[0].endswith(f"{path}: 7 prompts; {evened}")


def test_rows_that_no_task_selects_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = _mixed(tmp_path)
    found = read_sets({f"tasks.{name}.prompts": (f"{path}#task={name}", "train") for name in ("ocr", "geneval")})
    assert [len(each) for each in found.values()] == [3, 2]
    fields = "tasks.ocr.prompts, tasks.geneval.prompts"
    assert capsys.readouterr().err == f"warning: {fields}: 1 of 6 rows of {path} are of no task\n"


def test_a_selector_that_matches_nothing_names_what_there_is(tmp_path: Path):
    path = _mixed(tmp_path)
    values = r"'geneval' \(2\), 'ocr' \(3\), 'other' \(1\)"
    with pytest.raises(ValueError, match=rf"^f: no row of .* has task=x; there are {values}$"):
        read_set(f"{path}#task=x", "f")
    with pytest.raises(ValueError, match=r"^f: no column 'tsk'; those of .*mixed\.jsonl are n, task$"):
        read_set(f"{path}#tsk=x", "f")
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"^f: no column 'task'; .*a\.txt has none$"):
        read_set(f"{tmp_path / 'a.txt'}#task=x", "f")


def test_values_are_compared_as_they_are_written(tmp_path: Path):
    assert len(read_set(f"{_mixed(tmp_path)}#n=1", "f")) == 3
    path = tmp_path / "a.csv"
    path.write_text("prompt,Category\na,Gary Marcus et al. \nb,Text\n")
    assert read_set(f"{path}#Category=Gary Marcus et al. ", "f").texts == ("a",)
