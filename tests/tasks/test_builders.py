"""Prompt sets as tensorflow-datasets, without TensorFlow: they come back in their order, whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fopd_jax.tasks import builders
from fopd_jax.tasks.builders import build, is_built, read_built
from fopd_jax.tasks.prompt_set import PromptSet
from fopd_jax.tasks.sources import read_set, read_sets
from tests.tasks.program import run

TRAIN = PromptSet(
    ('ein Schild "Zoë — ½"', "a cat", "a cat", "two\nlines"),
    ({"tag": "text", "n": [1, {"a": None}]}, {}, {"x": 1.5}, {}),
)
TEST = PromptSet(("a dog",))


def test_what_is_written_comes_back_in_its_order(tmp_path: Path):
    folder = build("ocr", {"train": TRAIN, "test": TEST}, tmp_path, "made up")
    assert folder == tmp_path / "prompt_sets" / "ocr" / "1.0.0"
    assert is_built(folder)
    train, test = read_set(str(folder), "f"), read_set(str(folder), "f", "test")
    assert (train.texts, train.metadata) == (TRAIN.texts, TRAIN.metadata)
    assert (test.texts, test.metadata) == (TEST.texts, ())
    info = json.loads((folder / "dataset_info.json").read_text())
    assert (info["fileFormat"], info["disableShuffling"]) == ("array_record", True)
    assert [each.name for each in tmp_path.iterdir()] == ["prompt_sets"]


def test_many_rows_keep_their_order(tmp_path: Path):
    """More than the library would shuffle by key, were it not told otherwise."""
    many = PromptSet(tuple(f"prompt {i}" for i in range(20_000)), tuple({"i": i} for i in range(20_000)))
    found = read_set(str(build("many", {"train": many}, tmp_path, "")), "f")
    assert (found.texts, found.metadata) == (many.texts, many.metadata)


def test_a_split_is_selected_from_like_any_set(tmp_path: Path):
    folder = build("ocr", {"train": TRAIN, "test": TEST}, tmp_path, "")
    found = read_sets({"tasks.a.prompts": (f"{folder}#tag=text", "train"), "tasks.a.test": (str(folder), "test")})
    assert found["tasks.a.prompts"].texts == TRAIN.texts[:1]
    assert found["tasks.a.test"].texts == TEST.texts


def test_what_is_there_is_kept_and_other_prompts_are_refused(tmp_path: Path):
    folder = build("ocr", {"train": TRAIN}, tmp_path, "")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build("ocr", {"train": TRAIN}, tmp_path, "") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match=rf"^--data-dir: {folder} holds other prompts in 'train'; remove it, or"):
        build("ocr", {"train": TEST}, tmp_path, "")


def test_a_set_that_cannot_be_made_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError, match="UnicodeEncodeError"):
        build("ocr", {"train": TRAIN, "test": PromptSet(("\ud800",))}, tmp_path, "")
    assert not is_built(tmp_path / "prompt_sets" / "ocr" / "1.0.0")
    assert build("ocr", {"train": TRAIN}, tmp_path, "").is_dir()


@pytest.mark.parametrize("damage", ["split", "info", "shard", "gone", "features"])
def test_a_damaged_set_is_named_with_field_and_folder(tmp_path: Path, damage: str):
    folder = build("ocr", {"train": TRAIN}, tmp_path, "")
    shard = next(folder.glob("*.array_record-*"))
    if damage == "info":
        (folder / "dataset_info.json").write_text("{")
    elif damage == "shard":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "gone":
        shard.unlink()
    elif damage == "features":
        text = (folder / "features.json").read_text()
        (folder / "features.json").write_text(text.replace('"prompt"', '"caption"'))
    with pytest.raises(ValueError, match=rf"^tasks\.x\.test: {folder}: no prompt set that can be read \(.*\)$"):
        read_built(folder, "test" if damage == "split" else "train", "tasks.x.test")


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = build("ocr", {"train": TRAIN}, tmp_path, "")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"^f: needs tensorflow_datasets: pip install 'fopd_jax\[prompt-sets\]'$"):
        read_set(str(folder), "f")
    assert builders.is_built(folder)


def test_tensorflow_is_never_imported_and_the_library_only_where_it_is_needed(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
from fopd_jax.tasks.prompts import read_tasks
from fopd_jax.tasks.builders import build
from fopd_jax.tasks.sources import read_set
(Path({str(tmp_path)!r}) / "a.txt").write_text("a cat\\n")
prompts = read_set({str(tmp_path / "a.txt")!r}, "f")
assert "tensorflow_datasets" not in sys.modules
folder = build("a", {{"train": prompts}}, Path({str(tmp_path)!r}), "")
assert read_set(str(folder), "f").texts == ("a cat",)
assert "tensorflow_datasets" in sys.modules
assert not [name for name in sys.modules if name == "tensorflow" or name.startswith("tensorflow.")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # the library would print


def test_sets_are_built_once_and_read_from_there(tmp_path: Path):
    (tmp_path / "train.txt").write_text("a cat\na dog\n")
    (tmp_path / "test.jsonl").write_text('{"prompt": "a bee", "tag": "x"}\n')
    (tmp_path / "c.py").write_text(
        "from fopd_jax.config.schema import OPD, RoutedTask\n"
        "def get_config():\n    return OPD('c', tasks={'x': RoutedTask('t', 'train.txt', 'test.jsonl')})\n"
    )
    done = run("build", "--config=c.py", "--data-dir=sets", folder=tmp_path)
    made = "sets/prompt_sets/x/1.0.0"
    read = f"read them by --config=c.py --config.tasks.x.prompts={made} --config.tasks.x.test={made}"
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"x: 2 and 1 prompts in {made}", read]), done.stderr
    done = run("describe", *read.split()[3:], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "x.test: a prompt set of array_record\n  tags: x 1" in done.stdout
