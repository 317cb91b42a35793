"""Section `health` on the miniature's packaged teachers, good ones and one that noise has spoiled."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.config.parse import assign, resolve
from fopd_jax.config.schema import OPD
from fopd_jax.stages import teachers
from fopd_jax.stages.health import HealthWatch, asked_prompts, surveys, trust, voices_of, watch_health
from fopd_jax.stages.opd import OPDPlan, plan_opd
from fopd_jax.stages.pipeline import load_base
from fopd_jax.stages.setup import null_conditioning
from fopd_jax.steps.opd.spec import Frozen
from tests.configs import load

SPOILED = 4.0
"""Of the factors' own size; what leaves a tenth of the text teacher's score and nothing of the composition one's."""


def configured(**changes: Any) -> OPD:
    config = load("miniature")
    assign(config, {"health.fixed_states": 2, "sampler.num_steps": 4, **changes})
    return resolve(config)


@pytest.fixture(scope="module")
def plan() -> OPDPlan:
    return plan_opd(configured())


@pytest.fixture(scope="module")
def noisy(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/noisy_adapter.py")


def watch(plan: OPDPlan, config: OPD, spoil: Callable[[str, Any], Any] = lambda name, adapter: adapter) -> HealthWatch:
    """Of a run by that config, whose adapters are changed before."""
    pipeline = plan.setup.pipeline
    adapters = teachers.load_adapters(config, pipeline, teachers.sources(config), {})
    adapters = {name: spoil(name, adapter) for name, adapter in adapters.items()}
    bank = teachers.make_bank(config, pipeline, {name: adapters[name] for name in config.tasks}, adapters["quality"])
    frozen = Frozen(load_base(config.model, pipeline), bank, null_conditioning(pipeline))
    found = watch_health(config, plan.update.pieces, pipeline, frozen)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def good(plan: OPDPlan) -> HealthWatch:
    return watch(plan, configured())


def test_the_packaged_teachers_are_within_their_bands(good: HealthWatch) -> None:
    assert good.named == {}
    assert set(good.statistics) == {"text", "composition", "quality"}
    for name, (low, high) in configured().health.bands.items():
        for voice, known in good.statistics.items():
            if (voice, name) != ("quality", "anchor"):
                assert low <= known[name] <= 0.75 * high, (voice, name)


def test_the_names_of_what_is_measured(good: HealthWatch, plan: OPDPlan) -> None:
    config = configured()
    assert voices_of(config) == ("composition", "text", "quality")
    assert {name for name in good.disagreement if name.endswith("/base")} == {
        f"disagreement/{name}/base" for name in voices_of(config)
    }
    prompts = asked_prompts(config, plan.setup.pipeline.world)
    assert len(prompts) == 4 == len(set(prompts))
    assert trust(config, good, plan.setup.pipeline) is None


@pytest.mark.parametrize("name", ["text", pytest.param("composition", marks=pytest.mark.slow)])
def test_a_teacher_that_noise_has_spoiled_is_named_alone(
    name: str, plan: OPDPlan, noisy: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(**{"health.noisy": "weigh", "health.weight": 0.25})
    found = watch(plan, config, lambda each, adapter: noisy.noisy(adapter, SPOILED, 0) if each == name else adapter)
    assert set(found.named) == {name}
    lines = [line for line in capsys.readouterr().err.splitlines() if "may be noisy" in line]
    assert len(lines) == 1
    assert f"tasks.{name}.teacher: {name} may be noisy (" in lines[0]
    assert "its part of the loss counts 0.25" in lines[0]
    counts = trust(config, found, plan.setup.pipeline)
    assert dict(zip(config.tasks, np.asarray(counts).tolist(), strict=True)) == {
        each: 0.25 if each == name else 1.0 for each in config.tasks
    }


def test_who_is_the_teacher_has_no_gap(good: HealthWatch, plan: OPDPlan) -> None:
    """A student that is a teacher, at that task's states; and a picture of it."""
    config, pipeline = configured(), plan.setup.pipeline
    adapters = teachers.load_adapters(config, pipeline, teachers.sources(config), {})
    bank = teachers.make_bank(config, pipeline, {name: adapters[name] for name in config.tasks}, adapters["quality"])
    frozen = Frozen(load_base(config.model, pipeline), bank, null_conditioning(pipeline))
    found = good.measure(frozen, jax.tree.map(jax.numpy.asarray, adapters["text"]))
    assert found["fixed/text/teacher"] < 1e-8
    assert found["fixed/text/data"] < 1e-8
    assert found["fixed/composition/teacher"] > 1e-3
    assert found["fixed/composition/data/low"] > 1e-3
    assert found["disagreement/composition/text"] > 1e-3
    assert good.picture().size[0] > 400
    assert np.isfinite(list(found.values())).all()


def test_weighing_needs_states() -> None:
    with pytest.raises(ValueError, match=r"^health\.fixed_states: found 0, expected at least 1 where health\.noisy is"):
        plan_opd(configured(**{"health.fixed_states": 0, "health.noisy": "weigh"}))
    off = plan_opd(config := configured(**{"health.fixed_states": 0}))
    assert asked_prompts(config, off.setup.pipeline.world) == []
    assert not surveys(config)
    assert not surveys(configured(**{"health.noisy": "off", "run.eval_every": 0}))
