"""What a step of Flow-GRPO costs and keeps, against counts by hand and against the programs themselves."""

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from fopd_jax.backbones.record import Pass
from fopd_jax.config.learning import Reinforced
from fopd_jax.config.parse import resolve
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.stages import forward_rl_update, grpo_update
from fopd_jax.stages.grpo_update import grpo_programs, rollout_shapes
from fopd_jax.stages.registry import find_stage
from tests.configs import load

LATENT = (64, 64, 16)
FORWARD, BACKWARD = 1.0, 2.0
"""Of a network that trains whole, where a backward costs two forwards."""


@pytest.fixture
def idealised(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A network of which nothing but these costs is known."""
    family = types.SimpleNamespace(
        flops=lambda shape, tokens, lora, remat: Pass(FORWARD, BACKWARD, 0.0), tokens=lambda *_: None
    )
    for module in (grpo_update, forward_rl_update):
        monkeypatch.setattr(module, "family_of", lambda model: family)
    return types.SimpleNamespace(config=None)


def an_image(config: Reinforced, model: Any) -> float:
    """In forwards."""
    update: Any = forward_rl_update if config.stage == "forward_rl" else grpo_update
    spec = update.make_spec(config, LATENT)
    return update.update_cost(config, spec, 205, model).model / config.batch_size


def test_flow_grpo_costs_80_forwards_or_100_with_a_reference_but_for_the_last_step(idealised: Any):
    """Of 10 steps 9 are trained here, and all 10 in the count by hand: 6 forwards' worth, and 2 of the reference."""
    plain, held = (load("sd35m_grpo", "ocr", **{"objective.kl_beta": beta}) for beta in (0.0, 0.04))
    assert an_image(plain, idealised) == 2 * 10 + 2 * 9 * 3 == 80 - 6
    assert an_image(held, idealised) == 2 * 10 + 2 * 9 * 3 + 2 * 9 == 100 - 8
    eleven = load("sd35m_grpo", "ocr", **{"objective.kl_beta": 0.0, "rollouts.num_steps": 11})
    assert an_image(eleven, idealised) - 2 == 80  # 10 trained steps, less the eleventh's forwards


def test_three_steps_without_guidance_cost_19(idealised: Any):
    assert an_image(load("sd35m_fast"), idealised) == 10 + 3 * 3 == 19


def test_the_forward_process_costs_60_and_44(idealised: Any):
    """DiffusionNFT at 9 of 10 levels, each with the old policy and the base beside the update; AWM at 6."""
    assert an_image(load("sd35m_nft"), idealised) == 10 + 9 * (3 + 1 + 1) == 60 - 5
    whole = load("sd35m_nft", **{"levels.times": 10})
    assert an_image(whole, idealised) == 60
    awm = load("sd35m_nft", **{"objective.name": "awm", "levels.times": 6, "rollouts.num_steps": 14})
    assert an_image(awm, idealised) == 14 + 6 * 5 == 44


def test_every_part_is_rolled_out_once_and_trained_on_by_its_own_update(idealised: Any):
    config = load("sd35m_grpo", "ocr", **{"run.micro_batches": 3})
    spec = grpo_update.make_spec(config, LATENT)
    calls = grpo_update.pass_calls(config, spec, 205, idealised)
    assert {kind: each.count for kind, each in calls.items()} == {"draws": 6, "trains": 6}
    part = 1152 // 6
    assert calls["draws"].flops.model == calls["draws"].flops.rollout + calls["draws"].flops.teachers
    assert calls["draws"].flops.rollout == part * 2 * 10 * FORWARD
    assert calls["trains"].flops.model == part * 2 * 9 * (FORWARD + BACKWARD)


def test_an_adapters_backward_is_cheaper_than_two_forwards():
    """At true size: figures of the configs' docstrings, TFLOP an image."""
    found = {}
    for name, variant in (("sd35m_grpo", "ocr"), ("sd35m_fast", ""), ("sd35m_nft", ""), ("sd35m_nft", "multi")):
        config = load(name, *([variant] if variant else []))
        update: Any = forward_rl_update if config.stage == "forward_rl" else grpo_update
        spec = update.make_spec(config, LATENT)
        model = grpo_update.abstract_model(config, make_mesh(config.run.mesh))
        found[name, variant] = update.update_cost(config, spec, 205, model).model / config.batch_size / 1e12
    assert found == pytest.approx(
        {
            ("sd35m_grpo", "ocr"): 171, ("sd35m_fast", ""): 36.8, ("sd35m_nft", ""): 106, ("sd35m_nft", "multi"): 278,
        },
        rel=0.005,
    )  # fmt: skip


# ---- as shapes


@pytest.fixture
def optax_traces() -> Iterator[None]:
    """It raises its betas to an integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("changes", [
    {}, {"objective.kl_beta": 0.0}, {"objective.name": "guard", "window.within": (0, 2), "window.size": 1},
])  # fmt: skip
@pytest.mark.usefixtures("optax_traces")
def test_what_is_kept_of_a_rollout_is_what_a_step_begins_with(changes: dict[str, Any]):
    config = resolve(load("sd35m_grpo", "smoke", **changes))
    mesh = make_mesh(config.run.mesh, jax.devices()[:1])
    programs = {each.name: each for each in grpo_programs(config, mesh)}
    begun = jax.eval_shape(programs["begin"].step, *programs["begin"].arguments)
    told = programs["pass"].arguments[1][1:]
    bare = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), told)
    assert bare == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), begun)
    spec = grpo_update.abstract_update(config, mesh).pieces.spec
    assert jax.tree.map(lambda leaf: leaf.sharding, rollout_shapes(spec, mesh, config.batch_size)) == jax.tree.map(
        lambda leaf: leaf.sharding, told[0]
    )
    drawn, _ = jax.eval_shape(programs["pass"].step, *programs["pass"].arguments)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), drawn[1:]) == bare


@pytest.mark.usefixtures("optax_traces")
@pytest.mark.parametrize("name", ["sd35m_grpo", "sd35m_fast", "sd35m_nft"])
def test_programs_of_a_step_add_up_to_its_cost(name: str):
    """At true size, with encoders in the program's memory; nothing is compiled."""
    config = resolve(load(name, **{"run.encoding.resident": True}))
    mesh = make_mesh(config.run.mesh, jax.devices()[:1])
    programs = find_stage(config).programs(config, mesh)
    assert [each.name for each in programs][-1] == "encode prompts"
    total = sum(each.flops.model for each in programs[:-1])
    update: Any = forward_rl_update if config.stage == "forward_rl" else grpo_update
    spec = update.make_spec(config, LATENT)
    expected = update.update_cost(config, spec, 205, grpo_update.abstract_model(config, mesh))
    assert total == pytest.approx(expected.model)
    assert all(each.sharding is not None for program in programs for each in jax.tree.leaves(program.arguments))
    assert dataclasses.asdict(programs[0].flops)["backward"] > 0
