"""What all stages share: an evaluation that is shown, and that the loop hears of."""

import types
from typing import Any

import numpy as np
import pytest

from fopd_jax import console
from fopd_jax.evaluation.report import Model
from fopd_jax.evaluation.score import Measured
from fopd_jax.stages import setup
from fopd_jax.stages.setup import Setup


def test_an_evaluation_is_shown_and_reports_to_the_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def evaluate(*asked: Any) -> Measured:
        for _ in range(3):
            asked[-1](4)
        return Measured({"text": np.array([0.0, 1.0, np.nan])}, {"text": "no answer"})

    monkeypatch.setattr(setup, "evaluate", evaluate)
    monkeypatch.setattr(console, "FIRST_S", 0.0)
    pairs = types.SimpleNamespace(scored=lambda: ["text"], samples=12)
    pipeline = types.SimpleNamespace(world=None)
    stage: Any = types.SimpleNamespace(eval_set=pairs, sampler=None, pipeline=pipeline, max_failed=0.5)
    heard: list[int] = []
    assert Setup.evaluate(stage, Model("student", {}, {}), heard.append) == {"text": 0.5}
    assert heard == [4, 4, 4]
    first, *_, last, failed = capsys.readouterr().err.splitlines()
    assert (first, last.partition(" images/s")[0]) == ("evaluation 4/12", "evaluation 12/12")
    assert failed == "warning: evaluation: text: 1 of 3 failed: no answer"
    stage.max_failed = 0.3
    with pytest.raises(
        FloatingPointError, match=r"^scores: text: 1 of 3 failed: no answer \(run\.max_failed_rewards is"
    ):
        Setup.evaluate(stage, Model("student", {}, {}), heard.append)
