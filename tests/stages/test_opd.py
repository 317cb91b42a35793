"""Objective 'mixed' of stage `opd`: what its plan refuses, what it names, and the steps of a whole stage."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.config.parse import assign, resolve
from fopd_jax.config.schema import OPD
from fopd_jax.running.means import split
from fopd_jax.stages.check import describe_plan
from fopd_jax.stages.opd import MixedOPD, make_opd, plan_opd
from tests.configs import load

MIXED: dict[str, Any] = {
    "objective.name": "mixed",
    "images_per_prompt": 4,
    "tasks.text.rewards": {"text": 1.0, "quality": 0.5},
    "tasks.composition.rewards": {"composition": 1.0},
}


def mixed(**changes: Any) -> OPD:
    config = load("miniature", "smoke")
    assign(config, MIXED | changes)
    return resolve(config)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images_per_prompt": 1}, "images_per_prompt: found 1, expected at least 2: 'mixed' compares"),
        ({"tasks.text.rewards": {"text": 0.0}}, r"tasks\.text\.rewards: found none with a weight"),
        ({"objective.name": "clipped", "lag": 1}, "lag: found 1, expected 0: objective 'clipped' waits for no rewards"),
        ({"sampler.transition": "ode", "objective.weighting": "ode"}, "'mixed' needs a transition with a density"),
        ({"one_timestep": True}, r"one_timestep: found True, which needs objective\.name 'direct'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=f"^{problem}" if not problem.startswith("'") else problem):
        plan_opd(mixed(**changes))


def test_the_plan_names_metrics_and_changes_of_weights(tmp_path: Path):
    config = mixed(**{"tasks.text.schedule": {"1": 0.5}, "tasks.composition.schedule": {"2": 0.0}})
    plan = plan_opd(config)
    told = {"reward/quality", "task_reward/text", "task_reward/composition", "teacher_gap/text", "flat_share", "lag"}
    assert told <= set(plan.metrics)
    rows = [line.split(maxsplit=1) for line in describe_plan(plan, config, tmp_path / "run").splitlines()]
    changes = "from step 1 on composition 1, text 0.5; from step 2 on composition 0, text 0.5"
    assert ["curriculum", changes] in rows
    by_turns = mixed(alternate=2, **{"tasks.text.schedule": {"1": 0.5}})
    told = describe_plan(plan_opd(by_turns), by_turns, tmp_path / "run")
    assert "each step of one task, by turns of 2; from step 1 on composition 1, text 0.5" in told
    assert plan.cost().rollout > plan_opd(mixed(**{"objective.name": "clipped"})).cost().rollout


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_a_stage_trains_by_teachers_and_rewards(lag: int, tmp_path: Path):
    """Two steps: every metric that was named, of both kinds, and an adapter that moves."""
    config = mixed(lag=lag, **{"run.steps": 3, "run.checkpoint_every": 10, "run.eval_every": 0})
    stage = make_opd(config, tmp_path / "run")
    assert isinstance(stage, MixedOPD)
    with contextlib.closing(stage):
        state, found = stage.start(), []
        before = [np.array(leaf) for leaf in jax.tree.leaves(state.trained)]
        for step in range(2):
            state, metrics = stage.advance(state, step)
            found.append(split({name: float(value) for name, value in metrics.items() if "samples/" not in name})[0])
    assert int(state.step) == 2
    assert [each["lag"] for each in found] == [0, lag]
    assert all(np.isfinite(list(each.values())).all() for each in found)
    assert set(found[0]) == set(plan_opd(mixed()).metrics)
    assert found[0]["ratio"] == 1.0
    assert found[0]["teacher_gap"] > 0
    assert any((old != np.array(new)).any() for old, new in zip(before, jax.tree.leaves(state.trained), strict=True))
