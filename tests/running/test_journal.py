"""Scores outlive a kill, to the bit; torn, damaged and refused files cost no more than a second answer."""

import json
from pathlib import Path

import numpy as np
import pytest

from fopd_jax.rewards.reward import Scores, all_failed, collect
from fopd_jax.running import journal as module
from fopd_jax.running.journal import Journal, fingerprint

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
PROMPTS, BESIDE = ["a", "b", "c"], [{"target": "x"}, {}, {"n": 1}]
OF = fingerprint("config", IMAGES, PROMPTS, BESIDE)
GOOD = collect([(0.1 + 0.2, {"read": "x"}), (np.nextafter(1.0, 2.0), {"found": {"red ball": 2}}), (-0.0, {})])
PARTLY = collect([(1 / 3, {}), ValueError("too dark"), (2.0, {})])


def same(found: Scores, expected: Scores) -> bool:
    return found.values.tobytes() == expected.values.tobytes() and found.details == expected.details


def test_scores_come_back_to_the_bit_in_another_process_of_that_number(tmp_path: Path):
    journal = Journal(tmp_path, 0)
    assert journal.find(7, OF) == {}
    assert not (tmp_path / "scores").exists()
    journal.add(7, OF, "text", GOOD)
    journal.add(7, OF, "dear", GOOD)
    journal.add(7, "other images", "text", PARTLY)
    journal.add(8, OF, "later", GOOD)
    found = Journal(tmp_path, 0).find(7, OF)
    assert list(found) == ["text", "dear"]
    assert all(same(each, GOOD) for each in found.values())
    assert Journal(tmp_path, 1).find(7, OF) == {}


def test_failures_stand_unless_they_ended_the_run(tmp_path: Path):
    journal = Journal(tmp_path, 0)
    journal.add(7, OF, "text", PARTLY)
    journal.add(7, OF, "dear", GOOD)
    journal.add(8, OF, "text", PARTLY)
    journal.reject(7)
    journal.reject(9)
    journal = Journal(tmp_path, 0)
    assert list(journal.find(7, OF)) == ["dear"]
    assert same(journal.find(8, OF)["text"], PARTLY)
    assert journal.find(9, OF) == {}
    journal.add(7, OF, "text", again := all_failed(3, "still away"))  # and now the share that may fail is larger
    found = Journal(tmp_path, 0).find(7, OF)
    assert same(found["text"], again)
    np.testing.assert_array_equal(found["text"].failed, [True] * 3)


def test_a_fingerprint_is_of_images_prompts_what_stands_beside_them_and_the_config():
    other = IMAGES.copy()
    other[2, 3, 3, 2] ^= 1
    alike = [
        fingerprint("another", IMAGES, PROMPTS, BESIDE),
        fingerprint("config", other, PROMPTS, BESIDE),
        fingerprint("config", IMAGES.reshape(3, 2, 8, 3), PROMPTS, BESIDE),
        fingerprint("config", IMAGES, ["a", "b", "d"], BESIDE),
        fingerprint("config", IMAGES, PROMPTS, [{}] * 3),
    ]
    assert len({OF, *alike}) == 6
    assert fingerprint("config", IMAGES[:, ::-1][:, ::-1], PROMPTS, BESIDE) == OF


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_a_torn_last_line_counts_as_none_and_the_next_is_whole(kept: int, tmp_path: Path, capsys):
    journal = Journal(tmp_path, 0)
    journal.add(7, OF, "text", GOOD)
    before = (path := tmp_path / "scores" / "7_0.jsonl").read_bytes()
    path.write_bytes(before + before[:kept])
    journal = Journal(tmp_path, 0)
    assert list(journal.find(7, OF)) == ["text"]
    assert path.read_bytes() == before
    journal.add(7, OF, "dear", GOOD)
    assert list(journal.find(7, OF)) == ["text", "dear"]
    assert capsys.readouterr().err == ""
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "line",
    [
        "no json", "[]", "7", '{"reward": "text", "of": "x", "values": [1.0]}',
        '{"reward": "text", "of": "x", "values": [1.0], "details": []}',
        '{"reward": "text", "of": "x", "values": [null], "details": [{}]}',
        '{"reward": "text", "of": "x", "values": ["a"], "details": [{}]}',
        '{"reward": "text", "of": "x", "values": [1e999], "details": [{}]}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_damaged_lines_are_told_and_put_aside(line: str, tmp_path: Path, capsys):
    journal = Journal(tmp_path, 0)
    journal.add(7, OF, "text", GOOD)
    whole = (path := tmp_path / "scores" / "7_0.jsonl").read_bytes()
    path.write_bytes(damaged := line.encode() + b"\n" + whole)
    assert list(journal.find(7, OF)) == ["text"]
    assert path.read_bytes() == whole
    assert path.with_name("7_0.jsonl.damaged").read_bytes() == damaged
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{path}: damaged (1 of 2 lines hold no scores); goes on without" in told


def test_details_that_json_lacks_become_text(tmp_path: Path):
    odd = Scores(np.array([1.0]), np.array([False]), ({"array": np.float32(2), "place": Path("x")},))
    (journal := Journal(tmp_path, 0)).add(7, OF, "text", odd)
    assert journal.find(7, OF)["text"].details == ({"array": "2.0", "place": "x"},)


def test_steps_before_a_checkpoint_are_removed_for_all_processes(tmp_path: Path):
    for process in (0, 1):
        for step in (1, 9, 10, 11):
            Journal(tmp_path, process).add(step, OF, "text", GOOD)
    (tmp_path / "scores" / "1_0.jsonl.damaged").touch()
    Journal(tmp_path, 0).prune(10)
    left = sorted(path.name for path in (tmp_path / "scores").iterdir())
    assert left == ["10_0.jsonl", "10_1.jsonl", "11_0.jsonl", "11_1.jsonl", "1_0.jsonl.damaged"]
    Journal(tmp_path / "new", 0).prune(10)


def test_what_cannot_be_written_or_read_is_told_and_stops_nothing(tmp_path: Path, capsys):
    (tmp_path / "scores").write_text("in the way")
    journal = Journal(tmp_path, 0)
    journal.add(7, OF, "text", GOOD)
    journal.reject(7)
    told = capsys.readouterr().err
    assert told.count("cannot keep scores") == told.count("\n") == 1
    (tmp_path / "scores").unlink()
    (tmp_path / "scores" / "9_0.jsonl").mkdir(parents=True)
    assert Journal(tmp_path, 0).find(9, OF) == {}
    assert (tmp_path / "scores" / "9_0.jsonl.damaged").is_dir()


def test_a_line_is_json_with_null_where_it_failed(tmp_path: Path):
    Journal(tmp_path, 0).add(7, OF, "text", PARTLY)
    line = json.loads((tmp_path / "scores" / "7_0.jsonl").read_text())
    assert line == {
        "reward": "text", "of": OF, "values": [1 / 3, None, 2.0],
        "details": [{}, {"error": "ValueError: too dark"}, {}],
    }  # fmt: skip
    assert module.FOLDER == "scores"
