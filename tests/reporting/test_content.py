"""What a page is made of: all folders together, evaluations read once, and no more notes than anybody reads."""

import json
from pathlib import Path

import pytest

from fopd_jax.reporting import content
from fopd_jax.reporting.content import MOST_PROBLEMS, Sources, gather
from tests.reporting import made


def test_models_of_one_name_in_two_evaluations_are_told_apart_where_they_are_unequal(tmp_path: Path):
    outs = tuple(made.make_evaluation(tmp_path / name, prompts=2, side=8) for name in ("first", "second"))
    alike = gather(Sources((), outs)).data["tables"][0]["rows"]
    assert [row["label"] for row in alike] == sorted(made.MODELS)
    path = outs[1] / "opd" / "geneval" / "steps_40" / "records.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"pickscore": 2', '"pickscore": 1'), encoding="utf-8")
    data = gather(Sources((), outs)).data
    (table,) = data["tables"]
    labels = [row["label"] for row in table["rows"]]
    assert sorted(labels) == sorted([*(set(made.MODELS) - {"opd"}), "first/opd", "second/opd"])
    assert data["galleries"][0]["models"] == labels
    assert set(data["slots"]) == set(labels)


def test_an_evaluation_is_read_again_only_where_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = made.make_evaluation(tmp_path / "eval", prompts=2, side=8)
    read: list[Path] = []
    original = content.read_evaluation
    monkeypatch.setattr(content, "read_evaluation", lambda folder: read.append(folder) or original(folder))
    sources = Sources((), (out,))
    assert gather(sources).data == gather(sources).data
    assert read == [out]
    path = out / "opd" / "geneval" / "steps_40" / "records.jsonl"
    path.write_text(path.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    assert [len(row["models"]) for row in gather(sources).data["galleries"][0]["rows"]] == [4, 3]
    assert read == [out, out]


def test_folders_are_checked_by_flag(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--runs: .* is no run's folder"):
        Sources((("", tmp_path),)).check()
    with pytest.raises(ValueError, match=r"--evaluations: .*/none is no folder"):
        Sources((), (tmp_path / "none",)).check()


def test_pictures_of_runs_share_the_limit_with_galleries(tmp_path: Path):
    run = made.make_run(tmp_path / "opd", "opd")
    made.picture(run / "samples.png", 96, ("red", "circle"), ("blue", "circle"), 0)
    made.picture(run / "health.png", 96, ("red", "square"), ("blue", "circle"), 1)
    found = gather(Sources((("", run),)))
    assert set(found.data["runs"][0]["pictures"]) == {"samples", "health"}
    first = len(found.pictures[found.data["runs"][0]["pictures"]["samples"]])
    cut = gather(Sources((("", run),), bytes=first))
    assert set(cut.data["runs"][0]["pictures"]) == {"samples"}


def test_many_notes_are_cut(tmp_path: Path):
    out = made.make_evaluation(tmp_path / "eval", prompts=MOST_PROBLEMS, side=8)
    for path in (out / "opd").rglob("*.png"):
        path.write_bytes(b"no picture")
    for path in (out / "base").rglob("0001.png"):
        path.write_bytes(b"nor this")
    problems = gather(Sources((), (out,))).problems
    assert len(problems) == MOST_PROBLEMS + 1
    assert problems[-1] == "… and 1 more"


def test_a_damaged_record_of_a_run_changes_nothing_else(tmp_path: Path):
    run = made.make_run(tmp_path / "opd", "opd")
    whole = gather(Sources((("", run),))).data
    (run / "goodput.json").write_text("{", encoding="utf-8")
    data = gather(Sources((("", run),))).data
    assert len(data["problems"]) == 1
    same = [name for name in whole if json.dumps(whole[name], default=str) == json.dumps(data[name], default=str)]
    assert set(whole) - set(same) == {"runs", "problems"}
    assert data["runs"][0]["hours"] == 0
