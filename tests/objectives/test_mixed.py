"""The mixed objective at one timestep: PyTorch's gradient, finite differences, and its closed form at ratio 1.

All by the velocity v, on which transitions, gaps and densities depend. Tolerances: 1e-4 on ‖a - b‖/‖b‖ between float32
and PyTorch's float64, 1e-6 of finite differences and closed forms in float64.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.config.schema import Objective
from fopd_jax.flow.rollout import log_density
from fopd_jax.flow.schedule import Level
from fopd_jax.flow.transition import ODE, SDE
from fopd_jax.flow.weighting import weight
from fopd_jax.objectives.opd import Targets, check_objective, timestep_terms

SIZE, SHAPE = 6, (4, 3, 2)
SDE_, MIXED = SDE(0.7), Objective("mixed", teacher_weight=0.8, task_weight=1.5, mar_beta=0.3, clip=0.01)
ADVANTAGE = np.array([1.2, -0.7, 0.0, 2.0, -1.5, 0.3])
SIGMA, NEXT = 0.7, 0.55
ON, OFF = np.zeros(SIZE), np.array([0.005, 0.05, -0.05, 0.05, -0.05, -0.2])  # log ratios: within and beyond the clip


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((SIZE, *SHAPE))


V, X, X_NEXT, TEACHER, ANCHOR = (normal(seed) for seed in range(5))


def level() -> Level:
    return Level(jnp.asarray(SIGMA), jnp.asarray(NEXT), jnp.asarray(True))


def ours(objective: Objective, v: Any, shift: np.ndarray, advantage: np.ndarray = ADVANTAGE) -> Any:
    """Losses of the samples and their sum's gradient; `shift`: of new log-densities from old."""
    x, x_next, teacher, anchor, shift, advantage = (
        jnp.asarray(each, v.dtype) for each in (X, X_NEXT, TEACHER, ANCHOR, shift, advantage)
    )
    old = log_density(SDE_, level(), x, v, x_next) - shift

    def losses(v: Any) -> Any:
        log_prob = log_density(SDE_, level(), x, v, x_next)
        targets = Targets(teacher, anchor)
        return timestep_terms(objective, SDE_, level(), v, targets, x, x_next, log_prob, old, advantage)["loss"]

    return losses(v), jax.grad(lambda v: losses(v).sum())(v)


def by_torch(objective: Objective, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same from the textbook: the density of the Euler-Maruyama step, and KL between transitions."""
    v = torch.tensor(V, requires_grad=True)
    x, x_next, teacher, anchor, advantage = map(torch.tensor, (X, X_NEXT, TEACHER, ANCHOR, ADVANTAGE))
    dt, s = NEXT - SIGMA, 0.7 * np.sqrt(SIGMA / (1 - SIGMA))
    c, std = (1 + s**2 * (1 - SIGMA) / (2 * SIGMA)) * dt, s * np.sqrt(-dt)
    mean = x * (1 + s**2 / (2 * SIGMA) * dt) + c * v
    log_prob = (-((x_next - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)).mean((1, 2, 3))
    w = c**2 / (2 * std**2)
    gap, drift = (w * ((v - each) ** 2).mean((1, 2, 3)) for each in (teacher, anchor))
    reward = -objective.teacher_weight * gap + objective.task_weight * advantage
    ratio = torch.exp(log_prob - log_prob.detach() + torch.tensor(shift))
    limited = torch.clamp(ratio, 1 - objective.clip, 1 + objective.clip)
    losses = -torch.minimum(ratio * reward, limited * reward) + objective.mar_beta * drift
    losses.sum().backward()
    assert v.grad is not None
    return losses.detach().numpy(), v.grad.numpy()


def error(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.float64(found) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shift", [ON, OFF], ids=["on policy", "off policy"])
@pytest.mark.parametrize("weights", [(0.8, 1.5), (0.0, 1.0), (1.0, 0.0)], ids=str)
def test_losses_and_gradients_are_pytorchs(weights: tuple[float, float], shift: np.ndarray):
    objective = dataclasses.replace(MIXED, teacher_weight=weights[0], task_weight=weights[1])
    losses, gradient = ours(objective, jnp.asarray(V, jnp.float32), shift)
    expected, by_v = by_torch(objective, shift)
    assert error(losses, expected) <= 1e-4
    assert error(gradient, by_v) <= 1e-4


@pytest.mark.parametrize("shift", [ON, OFF], ids=["on policy", "off policy"])
def test_gradients_by_finite_differences(shift: np.ndarray):
    """Central differences of the loss, its old densities held, along every sample's own random direction."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        v, direction = jnp.asarray(V), normal(9)
        _, gradient = ours(MIXED, v, shift)
        base = log_density(SDE_, level(), jnp.asarray(X), v, jnp.asarray(X_NEXT))

        def moved(step: float) -> np.ndarray:
            there = v + step * direction
            now = log_density(SDE_, level(), jnp.asarray(X), there, jnp.asarray(X_NEXT))
            return np.asarray(ours(MIXED, there, np.asarray(now - base) + shift)[0])

        numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
        if shift is ON:  # at ratio 1 both sides of the minimum have the same slope
            assert not np.isnan(numeric).any()
        np.testing.assert_allclose((np.asarray(gradient) * direction).sum((1, 2, 3)), numeric, rtol=1e-6, atol=1e-9)


def test_the_closed_form_at_ratio_one():
    """w_T·∇gap - λ·A·∇log π + w_T·gap·∇log π + β·∇drift, the third of mean zero over the drawn action."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        v = jnp.asarray(V)
        _, gradient = ours(MIXED, v, ON)
        sigmas = jnp.asarray(SIGMA), jnp.asarray(NEXT)
        c, std = map(float, SDE_.coefficients(*sigmas)[1:])
        mean = SDE_.moments(jnp.asarray(X), v, *sigmas)[0]
        score = c * (X_NEXT - np.asarray(mean)) / std**2 / np.prod(SHAPE)  # of log π by v
        w = float(weight("kl", SDE_, *sigmas))
        gap = (w * (V - TEACHER) ** 2).mean((1, 2, 3), keepdims=True)
        of_gap, of_drift = (2 * w * (V - each) / np.prod(SHAPE) for each in (TEACHER, ANCHOR))
        advantage = ADVANTAGE[:, None, None, None]
        expected = 0.8 * of_gap - 1.5 * advantage * score + 0.8 * gap * score + 0.3 * of_drift
        assert error(gradient, expected) <= 1e-6


def test_a_samples_advantage_is_its_own():
    """Another sample's moves nothing of it; (B, 1) times (B,) would."""
    v = jnp.asarray(V, jnp.float32)
    one, two = (ours(MIXED, v, OFF, ADVANTAGE + 3 * (np.arange(SIZE) == k))[1] for k in (2, 4))
    differs = (np.asarray(one) != np.asarray(two)).any((1, 2, 3))
    assert np.flatnonzero(differs).tolist() == [2, 4]
    assert one.shape == V.shape


def test_without_an_advantage_it_is_refused():
    x = jnp.zeros((1, *SHAPE))
    with pytest.raises(ValueError, match=r"^objective\.name: found 'mixed', expected another where nothing scores"):
        timestep_terms(MIXED, SDE_, level(), x, Targets(x), x, x, jnp.zeros(1), jnp.zeros(1))


def test_it_needs_a_density():
    with pytest.raises(ValueError, match="'mixed' needs a transition with a density"):
        check_objective(dataclasses.replace(MIXED, weighting="ode"), ODE())
