"""Stage `forward_rl` from its config: what it costs, what it keeps, which programs it compiles."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fopd_jax.backbones.registry import find_preset
from fopd_jax.config.learning import (
    GRPO,
    ForwardObjective,
    ForwardRL,
    OldDecay,
    RewardedTask,
    Rollouts,
    TrainedLevels,
)
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import MeshShape, Model
from fopd_jax.config.variants import smoke
from fopd_jax.flow.solver import DPM2
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.stages.abstract import abstract_model, world_shapes
from fopd_jax.stages.forward_rl_update import forward_rl_programs, make_spec, update_cost
from fopd_jax.stages.grpo_update import make_spec as make_grpo_spec
from fopd_jax.stages.plan import trained_parts


def mesh() -> Any:
    return make_mesh(MeshShape(), jax.devices()[:1])


def config(**fields: Any) -> ForwardRL:
    tasks = {"text": RewardedTask(rewards={"text": 1.0})}
    return dataclasses.replace(ForwardRL(name="any", tasks=tasks, model=Model(preset="sd35_medium")), **fields)


ALL, SIX = TrainedLevels(times=10, within=(0, 10)), TrainedLevels(times=6, within=(1, 12))
COSTS = {  # forwards of one network an image, a backward being two of them
    "diffusion_nft": (config(levels=ALL), 60.0),
    "diffusion_nft without the base, on policy": (
        config(levels=ALL, objective=ForwardObjective(kl_beta=0.0), old=OldDecay(limit=0.0)), 40.0,
    ),
    "awm": (
        config(levels=SIX, rollouts=Rollouts(num_steps=14, transition="dpm2"), objective=ForwardObjective("awm")), 44.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTS)
def test_what_a_step_costs(name: str) -> None:
    """The count that the methods are compared by, on the true network: LoRA's own FLOPs and the backward's saving of
    frozen kernels' gradients are what it leaves out."""
    settings, forwards = COSTS[name]
    settings = resolve(settings)
    model, (latent, encoded) = abstract_model(settings, mesh()), world_shapes(settings.model)
    cost = update_cost(settings, make_spec(settings, latent), encoded.context.shape[0], model)
    family, shape = find_preset(settings.model.preset)
    one = family.flops(shape, family.tokens(shape, latent, encoded.context.shape[0]), None, settings.run.remat)
    images, trained = settings.batch_size, cost.forward / one.forward
    counted = (cost.rollout + cost.teachers + 3 * cost.forward) / one.forward / images
    assert counted == pytest.approx(forwards, rel=0.03)
    assert trained / images == pytest.approx(settings.levels.times, rel=0.03)


def test_an_old_copy_is_kept_where_it_is_another() -> None:
    assert config().keeps_old
    assert config(old=OldDecay(start=0.1, slope=0.0)).keeps_old
    assert not config(old=OldDecay(slope=0.0)).keeps_old
    assert not config(old=OldDecay(limit=0.0)).keeps_old
    assert config(old=OldDecay(slope=0.0), updates_per_rollout=2).keeps_old  # the second update has moved on


@pytest.mark.parametrize("keeps_old", [True, False])
def test_programs_are_shapes_alone(keeps_old: bool) -> None:
    """Both lower, and the update leaves the state in its places."""
    settings = smoke(config(old=OldDecay(slope=0.001 if keeps_old else 0.0)))
    update, rollout = forward_rl_programs(settings, mesh())
    assert (update.name, rollout.name) == ("update", "rollout")
    assert update.flops.rollout == 0 < update.flops.backward
    assert rollout.flops.forward == 0 < rollout.flops.rollout
    latents = jax.eval_shape(rollout.step, *rollout.arguments)
    assert (latents.shape, latents.dtype) == (update.arguments[2].shape, jnp.float32)
    state, _ = jax.eval_shape(update.step, *update.arguments)
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, update.arguments[1])
    assert ("old copy" in trained_parts(state)) == keeps_old


def test_the_solver_is_of_this_stage_alone() -> None:
    settings = override(config(), {"rollouts.transition": "dpm2"})
    assert make_spec(settings, (8, 8, 4)).solver == DPM2()
    with pytest.raises(ValueError, match=r"^rollouts.transition: found 'dpm2', expected one of sde, cps, ode"):
        make_grpo_spec(override(GRPO(name="any"), {"rollouts.transition": "dpm2"}), (8, 8, 4))
