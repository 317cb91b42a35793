"""Sets of demonstrations: whole shards under their names, equal bytes from any process, back as they were written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fopd_jax.config.schema import Pairs
from fopd_jax.tasks.demonstrations import (
    CLAIM,
    Demonstrations,
    Layout,
    Shard,
    abouts,
    claim,
    cut,
    finish,
    finished,
    is_set,
    write_shard,
)
from fopd_jax.tasks.images import read_pairs
from tests.quick import environment

LAYOUT = Layout((2, 3, 4), "float16", 2)
SHARDS = cut({"text": 5, "other": 2}, 3)
CLAIMED = {"identity": {"seed": 0, "--best-of": 1}, "shards": 3, "layout": [[2, 3, 4], "float16", 2]}


def row(task: str, i: int) -> dict[str, Any]:
    rng = np.random.default_rng((len(task), i))
    return {
        "prompt": f'{task} "é" {i}', "task": task, "metadata": json.dumps({"i": i}), "id": i, "sample": 0,
        "seed": 2**31 - i, "score": np.float32(i / 8), "latents": rng.normal(size=(2, 3, 4)).astype(np.float16),
        "sigmas": np.array([1, 0.5], np.float32), "states": rng.normal(size=(2, 2, 3, 4)).astype(np.float16),
        "velocities": rng.normal(size=(2, 2, 3, 4)).astype(np.float16),
    }  # fmt: skip


def write(folder: Path, shard: Shard) -> None:
    rows = [row(shard.task, i) for i in range(shard.start, shard.stop)]
    write_shard(folder, shard, len(SHARDS), LAYOUT, rows, [{"id": 9, "error": "why"}] if shard.number == 1 else [])


def make(folder: Path) -> Path:
    claim(folder, CLAIMED)
    for shard in SHARDS:
        write(folder, shard)
    finish(folder, len(SHARDS), LAYOUT, "made up")
    return folder


def test_draws_are_cut_task_by_task():
    assert [Shard(0, "text", 0, 3), Shard(1, "text", 3, 5), Shard(2, "other", 0, 2)] == SHARDS


def test_what_is_written_comes_back(tmp_path: Path):
    folder = make(tmp_path / "set")
    assert is_set(folder)
    for task, count in (("text", 5), ("other", 2)):
        found = Demonstrations(folder, task, "f")
        assert len(found) == count
        assert found.prompts == tuple(row(task, i)["prompt"] for i in range(count))
        order = [count - 1, 0]
        for number, each in zip(order, found.rows(order), strict=True):
            expected = row(task, number)
            assert each.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(each[name], value, err_msg=name)
            assert each["latents"].dtype == np.float16
        assert read_pairs(task, Pairs(images=str(folder))) == (found.prompts, ())
    assert [(each["rows"], each["score"], each["failed"]) for each in abouts(folder, 3)] == [
        (3, 0.125, []), (2, 3.5 / 8, [{"id": 9, "error": "why"}]), (2, 0.0625, []),
    ]  # fmt: skip
    assert not list(folder.glob(".*"))


def test_it_is_a_dataset_of_the_library_and_needs_no_tensorflow(tmp_path: Path):
    import tensorflow_datasets as tfds

    folder = make(tmp_path / "set")
    source = tfds.builder_from_directory(str(folder)).as_data_source(split="train")
    assert len(source) == 7
    assert source[6]["prompt"].decode() == row("other", 1)["prompt"]
    np.testing.assert_array_equal(source[6]["velocities"], row("other", 1)["velocities"])
    assert "tensorflow" not in sys.modules


def test_every_process_writes_the_same_bytes(tmp_path: Path):
    """The order of a map's entries, and of hashes, is another in every process."""
    code = f"from tests.tasks.test_demonstrations import Path, make; make(Path({str(tmp_path)!r}) / 'a')"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(PYTHONHASHSEED="7"))
    make(tmp_path / "b")
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert a == b
    assert len(a) == 3 + 3 + 3


def test_a_set_that_is_not_whole_is_refused_and_says_so(tmp_path: Path):
    folder = tmp_path / "set"
    claim(folder, CLAIMED)
    write(folder, SHARDS[1])
    assert finished(folder, 3) == [1]
    with pytest.raises(ValueError, match=r"^f: .*set holds 1 of 3 shards; the command that began it makes the others"):
        Demonstrations(folder, "text", "f")


def test_what_is_no_set_of_the_task_is_named(tmp_path: Path):
    folder = make(tmp_path / "set")
    with pytest.raises(ValueError, match=r"f: .* holds demonstrations of text, other, expected some of 'ocr'"):
        Demonstrations(folder, "ocr", "f")
    (folder / CLAIM).write_text("{}")
    with pytest.raises(ValueError, match=r"f: .*demonstrations\.json: damaged, expected what fopd_jax\.demonstrate"):
        Demonstrations(folder, "text", "f")


def test_a_damaged_shard_is_named(tmp_path: Path):
    folder = make(tmp_path / "set")
    shard = next(folder.glob("*array_record-00000*"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"f: .*set: demonstrations that cannot be read"):
        Demonstrations(folder, "text", "f").rows([0])


def test_a_folder_holds_one_set(tmp_path: Path):
    claim(tmp_path / "set", CLAIMED)
    claim(tmp_path / "set", CLAIMED)
    other = {**CLAIMED, "identity": {"seed": 0, "--best-of": 4}}
    with pytest.raises(ValueError, match=r"--out: .*set holds demonstrations with --best-of = 1, but here it is 4"):
        claim(tmp_path / "set", other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"--out: .*mine holds thesis\.txt, expected a folder that is new"):
        claim(tmp_path / "mine", CLAIMED)
