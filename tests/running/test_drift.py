"""Monitors that leave where a run began: told once each time, also over restarts."""

import json
from pathlib import Path

import pytest

from fopd_jax.running.drift import Drift

DARK = "monitors/dark_share"


def log(workdir: Path, *values: float) -> None:
    lines = [json.dumps({"step": step, f"train/{DARK}": value}) for step, value in enumerate(values, 1)]
    (workdir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def told(capsys: pytest.CaptureFixture) -> int:
    return capsys.readouterr().err.count("look at the pictures")


def test_it_is_told_when_it_leaves_and_again_once_it_was_back(capsys: pytest.CaptureFixture):
    drift = Drift(None, "train/", "rollouts", updates=2)
    for step, (value, lines) in enumerate([(0.2, 0), (0.3, 0), (0.9, 1), (0.9, 0), (0.3, 0), (0.8, 1)], 1):
        drift.see(step, {DARK: value, "loss": 1.0})
        assert told(capsys) == lines
    drift.see(7, {"loss": 1.0})  # not measured
    drift.see(8, {DARK: 0.8})
    assert told(capsys) == 0


def test_a_restart_goes_on_from_what_was_logged(tmp_path: Path, capsys: pytest.CaptureFixture):
    log(tmp_path, 0.2, 0.3, 0.9)
    drift = Drift(tmp_path, "train/", "rollouts", updates=2)
    drift.see(4, {DARK: 0.9})
    assert told(capsys) == 0
    drift.see(5, {DARK: 0.3})
    drift.see(6, {DARK: 0.9})
    assert told(capsys) == 1
    other = Drift(tmp_path, "eval/", "evaluation", updates=1)
    other.see(4, {DARK: 0.9})
    assert told(capsys) == 0
