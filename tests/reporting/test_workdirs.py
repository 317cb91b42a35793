"""A run's folder is read whole, in part, or damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fopd_jax.reporting.workdirs import READ, hours_at, is_workdir, read_leads, read_run
from tests.reporting import made


def test_a_finished_run(tmp_path: Path):
    run = read_run("mine", made.make_run(tmp_path / "opd", "opd"))
    assert (run.name, run.stage, run.status, run.step, run.steps, run.images) == ("mine", "opd", "finished", 40, 40, 64)
    assert run.devices == {"TPU v6e": 8}
    assert run.own == "student"
    assert run.models["student"] == made.ENDS["opd"]
    lead = run.leads["base"]["geneval"]
    assert lead.mean == pytest.approx(0.31, abs=5e-4)
    assert run.scalars["train/loss"].steps.tolist() == list(range(1, 41))
    assert len(run.scalars["eval/ocr"].steps) == 10
    assert run.seconds["compile"] == 380
    assert run.problems == []


def test_a_run_that_goes_on_stands_at_its_last_line(tmp_path: Path):
    run = read_run("sft", made.make_run(tmp_path / "sft", "sft"))
    assert (run.status, run.step, run.steps) == ("running", 30, 40)
    assert run.models == {}
    assert run.own == ""


def test_what_a_run_began_from_is_not_what_it_trained(tmp_path: Path):
    """Without the table, which has no lead over the run's own model, by names alone."""
    folder = made.make_run(tmp_path / "opd", "opd")
    (folder / "table.txt").unlink()
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results["models"] |= {"start": results["models"]["base"], "teacher/x": results["models"]["base"]}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert read_run("mine", folder).own == "student"


@pytest.mark.parametrize("kept", READ)
def test_any_file_alone_will_do(tmp_path: Path, kept: str):
    whole = made.make_run(tmp_path / "whole", "opd")
    (whole / "timing.json").write_text('{"train_seconds": 3}', encoding="utf-8")
    (tmp_path / "part").mkdir()
    assert not is_workdir(tmp_path / "part")
    shutil.copy(whole / kept, tmp_path / "part" / kept)
    assert is_workdir(tmp_path / "part")
    run = read_run("part", tmp_path / "part")
    assert run.problems == []
    assert run.step in (0, 40)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"starts": 3}', b'{"models": [1], "seconds": "x"}', b"\x00\xff"])
def test_damage_is_told_by_name_and_crashes_nothing(tmp_path: Path, damage: bytes):
    folder = made.make_run(tmp_path / "opd", "opd")
    for name in READ:
        (folder / name).write_bytes(damage)
    run = read_run("opd", folder)
    assert run.models == {}
    assert all(str(folder) in problem for problem in run.problems)
    named = {name for name in READ for problem in run.problems if name in problem}
    assert {"run.json"} <= named or damage.startswith(b'{"starts')
    assert run.step == 0


def test_an_adapter_that_is_none_is_told(tmp_path: Path):
    folder = made.make_run(tmp_path / "opd", "opd")
    (folder / "student.safetensors").write_bytes(b"no tensors")
    run = read_run("opd", folder)
    assert run.card == {}
    assert "student.safetensors" in run.problems[0]


def test_hours_are_sums_of_seconds_with_gaps_filled(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    made.lines(folder / "performance.jsonl", [{"step": s, "time/step_seconds": t} for s, t in ((2, 3.0), (4, 6.0))])
    hours = hours_at(read_run("run", folder))
    assert hours is not None
    np.testing.assert_allclose(hours.values * 3600, [2 * 3.0, 2 * 3.0 + 2 * 6.0])
    made.lines(folder / "performance.jsonl", [{"step": 1, "memory/host_peak_gib": 1.0}])
    assert hours_at(read_run("run", folder)) is None


def test_leads_are_those_of_the_table():
    leads = read_leads(made.table_of("grpo-mix"))
    assert set(leads) == {"base"}
    for skill in made.SKILLS:
        lead = leads["base"][skill]
        assert lead.mean == pytest.approx(made.ENDS["grpo-mix"][skill] - made.BASE[skill], abs=5.1e-4)
        spread = np.asarray([-0.02, -0.01, 0.01, 0.02])
        assert lead.error == pytest.approx(spread.std(ddof=1) / 2, abs=5.1e-4)


@pytest.mark.parametrize("table", ["", "\n", "a b\nx y z", "geneval\nbase 0.1.2 (+1.2.3 ± 0.1)\n", "é ± \x00\n± ± ±"])
def test_a_table_that_is_none_has_no_leads(table: str):
    assert read_leads(table) == {}


def test_what_a_run_trained_is_told_from_what_it_was_given(tmp_path: Path):
    for models, own in (
        ({"base": 1, "merge": 1, "teacher/text": 1, "student": 1}, "student"),
        ({"base": 1, "policy": 1}, "policy"),
        ({"base": 1}, ""),
        ({"a": 1, "b": 1}, ""),
    ):
        folder = tmp_path / "-".join(models).replace("/", "_")
        folder.mkdir()
        results = {"models": {name: {"text": value} for name, value in models.items()}}
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        assert read_run("run", folder).own == own
