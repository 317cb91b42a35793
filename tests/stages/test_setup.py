"""What all stages share: an evaluation that is shown, and that the loop hears of."""

import types
from typing import Any

import numpy as np
import pytest

from fopd_jax import console
from fopd_jax.evaluation.report import Model
from fopd_jax.stages import setup
from fopd_jax.stages.setup import Setup


def test_an_evaluation_is_shown_and_reports_to_the_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def evaluate(*asked: Any) -> dict[str, np.ndarray]:
        for _ in range(3):
            asked[-1](4)
        return {"text": np.array([0.0, 1.0])}

    monkeypatch.setattr(setup, "evaluate", evaluate)
    monkeypatch.setattr(console, "FIRST_S", 0.0)
    pairs = types.SimpleNamespace(scored=lambda: ["text"], samples=12)
    stage: Any = types.SimpleNamespace(eval_set=pairs, sampler=None, pipeline=types.SimpleNamespace(world=None))
    heard: list[int] = []
    assert Setup.evaluate(stage, Model("student", {}, {}), heard.append) == {"text": 0.5}
    assert heard == [4, 4, 4]
    shown = capsys.readouterr().err.splitlines()
    assert (shown[0], shown[-1].partition(" images/s")[0]) == ("evaluation 4/12", "evaluation 12/12")
