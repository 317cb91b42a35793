"""A report at several settings of the sampler: their names, scores, tables and pictures, and what they compile."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fopd_jax.config.schema import Evaluation
from fopd_jax.evaluation import report
from fopd_jax.evaluation.report import Model, format_settings, write_report
from fopd_jax.evaluation.sampler import Sampler, make_sampler
from fopd_jax.evaluation.settings import cell_settings, main_setting, other_settings
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import ODE
from tests.evaluation.test_report import ABOUT, LATENT, MODELS, SAMPLER, SETTINGS, _flawed, _level, _world

USUAL = dataclasses.replace(SETTINGS, num_steps=10, guidance=1.0, also_steps=(4, 2))


@pytest.mark.parametrize(
    ("fields", "main", "others"),
    [
        ({}, "steps 10", {}),
        ({"also_steps": (4, 8)}, "steps 10", {"steps 4": (4, 4.5), "steps 8": (8, 4.5)}),
        ({"also_guidance": (1.5, 1.0)}, "guidance 4.5", {"guidance 1.5": (10, 1.5), "guidance 1": (10, 1.0)}),
        (
            {"also_steps": (4,), "also_guidance": (1.5,)},
            "steps 10, guidance 4.5",
            {"guidance 1.5": (10, 1.5), "steps 4": (4, 4.5), "steps 4, guidance 1.5": (4, 1.5)},
        ),
        ({"also_steps": (10, 4, 4), "also_guidance": (4.5,)}, "steps 10", {"steps 4": (4, 4.5)}),
    ],
)
def test_a_setting_is_named_by_what_is_other_in_it(fields: dict[str, Any], main: str, others: dict[str, Any]):
    evaluation = Evaluation(num_steps=10, guidance=4.5, **fields)
    assert main_setting(evaluation) == main
    assert other_settings(evaluation) == others
    assert list(other_settings(evaluation)) == list(others)


def _velocity(variables: Any, adapter: Any, x: Any, sigma: Any, conditioning: Any, route: Any = None) -> Any:
    """Towards the adapter's level: what is sampled lies closer to it the more steps there are."""
    return (x - adapter) * (1 + sigma)


def _sampler(steps: int) -> Sampler:
    return make_sampler(_velocity, ODE(), flow_match_sigmas(steps), 1.0, LATENT, SAMPLER.mesh)


def _report(folder: Path, sampler: Sampler, others: Any, world: Any = None, evaluation: Evaluation = USUAL) -> Any:
    folder.mkdir(exist_ok=True)
    models = [Model(name, {}, jnp.float32(shift)) for name, shift in MODELS.items()]
    write_report(folder, evaluation, ABOUT, sampler, world or _world(level=_level), models, 0.2, others)
    return json.loads((folder / "results.json").read_text())


def test_scores_of_every_setting_are_those_of_a_report_there(tmp_path: Path):
    """On the same pairs; nothing else of the results changes, and each setting is compiled once for all models."""
    samplers = {"steps 4": _sampler(4), "steps 2": _sampler(2)}
    usual = _sampler(10)
    whole = _report(tmp_path / "whole", usual, samplers)
    plain = _report(tmp_path / "plain", usual, {})
    assert whole["settings"].keys() == samplers.keys()
    for name, sampler in samplers.items():
        alone = _report(tmp_path / "alone", sampler, {})
        assert whole["settings"][name] == {"models": alone["models"], "failed": {}}
        assert whole["settings"][name]["models"]["base"] != whole["models"]["base"]
    assert {key: value for key, value in whole.items() if key != "settings"} == plain
    assert [each.draw._cache_size() for each in (usual, *samplers.values())] == [1, 1, 1]  # type: ignore[attr-defined]
    first, *others = (tmp_path / "whole" / "table.txt").read_text().split("\n\n")
    assert f"{first}\n" == (tmp_path / "plain" / "table.txt").read_text()
    assert [each.split()[:7] for each in others] == [["level", "steps", "10", "steps", "4", "steps", "2"]]


def test_a_skills_table_has_a_column_a_setting():
    """Leads are over the model at the same setting; a column is as wide as its head."""
    head = "steps 4, guidance 1.25, and more"
    scores = {
        "steps 10": {"base": {"text": np.array([0.0, 1.0, 0.5])}, "student": {"text": np.array([1.0, 1.0, 1.0])}},
        head: {"base": {"text": np.array([0.5, 0.0, 1.0])}, "student": {"text": np.array([0.25, np.nan, 0.75])}},
    }
    (table,) = format_settings(scores, "student")
    top, base, student, mark = table.splitlines()
    assert top.split() == ["text", "steps", "10", *head.split()]
    assert len({len(line) for line in (top, base, student)}) == 1
    assert base.split() == ["base", "0.500", "(+0.500", "±", "0.289)", "0.500", "(-0.250", "±", "0.000)"]
    assert student.split() == ["student", "1.000", "0.500*"]
    assert mark == "* of the pairs whose scores did not fail"


def test_the_student_is_drawn_at_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: dict[str, Any] = {}

    def draw_grid(images: np.ndarray, rows: Any, columns: Any) -> Image.Image:
        drawn.update(images=images, rows=list(rows), columns=list(columns))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(report, "draw_grid", draw_grid)
    _report(tmp_path, _sampler(10), {"steps 4": _sampler(4)})
    assert drawn["rows"] == [*MODELS, "student, steps 4"]
    *_, usual, few = drawn["images"]
    assert usual.shape == few.shape
    assert np.abs(few).mean() < np.abs(usual).mean()  # Euler's steps go too far towards the student's 0
    np.testing.assert_allclose(np.sign(few), np.sign(usual))  # of the same noise


def test_failures_at_another_setting_are_named_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = _report(tmp_path, _sampler(4), {"steps 2": _sampler(2)}, _world(level=_flawed))
    assert results["settings"]["steps 2"]["failed"] == {name: {"level": 4} for name in MODELS}
    told = capsys.readouterr().err.splitlines()
    assert "warning: scores of base at steps 2: level: 4 of 20 failed: TimeoutError: no answer" in told


def test_models_are_evaluated_at_every_setting_under_names_that_are_the_same_for_all():
    asked = Evaluation(num_steps=40, also_steps=(4,), guidance=4.5, also_guidance=(1.0,))
    found = [cell_settings(asked, own, ("own", "rewritten")) for own in (None, 1.0)]
    assert [*found[0]] == [*found[1]] == [
        "steps 40, guidance 4.5", "steps 40, guidance 1", "steps 4, guidance 4.5", "steps 4, guidance 1",
        "steps 40, guidance own", "steps 4, guidance own", "steps 40, guidance 4.5, rewritten",
    ]  # fmt: skip
    assert [each["steps 4, guidance own"] for each in found] == [(4, 4.5, False), (4, 1.0, False)]
    assert found[0]["steps 40, guidance 4.5, rewritten"] == (40, 4.5, True)
