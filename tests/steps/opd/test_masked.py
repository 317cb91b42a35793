"""Flow-DPPO's mask in every form of the update: against PyTorch's gradients, and one form against another.

PyTorch's side is float64 and written from the formulas; it shares trajectory and weights. Tolerances on ‖a - b‖/‖b‖:
1e-4 against PyTorch, 1e-5 between two programs.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.config.schema import EMA, Objective
from fopd_jax.objectives.opd import needs_old_velocity
from fopd_jax.steps.opd import mixed
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.replay import collect, loss_and_gradient, replay, replayed_gradients
from fopd_jax.steps.visits import Stored
from fopd_jax.worlds.prompt_stream import Batch
from tests.steps.opd.matching import FOLDED
from tests.steps.opd.network import (
    BANK,
    CLIPPED,
    GUIDED,
    SGD,
    SIGMAS,
    STUDENT,
    TOLERANCE,
    check,
    frozen_of,
    fused,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    normal,
    prompts,
    quick,
    relative_error,
)
from tests.steps.opd.test_mixed import credit_of, drive
from tests.steps.opd.torch_network import Factors, to_torch, torch_factors, torch_velocity

SIZE = 6
MASKED = dataclasses.replace(CLIPPED, surrogate="dppo", divergence=3e-4)
CASES = {
    "attached": (MASKED, 0.02),
    "attached, on policy": (MASKED, 0.0),
    "policy gradient": (dataclasses.replace(MASKED, reward="log_ratio"), 0.02),
    "folded": (dataclasses.replace(MASKED, match="conditional", weighting="uniform"), 0.02),
}


def batch_of() -> Batch:
    return jax.tree.map(jnp.asarray, make_batch(SIZE))


def moved(distance: float) -> Any:
    return jax.tree.map(lambda leaf: leaf + distance * normal(leaf.size, *leaf.shape), STUDENT)


def mean_square(difference: torch.Tensor) -> torch.Tensor:
    return (difference**2).mean((1, 2, 3))


def torch_step(objective: Objective, stored: Stored, t: int, new: Factors, old: Factors) -> torch.Tensor:
    """Loss of one timestep by sample: Euler-Maruyama at noise level .7, densities as means per dimension."""
    sigma, after = float(SIGMAS[t]), float(SIGMAS[t + 1])
    s, dt = 0.7 * (sigma / (1 - (after if sigma == 1 else sigma))) ** 0.5, after - sigma
    c, std = (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt, s * (-dt) ** 0.5
    x, text = stored.x[t], prompts(1, SIZE)
    scale = (FOLDED if objective.match == "conditional" else GUIDED)[0]
    v, v_old = torch_velocity(new, x, sigma, text, scale), torch_velocity(old, x, sigma, text, scale).detach()
    teachers = [torch_factors(each.weights) for each in BANK.values()]
    asked = [torch_velocity(each, x, sigma, text, g) for each, g in zip(teachers, GUIDED[1], strict=True)]
    route = make_batch(SIZE).route
    teacher = torch.stack([asked[route[i]][i] for i in range(SIZE)])
    noise = (to_torch(stored.x_next[t]) - to_torch(x) * (1 + s**2 / (2 * sigma) * dt)) / std
    log_prob, log_old, log_teacher = (-mean_square(noise - c * each / std) / 2 for each in (v, v_old, teacher))
    own = torch_velocity(new, x, sigma, text) if objective.match == "conditional" else v
    w = c**2 / (2 * std**2) if objective.weighting == "kl" else 1.0
    detached = (log_teacher - log_prob).detach().clamp(-5, 5)
    reward = detached if objective.reward == "log_ratio" else -w * mean_square(own - teacher)
    ratio = (log_prob - log_old).exp()
    far = c**2 * mean_square(v - v_old).detach() / (2 * std**2) >= objective.divergence
    dropped = far & (((ratio > 1) & (reward > 0)) | ((ratio < 1) & (reward < 0)))
    return -(ratio * reward * ~dropped) + objective.mar_beta * w * mean_square(own - asked[2])


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_pytorchs(case: str) -> None:
    objective, distance = CASES[case]
    guidance = FOLDED if objective.match == "conditional" else GUIDED
    pieces, there = make_pieces(make_spec(objective, guidance=guidance)), moved(distance)
    stored = quick(collect, pieces)(frozen_of(BANK), make_state(), batch_of())
    loss, gradient, totals = quick(loss_and_gradient, pieces)(frozen_of(BANK), there, batch_of(), stored)
    new, old = torch_factors(there.weights, True), torch_factors(STUDENT.weights)
    total = torch.stack([torch_step(objective, stored, t, new, old) for t in range(len(SIGMAS) - 2)]).mean()
    expected = torch.autograd.grad(total, list(new.values()))
    by_torch = dict(zip(new, expected, strict=True))
    order = [by_torch[layer, factor].numpy() for layer, factor in itertools.product(("down", "up"), ("a", "b"))]
    error, share = relative_error(jax.tree.leaves(gradient), order), float(totals["clipped"].mean()) / 4
    print(f"{case}: gradient {error:.1e}, left out {share:.2f}")
    assert error <= 1e-4
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-4)
    assert 0.1 < share < 0.9 if distance else share == 0


def test_of_one_update_a_rollout_the_mask_is_all_ones() -> None:
    """At ratio 1 clip and mask have one gradient, whatever the threshold."""
    never = make_pieces(make_spec(dataclasses.replace(MASKED, divergence=0.0)))
    found, totals = quick(fused_gradients, never)(frozen_of(BANK), make_state(), make_batch())
    expected, sums = fused(CLIPPED.name)(frozen_of(BANK), make_state(), make_batch())
    check(found, expected)
    assert not totals["clipped"].any()
    np.testing.assert_allclose(totals["loss"], sums["loss"], rtol=TOLERANCE)


def test_several_updates_are_plain_ones_with_the_first_ones_velocities() -> None:
    """The whole batch three times: on policy, then ever further from the policy that drew. Against its parts in a loop,
    and as `mixed` without a task's reward."""
    objective = dataclasses.replace(MASKED, divergence=1e-6)
    pieces = make_pieces(make_spec(objective, updates_per_rollout=3))
    frozen, batch, state = frozen_of(BANK), batch_of(), make_state()
    stored = quick(collect, pieces)(frozen, state, batch)
    gradients_of, student, shares = quick(replayed_gradients, pieces), state.trained, []
    for _ in range(3):
        gradients, totals = gradients_of(frozen, student, batch, stored)
        student = jax.tree.map(lambda x, g: x - 0.1 * g, student, gradients)
        shares.append(float(totals["clipped"].mean()) / 4)
    after, metrics = quick(replay, pieces, SGD, EMA())(frozen, state, batch)
    expected = jax.tree.map(jnp.subtract, student, state.trained)
    check(jax.tree.map(jnp.subtract, after.trained, state.trained), expected)
    assert float(metrics["clipped"]) == pytest.approx(np.mean(shares), abs=1e-6)
    assert shares[0] == 0 < shares[1]
    both = make_pieces(make_spec(dataclasses.replace(objective, name="mixed"), updates_per_rollout=3))
    programs = mixed.make_programs(both, SGD, EMA())
    there, *_ = drive(programs, both.spec, frozen, make_state(), batch, credit_of(np.zeros(SIZE, np.float32)))
    check(jax.tree.map(jnp.subtract, there.trained, make_state().trained), expected)


def test_velocities_are_kept_where_they_are_compared_alone() -> None:
    assert [needs_old_velocity(each) for each in (MASKED, CLIPPED, dataclasses.replace(MASKED, name="direct"))] == [
        True, False, False,
    ]  # fmt: skip
    pieces = make_pieces(make_spec(MASKED))
    shapes = jax.eval_shape(lambda *each: collect(pieces, *each), frozen_of(BANK), make_state(), batch_of())
    assert shapes.velocity.shape == shapes.x.shape
    bare = dataclasses.replace(shapes, velocity=None)
    with pytest.raises(ValueError, match=r"^stored\.velocity: found None, expected velocities: surrogate 'dppo'"):
        loss_and_gradient(pieces, frozen_of(BANK), STUDENT, batch_of(), bare)
