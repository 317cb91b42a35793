"""What of the student is compared with what, at one timestep, by its two branches v_c and v_n.

PyTorch's gradients by both branches, float32 against float64 at 1e-4 of ‖a - b‖/‖b‖; closed forms and finite
differences in float64, at 1e-6, where the divisor of normalised distances is a constant.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.config.schema import Objective
from fopd_jax.config.teaching import MATCHES, OBJECTIVES, WEIGHTINGS
from fopd_jax.flow.rollout import log_density
from fopd_jax.flow.schedule import Level
from fopd_jax.flow.transition import CPS, ODE, SDE, Transition
from fopd_jax.objectives.opd import LEAST_GAP, Targets, compared, counted, direct_terms, timestep_terms
from fopd_jax.policy.guidance import guided

SIZE, SHAPE, DIMS = 5, (4, 3, 2), 24
SIGMA, NEXT, SCALE = 0.7, 0.55, 2.5  # the student's own
SDE_ = SDE(0.7)
LOG_RATIOS = np.array([0.005, 0.05, -0.05, 0.05, -0.2])  # within and beyond the clip of .01
ADVANTAGE = np.array([1.2, -0.7, 0.0, 2.0, -1.5])


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((SIZE, *SHAPE))


TEXT, NULL, X, X_NEXT, TEACHER, ANCHOR, TEACHER_APART, ANCHOR_APART = (normal(seed) for seed in range(8))


def level(dtype: Any = jnp.float32) -> Level:
    return Level(jnp.asarray(SIGMA, dtype), jnp.asarray(NEXT, dtype), jnp.asarray(True))


def targets_of(match: str, dtype: Any) -> Targets:
    teacher, anchor, *apart = (jnp.asarray(x, dtype) for x in (TEACHER, ANCHOR, TEACHER_APART, ANCHOR_APART))
    return Targets(teacher, anchor, None, *(apart if match == "branches" else ()))


def own_of(match: str, text: Any, null: Any) -> Any:
    return guided(text, null, SCALE) if match == "guided" else compared(match, text, null)


# ---- PyTorch


def ours(objective: Objective) -> tuple[np.ndarray, list[np.ndarray]]:
    """Losses of the samples, and their sum's gradient by both branches."""
    text, null, x, x_next, shift, advantage = (
        jnp.asarray(each, jnp.float32) for each in (TEXT, NULL, X, X_NEXT, LOG_RATIOS, ADVANTAGE)
    )
    old = log_density(SDE_, level(), x, guided(text, null, SCALE), x_next) - shift

    def losses(text: Any, null: Any) -> Any:
        log_prob = log_density(SDE_, level(), x, guided(text, null, SCALE), x_next)
        own, targets = own_of(objective.match, text, null), targets_of(objective.match, jnp.float32)
        found = timestep_terms(objective, SDE_, level(), own, targets, x, x_next, log_prob, old, advantage)["loss"]
        return found.sum(), found

    gradients, found = jax.grad(losses, argnums=(0, 1), has_aux=True)(text, null)
    return np.asarray(found), [np.asarray(each) for each in gradients]


