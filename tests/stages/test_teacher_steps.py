"""`sampler.teacher_steps` from the config to the update: its levels, its cost, and what is told of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fopd_jax.config.parse import assign, resolve
from fopd_jax.config.schema import OPD
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.stages.check import describe_plan
from fopd_jax.stages.opd import plan_opd
from fopd_jax.stages.opd_update import make_spec
from tests.configs import load


def few(**changes: Any) -> OPD:
    config = load("miniature", "smoke")
    assign(config, {"sampler.num_steps": 4, **changes})
    return resolve(config)


def test_levels_are_those_of_a_schedule_of_more_steps():
    """Of the config's shift; the default has none."""
    spec = make_spec(few(**{"sampler.teacher_steps": 3, "model.shift": 2.0}), (4, 4, 3))
    assert spec.between is not None
    finer = np.delete(flow_match_sigmas(10, 2.0)[:9], [0, 3, 6])
    np.testing.assert_allclose(spec.between[:3].ravel(), finer, rtol=0, atol=1e-6)
    assert spec.teacher_steps == 3
    assert make_spec(few(), (4, 4, 3)).between is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"objective.mar_beta": 0.0},
        {"tasks.text.extrapolation": 0.5},
        {"tasks.text.mix": {"text": 1.0, "composition": 1.0}, "routing.method": "soft"},
    ],
    ids=str,
)
def test_teachers_and_anchor_cost_as_often_as_they_are_asked(fields: dict[str, Any]):
    once, often = (plan_opd(few(**{"sampler.teacher_steps": steps}, **fields)).cost() for steps in (1, 4))
    assert often.teachers == pytest.approx(4 * once.teachers)
    assert (often.rollout, often.forward, often.backward) == (once.rollout, once.forward, once.backward)


def test_a_check_tells_of_it_and_of_the_reports_settings(tmp_path: Path):
    config = few(**{"sampler.teacher_steps": 4, "eval.also_steps": (3, 8), "eval.also_guidance": (1.5,)})
    told = describe_plan(plan_opd(config), config, tmp_path / "run")
    assert ", asked along 4 steps of their own for one of the student's\n" in told
    others = "guidance 1.5 / steps 3 / steps 3, guidance 1.5 / steps 8 / steps 8, guidance 1.5"
    assert f"; the report also at {others}\n" in told
    plain = describe_plan(plan_opd(few()), few(), tmp_path / "run")
    assert "asked along" not in plain
    assert "the report also" not in plain


def test_a_setup_has_a_sampler_a_setting():
    setup = plan_opd(few(**{"eval.also_steps": (3,), "eval.also_guidance": (1.5,)})).setup
    assert {name: sampler.guided for name, sampler in setup.others.items()} == {
        "guidance 1.5": True,
        "steps 3": False,
        "steps 3, guidance 1.5": True,
    }
    assert plan_opd(few()).setup.others == {}


def test_branches_are_refused_by_name():
    config = few(**{"sampler.teacher_steps": 4, "objective.match": "branches"})
    with pytest.raises(ValueError, match=r"^sampler\.teacher_steps: found 4, expected 1 with objective\.match"):
        plan_opd(config)
