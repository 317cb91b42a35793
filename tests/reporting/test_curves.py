"""Curves, skills and gaps by timestep as a page has them."""

from pathlib import Path

import numpy as np
import pytest

from fopd_jax.reporting import curves
from fopd_jax.reporting.workdirs import Run, read_run
from tests.reporting import made


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return [read_run(name, made.make_run(tmp_path / name, name, 700)) for name in ("opd", "grpo-mix")]


def test_every_metric_is_there_and_no_curve_is_long(runs: list[Run]):
    found = curves.curves(runs)
    assert {"train/loss", "train/grad_norm", "eval/ocr", "time/step_seconds", "memory/peak_gib"} <= set(found)
    assert set(found["train/loss"]) == {"opd", "grpo-mix"}
    assert set(found["train/teacher_gap"]) == {"opd"}
    assert not any("/t0" in name for name in found)
    loss = found["train/loss"]["opd"]
    assert len(loss["x"]) == len(loss["y"]) <= 500
    assert max(loss["y"]) == pytest.approx(runs[0].scalars["train/loss"].values.max(), rel=1e-5)
    assert found["eval/ocr"]["opd"]["x"] == [70 * k for k in range(1, 11)]


def test_skills_are_scores_alone(tmp_path: Path):
    names = ("eval/ocr", "eval/reward/ocr", "eval/monitors/x", "eval/fixed/ocr/data/low", "eval/teachers/a", "train/a")
    made.lines(tmp_path / "metrics.jsonl", [{"step": 1, **dict.fromkeys(names, 1.0)}])
    assert curves.skills([read_run("run", tmp_path)]) == ["ocr", "reward/ocr"]


def test_gaps_keep_first_and_last_and_no_more_than_a_screen_has(runs: list[Run]):
    found = curves.gaps(runs[0])
    assert set(found) == {"composition", "text"}
    table = found["text"]
    assert table["timesteps"] == list(range(made.TIMESTEPS))
    assert (table["steps"][0], table["steps"][-1]) == (1, 700)
    assert len(table["steps"]) == len(table["values"]) <= curves.MOST_GAPS
    last = [runs[0].scalars[f"train/gap/text/t{t:02d}"].values[-1] for t in range(made.TIMESTEPS)]
    np.testing.assert_allclose(table["values"][-1], last, rtol=1e-5)
    assert curves.gaps(runs[1]) == {}


def test_a_timestep_that_was_not_measured_is_null(tmp_path: Path):
    rows = [
        {"step": 1, "train/gap/a/b/t00": 1.0, "train/gap/a/b/t01": float("nan")},
        {"step": 2, "train/gap/a/b/t01": 3.0},
    ]
    made.lines(tmp_path / "metrics.jsonl", rows)
    table = curves.gaps(read_run("run", tmp_path))["a/b"]
    assert table == {"timesteps": [0, 1], "steps": [1, 2], "values": [[1.0, None], [None, 3.0]]}


def test_gaps_at_fixed_states_by_noise_level(tmp_path: Path):
    names = {"eval/fixed/text/teacher": 9.0, "eval/fixed/text/teacher/high": 1.0, "eval/fixed/text/data/low": 2.0}
    made.lines(tmp_path / "metrics.jsonl", [{"step": 1, **names}])
    assert curves.fixed_gaps(read_run("run", tmp_path)) == {"text, teacher": {"high": 1.0}, "text, data": {"low": 2.0}}