def by_torch(objective: Objective) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same from the textbook: the density of the Euler-Maruyama step under guided velocities, and its surrogate."""
    text, null = (torch.tensor(each, requires_grad=True) for each in (TEXT, NULL))
    teacher, anchor, x, x_next = map(torch.tensor, (TEACHER, ANCHOR, X, X_NEXT))
    v = null + SCALE * (text - null)
    dt, s = NEXT - SIGMA, 0.7 * np.sqrt(SIGMA / (1 - SIGMA))
    c, variance = (1 + s**2 * (1 - SIGMA) / (2 * SIGMA)) * dt, -(s**2) * dt
    kl = c**2 / (2 * variance)
    w = {"kl": kl, "kl_no_dt": -dt * kl, "ode": dt**2 / 2, "uniform": 1.0, "x0": SIGMA**2, "x_next": c**2}

    def gap(target: torch.Tensor, apart: np.ndarray) -> torch.Tensor:
        square = (((v if objective.match == "guided" else text) - target) ** 2).mean((1, 2, 3))
        if objective.match == "branches":
            square = square + objective.branch_weight * ((text - null - torch.tensor(apart)) ** 2).mean((1, 2, 3))
        by = w[objective.weighting]
        return np.sqrt(by) * square / (square.detach().sqrt() + 1e-6) if objective.normalise else by * square

    distilled, drift = gap(teacher, TEACHER_APART), gap(anchor, ANCHOR_APART)
    losses = distilled
    if objective.name != "direct":
        mean = x * (1 + s**2 / (2 * SIGMA) * dt) + c * v
        log_prob = torch.distributions.Normal(mean, np.sqrt(variance)).log_prob(x_next).mean((1, 2, 3))
        ratio = torch.exp(log_prob - log_prob.detach() + torch.tensor(LOG_RATIOS))
        reward = -distilled
        if objective.name == "mixed":
            reward = objective.teacher_weight * reward + objective.task_weight * torch.tensor(ADVANTAGE)
        limited = torch.clamp(ratio, 1 - objective.clip, 1 + objective.clip)
        losses = -torch.minimum(ratio * reward, limited * reward)
    losses = losses + objective.mar_beta * drift
    gradients = torch.autograd.grad(losses.sum(), [text, null], materialize_grads=True)
    return losses.detach().numpy(), [each.numpy() for each in gradients]


def error(found: Any, expected: Any) -> float:
    found, expected = (np.concatenate([np.float64(each).ravel() for each in tree]) for tree in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("normalise", [False, True], ids=["squared", "normalised"])
@pytest.mark.parametrize("match", MATCHES)
def test_losses_and_gradients_are_pytorchs(match: str, normalise: bool) -> None:
    """Under every objective and weighting, off policy where there is a ratio."""
    for name, weighting in itertools.product(OBJECTIVES, WEIGHTINGS):
        objective = Objective(
            name, weighting=weighting, match=match, normalise=normalise, branch_weight=0.6, mar_beta=0.3, clip=0.01,
            teacher_weight=0.8, task_weight=1.5,
        )  # fmt: skip
        (losses, gradients), (expected, by_branch) = ours(objective), by_torch(objective)
        assert error([losses], [expected]) <= 1e-4, (name, weighting)
        assert error(gradients, by_branch) <= 1e-4, (name, weighting)


# ---- closed forms, of a velocity linear in its parameters

PARAMETERS = 3
MATRICES = np.random.default_rng(11).standard_normal((2, *SHAPE, PARAMETERS))  # of v_c and of v_n
THETA = np.random.default_rng(12).standard_normal((SIZE, PARAMETERS))


def linear(objective: Objective, theta: Any) -> Any:
    """The direct terms of v_c = M_c·θ and v_n = M_n·θ, each sample having parameters of its own."""
    text, null = (jnp.einsum("hwcp,bp->bhwc", jnp.asarray(each), theta) for each in MATRICES)
    w = jnp.broadcast_to(counted(objective, SDE_, jnp.asarray(SIGMA), jnp.asarray(NEXT)), (SIZE,))
    return direct_terms(objective, own_of(objective.match, text, null), targets_of(objective.match, jnp.float64), w)


def by_hand(objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    """Teacher's squared distances S and their gradients by θ, 2/D·Σ M^T·δ over what is compared; both before w."""
    of_text, of_null = MATRICES.reshape(2, DIMS, PARAMETERS)
    compared_by = {
        "guided": [(1.0, of_null + SCALE * (of_text - of_null), TEACHER)],
        "conditional": [(1.0, of_text, TEACHER)],
        "branches": [(1.0, of_text, TEACHER), (objective.branch_weight, of_text - of_null, TEACHER_APART)],
    }[objective.match]
    squares, slopes = np.zeros(SIZE), np.zeros((SIZE, PARAMETERS))
    for factor, matrix, target in compared_by:
        delta = THETA @ matrix.T - target.reshape(SIZE, DIMS)
        squares, slopes = squares + factor * (delta**2).mean(1), slopes + factor * 2 / DIMS * delta @ matrix
    return squares, slopes


@pytest.mark.parametrize("normalise", [False, True], ids=["squared", "normalised"])
@pytest.mark.parametrize("match", MATCHES)
def test_closed_forms_and_finite_differences(match: str, normalise: bool) -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for weighting in ("uniform", "x0", "x_next"):
            objective = Objective("direct", weighting=weighting, match=match, normalise=normalise, branch_weight=0.6)
            theta = jnp.asarray(THETA)
            gap, gradient = (
                linear(objective, theta)["teacher_gap"],
                jax.grad(lambda t, o=objective: linear(o, t)["teacher_gap"].sum())(theta),
            )
            square, slope = by_hand(objective)
            c = float(SDE_.velocity_coefficient(SIGMA, NEXT))
            root = {"uniform": 1.0, "x0": SIGMA, "x_next": abs(c)}[weighting]
            divisor = np.sqrt(square) + LEAST_GAP
            factor = root / divisor if normalise else np.full(SIZE, root**2)
            np.testing.assert_allclose(gap, factor * square, rtol=1e-6)
            np.testing.assert_allclose(gradient, factor[:, None] * slope, rtol=1e-6, atol=1e-9)

            squared = dataclasses.replace(objective, normalise=False, weighting="uniform")
            for k in range(PARAMETERS):  # of the squared distance, its divisor held
                step = 1e-5 * np.eye(PARAMETERS)[k]
                up, down = (linear(squared, jnp.asarray(THETA + sign * step))["teacher_gap"] for sign in (1, -1))
                np.testing.assert_allclose(gradient[:, k], factor * np.asarray(up - down) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("match", MATCHES)
def test_normalised_gaps_pull_alike(match: str) -> None:
    """The gradient by what is compared has the length 2·√(w/D), of a wide gap and of one 10,000 times narrower."""
    objective = Objective("direct", weighting="x0", match=match, normalise=True, mar_beta=0.0)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        widths = np.array([1.0, 1e-2, 10.0, 1e-3, 0.3])[:, None, None, None]
        v, apart = TEACHER + widths * normal(21), TEACHER_APART + widths * normal(22)
        w = jnp.full((SIZE,), counted(objective, SDE_, jnp.asarray(SIGMA), jnp.asarray(NEXT)))

        def loss(v: Any, apart: Any) -> Any:
            own = compared("branches", v, v - apart) if match == "branches" else v
            return direct_terms(objective, own, targets_of(match, jnp.float64), w)["loss"].sum()

        gradients = jax.grad(loss, argnums=(0, 1))(jnp.asarray(v), jnp.asarray(apart))
        square = sum(np.square(np.asarray(each)).sum((1, 2, 3)) for each in gradients)
        np.testing.assert_allclose(np.sqrt(square), 2 * SIGMA / np.sqrt(DIMS), rtol=2e-3)  # ε of 1e-6 on gaps of 1e-3


@pytest.mark.parametrize("match", MATCHES)
def test_where_nothing_differs_a_normalised_loss_and_its_gradient_are_zero(match: str) -> None:
    """Some samples are at their targets, in both terms, others not."""
    objective = Objective("direct", weighting="uniform", match=match, normalise=True, mar_beta=0.5)
    there = np.array([0, 0, 1, 1, 0], bool)[:, None, None, None]
    targets = targets_of(match, jnp.float32)
    targets = dataclasses.replace(targets, anchor=targets.teacher, anchor_difference=targets.teacher_difference)
    text = jnp.where(there, targets.teacher, jnp.asarray(TEXT, jnp.float32))
    apart = jnp.where(there, jnp.asarray(TEACHER_APART, jnp.float32), jnp.asarray(NULL, jnp.float32))

    def loss(text: Any, apart: Any) -> Any:
        own = text if match == "guided" else dataclasses.replace(compared(match, text, text), velocity=text)
        own = dataclasses.replace(own, difference=apart) if match == "branches" else own
        found = direct_terms(objective, own, targets, jnp.ones(SIZE))["loss"]
        return found.sum(), found

    gradients, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(text, apart)
    at = there[:, 0, 0, 0]
    assert np.isfinite(found).all()
    assert (np.asarray(found) == 0).tolist() == at.tolist()
    for each in gradients[: 2 if match == "branches" else 1]:
        assert np.isfinite(each).all()
        assert (np.abs(each).sum((1, 2, 3)) == 0).tolist() == at.tolist()


def test_an_anchor_of_few_samples_counts_linearly_where_distances_are_normalised() -> None:
    objective = Objective("direct", weighting="x0", normalise=True, mar_beta=0.5)
    targets, w = targets_of("guided", jnp.float32), jnp.ones(SIZE)
    v, often = jnp.asarray(TEXT, jnp.float32), jnp.asarray([3.0, 0.0, 0.0, 1.0, 2.0])
    once = direct_terms(objective, v, targets, w)["anchor_gap"]
    found = direct_terms(objective, v, dataclasses.replace(targets, anchored=often), w)["anchor_gap"]
    np.testing.assert_allclose(found, often * once, rtol=1e-6)


@pytest.mark.parametrize("transition", [SDE_, CPS(0.7), ODE()], ids=["sde", "cps", "ode"])
def test_a_normalised_distance_is_divided_in_the_weightings_own_space(transition: Transition) -> None:
    """√w·(v - v_k) are clean latents' and next states' differences: their mean square by their root mean square."""
    own, other, x = (jnp.asarray(each, jnp.float32) for each in (TEXT, TEACHER, X))
    spaces = {
        "x0": (x - SIGMA * own, x - SIGMA * other),
        "x_next": tuple(transition.moments(x, each, SIGMA, NEXT)[0] for each in (own, other)),
        "uniform": (own, other),
    }
    for weighting, pair in spaces.items():
        objective = Objective("direct", weighting=weighting, normalise=True, mar_beta=0.0)
        w = jnp.full((SIZE,), counted(objective, transition, jnp.float32(SIGMA), jnp.float32(NEXT)))
        found = direct_terms(objective, own, Targets(other), w)["loss"]
        square = np.square(np.float64(pair[0]) - np.float64(pair[1])).mean((1, 2, 3))
        np.testing.assert_allclose(found, square / np.sqrt(square), rtol=1e-4)


# ---- what guided velocities hide


@pytest.mark.parametrize("seed", range(20))
def test_the_guided_gap_is_bounded_by_those_of_the_branches(seed: int) -> None:
    """Root mean squares: |v - v_k| ≤ |δ_c| + |g - 1|·|δ_d| at any scale g, with δ of the branches' loss."""
    rng = np.random.default_rng(seed)
    text, null, text_k, null_k = rng.standard_normal((4, SIZE, *SHAPE)) * rng.uniform(0.01, 3, (4, 1, 1, 1, 1))
    scale = float(rng.uniform(0, 8))
    gap = np.sqrt(np.square(np.asarray(_guided(text, null, scale) - _guided(text_k, null_k, scale))).mean((1, 2, 3)))
    of_text, of_difference = (
        np.sqrt(np.square(each).mean((1, 2, 3))) for each in (text - text_k, (text - null) - (text_k - null_k))
    )
    assert (gap <= of_text + abs(scale - 1) * of_difference + 1e-9).all()
    a = float(rng.uniform(0.1, 3))  # and so by the loss itself, by Cauchy and Schwarz
    objective = Objective("direct", weighting="uniform", match="branches", branch_weight=a, mar_beta=0.0)
    narrow = [jnp.asarray(each, jnp.float32) for each in (text, null, text_k, text_k - null_k)]
    targets = Targets(narrow[2], teacher_difference=narrow[3])
    loss = direct_terms(objective, compared("branches", *narrow[:2]), targets, jnp.ones(SIZE))["loss"]
    assert (gap**2 <= (1 + (scale - 1) ** 2 / a) * np.asarray(loss) * (1 + 1e-5)).all()


def _guided(text: np.ndarray, null: np.ndarray, scale: float) -> np.ndarray:
    return null + scale * (text - null)


def test_errors_of_the_branches_that_cancel_are_seen_by_them_alone() -> None:
    """PDM's example: the null branch is wrong by e, the prompt's by e·(g - 1)/g. At the scale g of the training nothing
    is wrong, at another it is; only the branches' loss has a gradient, and it leads back.
    """
    e = normal(31)
    text, null = (jnp.asarray(each, jnp.float32) for each in (TEXT + e * (SCALE - 1) / SCALE, NULL + e))
    right_text, right_null = (jnp.asarray(each, jnp.float32) for each in (TEXT, NULL))

    def loss(branches: Any, match: str) -> Any:
        objective = Objective("direct", weighting="uniform", match=match, mar_beta=0.0)
        target = guided(right_text, right_null, SCALE) if match == "guided" else right_text
        targets = Targets(target, teacher_difference=right_text - right_null)
        return direct_terms(objective, own_of(match, *branches), targets, jnp.ones(SIZE))["loss"].sum()

    unseen, none = jax.value_and_grad(loss)((text, null), "guided")
    seen, gradient = jax.value_and_grad(loss)((text, null), "branches")
    assert float(unseen) < 1e-10
    assert max(float(jnp.abs(each).max()) for each in none) < 1e-6
    share = (SCALE - 1) / SCALE
    np.testing.assert_allclose(seen, (share**2 + (share - 1) ** 2) * np.square(e).mean((1, 2, 3)).sum(), rtol=1e-5)
    moved = jax.tree.map(lambda v, g: v - 0.1 * DIMS * g, (text, null), gradient)
    assert float(loss(moved, "branches")) < 0.9 * float(seen)
    elsewhere = np.asarray(guided(text, null, 1.0) - guided(right_text, right_null, 1.0))
    np.testing.assert_allclose(elsewhere, share * e, rtol=1e-4, atol=1e-5)
