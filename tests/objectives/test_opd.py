"""The OPD objective: closed forms at 1e-6, refusals by their message, and its mean gradients.

The statistical part fixes a state and a velocity linear in its parameters, v = Mθ. Then a drawn action's gradient is a
polynomial of its noise, whose mean and covariance are known, and the mean over N draws is tested as one vector:
N·(mean - expected)ᵀ·Cov⁻¹·(mean - expected) is chi-squared. Significance 1e-6 per test; the power is shown beside it.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fopd_jax.config.schema import Objective
from fopd_jax.config.teaching import OBJECTIVES, REWARDS, WEIGHTINGS
from fopd_jax.flow.rollout import sample_keys
from fopd_jax.flow.transition import CPS, ODE, SDE, Transition, transition_step
from fopd_jax.flow.weighting import DISTANCES, weight
from fopd_jax.objectives.opd import check_objective, distillation_loss, divergence, surrogate, trains

RTOL = 1e-6
ALLOWED = (  # every combination that is defined: (objective, reward, weighting, transition)
    *(("direct", "kl", weighting, SDE(0.7)) for weighting in WEIGHTINGS),
    *(("direct", "kl", weighting, kind) for weighting in DISTANCES for kind in (CPS(0.7), ODE())),
    *(("clipped", r, w, SDE(0.7)) for r in ("kl", "kl_detached") for w in WEIGHTINGS),
    *(("clipped", r, w, CPS(0.7)) for r in ("kl", "kl_detached") for w in DISTANCES),
    ("clipped", "log_ratio", "kl", SDE(0.7)),
    *(("mixed", r, "kl", SDE(0.7)) for r in ("kl", "log_ratio", "kl_detached")),
    ("mixed", "kl", "uniform", CPS(0.7)),
)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def samples(*values: float) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


# ---- closed forms


def test_divergence_is_the_weighted_mean_square_of_each_sample() -> None:
    v, target = normal(0, 3, 4, 5, 2), normal(1, 3, 4, 5, 2)
    found = divergence(v, target, jnp.float32(0.3))
    expected = [0.3 * np.mean((a - b) ** 2) for a, b in zip(np.float64(v), np.float64(target), strict=True)]
    assert found.shape == (3,)
    np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_divergence_pulls_the_velocity_alone() -> None:
    v, target = normal(0, 3, 4, 5, 2), normal(1, 3, 4, 5, 2)
    of_v, of_target = jax.grad(lambda v, t: divergence(v, t, jnp.float32(0.3)).sum(), argnums=(0, 1))(v, target)
    np.testing.assert_allclose(of_v, 2 * 0.3 * (np.float64(v) - np.float64(target)) / 40, rtol=1e-5, atol=1e-8)
    assert not of_target.any()


SURROGATE = {  # ratio, reward → loss, d loss / d log_prob, d loss / d reward; clip range 0.2
    "on policy, reward": (1.0, 2.0, -2.0, -2.0, -1.0),
    "on policy, penalty": (1.0, -2.0, 2.0, 2.0, -1.0),
    "inside, reward": (1.1, 2.0, -2.2, -2.2, -1.1),
    "inside, penalty": (0.9, -2.0, 1.8, 1.8, -0.9),
    "above, reward: clipped": (1.5, 2.0, -2.4, 0.0, -1.2),
    "above, penalty: pulled back": (1.5, -2.0, 3.0, 3.0, -1.5),
    "below, reward: pulled back": (0.5, 2.0, -1.0, -1.0, -0.5),
    "below, penalty: clipped": (0.5, -2.0, 1.6, 0.0, -0.8),
}


@pytest.mark.parametrize("case", SURROGATE)
def test_surrogate(case: str) -> None:
    ratio, reward, loss, by_log_prob, by_reward = SURROGATE[case]
    old = samples(-0.7)
    arguments = old + np.log(np.float32(ratio)), old, samples(reward)
    np.testing.assert_allclose(surrogate(*arguments, 0.2), [loss], rtol=RTOL)
    gradients = jax.grad(lambda *inputs: surrogate(*inputs, 0.2).sum(), argnums=(0, 1, 2))(*arguments)
    np.testing.assert_allclose(np.concatenate(gradients), [by_log_prob, 0.0, by_reward], rtol=RTOL)


def test_surrogate_treats_samples_apart() -> None:
    ratios, rewards, losses, by_log_prob, _ = np.transpose(np.float32(list(SURROGATE.values())))
    old = normal(2, len(ratios))
    loss, gradient = jax.jacrev(lambda new: (surrogate(new, old, jnp.asarray(rewards), 0.2),) * 2, has_aux=True)(
        old + jnp.log(ratios)
    )[::-1]
    np.testing.assert_allclose(loss, losses, rtol=1e-5)
    np.testing.assert_allclose(gradient, np.diag(by_log_prob), rtol=1e-5)


def test_the_paper_clip_range_survives_float32() -> None:
    """ε = 1e-4 is 800 units in the last place of 1: ratios on either side of it are told apart."""
    new, old = samples(9e-5, 11e-5, -9e-5, -11e-5), jnp.zeros(4)
    by_log_prob = jax.grad(lambda new: surrogate(new, old, samples(1, 1, -1, -1), 1e-4).sum())(new)
    np.testing.assert_array_equal(np.asarray(by_log_prob) != 0, [True, False, True, False])


def loss_and_slopes(objective: Objective, gap: float, log_probs: tuple[float, float, float]) -> tuple[float, Any]:
    """The loss of one sample, and its derivatives by gap and by log_prob, log_prob_old, log_prob_teacher."""
    inputs = [samples(gap), *map(samples, log_probs)]
    loss, slopes = jax.value_and_grad(lambda x: distillation_loss(objective, *x)[0].sum())(inputs)
    return float(loss), np.concatenate(slopes)


@pytest.mark.parametrize("gap", [0.5, 50.0])
def test_direct_loss_is_the_gap_at_any_ratio(gap: float) -> None:
    for log_prob in (-1.0, -0.2):
        loss, slopes = loss_and_slopes(Objective("direct"), gap, (log_prob, -1.0, -2.0))
        assert loss == gap
        np.testing.assert_array_equal(slopes, [1, 0, 0, 0])


@pytest.mark.parametrize("gap", [0.5, 50.0])  # the second beyond the limit of 5, which must not silence it
def test_attached_reward_is_not_clamped(gap: float) -> None:
    loss, slopes = loss_and_slopes(Objective("clipped", "kl"), gap, (-1.0, -1.0, -2.0))
    assert loss == gap
    np.testing.assert_allclose(slopes, [1, gap, 0, 0], rtol=RTOL)


@pytest.mark.parametrize(("gap", "clamped"), [(0.5, 0.5), (50.0, 5.0)])
def test_detached_kl_is_clamped_and_its_gap_has_no_gradient(gap: float, clamped: float) -> None:
    loss, slopes = loss_and_slopes(Objective("clipped", "kl_detached"), gap, (-1.0, -1.0, -2.0))
    assert loss == clamped
    np.testing.assert_allclose(slopes, [0, clamped, 0, 0], rtol=RTOL)


@pytest.mark.parametrize(("teacher", "reward"), [(-0.5, 0.5), (-1.5, -0.5), (11.0, 5.0), (-13.0, -5.0)])
def test_log_ratio_is_clamped_on_both_sides_and_moves_by_the_ratio_alone(teacher: float, reward: float) -> None:
    loss, slopes = loss_and_slopes(Objective("clipped", "log_ratio"), 50.0, (-1.0, -1.0, teacher))
    assert loss == -reward
    np.testing.assert_allclose(slopes, [0, -reward, 0, 0], rtol=RTOL)


def test_reward_limit_and_clip_are_the_objectives_own() -> None:
    objective = Objective("clipped", "kl_detached", clip=0.3, reward_limit=2.0)
    loss, _ = loss_and_slopes(objective, 50.0, (float(np.log(0.5)), 0.0, 0.0))
    assert loss == pytest.approx(0.7 * 2.0, rel=RTOL)


@pytest.mark.parametrize(
    ("name", "window_only", "counted"),
    [("direct", False, [1, 1]), ("direct", True, [0, 1]), ("clipped", False, [0, 1]), ("clipped", True, [0, 1])],
)
def test_which_steps_train(name: str, window_only: bool, counted: list[int]) -> None:
    objective = Objective(name, window_only=window_only)
    found = [trains(objective, jnp.asarray(noisy)) for noisy in (False, True)]
    assert [float(value) for value in found] == counted
    assert all(value.shape == () and value.dtype == jnp.float32 for value in found)


# ---- what is refused


def test_defaults_are_the_papers() -> None:
    found = Objective()
    assert (found.name, found.reward, found.weighting) == ("clipped", "kl", "kl")
    assert (found.clip, found.reward_limit, found.mar_beta, found.window_only) == (1e-4, 5.0, 0.02, False)


def test_everything_defined_is_accepted() -> None:
    for name, reward, weighting, transition in ALLOWED:
        check_objective(Objective(name, reward, weighting), transition)
    assert {case[0] for case in ALLOWED} == set(OBJECTIVES)
    assert {case[1] for case in ALLOWED} == set(REWARDS)


REFUSED: dict[str, tuple[dict[str, Any], Transition, str]] = {
    "weighting": (
        {"weighting": "snr"},
        SDE(),
        "objective.weighting: found 'snr', expected one of kl, kl_no_dt, ode, uniform, x0, x_next",
    ),
    "kl with CPS": (
        {},
        CPS(),
        "objective.weighting: found 'kl', expected one of ode, uniform, x0, x_next: CPS has a std",
    ),
    "kl with ODE": (
        {"name": "direct"},
        ODE(),
        "objective.weighting: found 'kl', expected one of ode, uniform, x0, x_next: the",
    ),
    "kl without noise": (
        {},
        SDE(0.0),
        "objective.weighting: found 'kl', expected one of ode, uniform, x0, x_next: an SDE",
    ),
    "clipped with ODE": (
        {"weighting": "ode"},
        ODE(),
        "objective.name: 'clipped' needs a transition with a density ('sde' or 'cps'), found 'ode'",
    ),
    "log_ratio with a weighting": (
        {"reward": "log_ratio", "weighting": "ode"},
        SDE(),
        "objective.weighting: found 'ode', but reward 'log_ratio' has no weighting but 'kl'",
    ),
    "log_ratio with CPS": ({"reward": "log_ratio"}, CPS(), "objective.weighting: found 'kl', expected one of ode,"),
    "log_ratio of branches": (
        {"reward": "log_ratio", "match": "branches"},
        SDE(),
        "objective.match: found 'branches', expected 'guided': reward 'log_ratio' compares densities",
    ),
    "log_ratio, normalised": (
        {"reward": "log_ratio", "normalise": True},
        SDE(),
        "objective.normalise: found True, expected False: reward 'log_ratio' compares densities",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fields, transition, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_objective(dataclasses.replace(Objective(), **fields), transition)


@pytest.mark.parametrize("weighting", ["kl_no_dt", "ode", "uniform"])
def test_log_ratio_has_no_weighting_of_its_own(weighting: str) -> None:
    with pytest.raises(ValueError, match="'log_ratio' has no weighting but 'kl'"):
        check_objective(Objective(reward="log_ratio", weighting=weighting), SDE())


# ---- mean gradients over the noise of the drawn action, at ratio 1

DRAWS, SHAPE, PARAMETERS = 2**15, (2, 3, 2), 3
DIMS = int(np.prod(SHAPE))
SIGMA, SIGMA_NEXT = jnp.float32(0.7), jnp.float32(0.55)
CRITICAL = float(stats.chi2.isf(1e-6, PARAMETERS))
STATE, MATRIX, TEACHER = normal(3, *SHAPE), normal(4, *SHAPE, PARAMETERS), normal(5, *SHAPE)
THETA = samples(0.3, -0.5, 0.2)


def drawn_gradients(objective: Objective, transition: Transition, seed: int = 0) -> np.ndarray:
    """d loss / d θ for each of many actions drawn at one state, `[draws, parameters]`."""
    many = (DRAWS, *SHAPE)
    x, teacher = jnp.broadcast_to(STATE, many), jnp.broadcast_to(TEACHER, many)
    keys = sample_keys(jax.random.key(seed), 1, DRAWS)[0]

    def loss(theta: jax.Array) -> jax.Array:
        v = jnp.einsum("hwcp,bp->bhwc", MATRIX, theta)
        x_next, log_prob = transition_step(transition, x, v, SIGMA, SIGMA_NEXT, keys)
        gap = divergence(v, teacher, weight(objective.weighting, transition, SIGMA, SIGMA_NEXT))
        moments = transition.moments(x, teacher, SIGMA, SIGMA_NEXT)
        log_prob_teacher = transition.log_prob(x_next, *moments)
        return distillation_loss(objective, gap, log_prob, jax.lax.stop_gradient(log_prob), log_prob_teacher)[0].sum()

    # Samples do not interact, so that a parameter vector per draw gives a gradient per draw.
    return np.float64(jax.jit(jax.grad(loss))(jnp.broadcast_to(THETA, (DRAWS, PARAMETERS))))


@dataclasses.dataclass(frozen=True)
class Exact:
    """The closed form in float64: M `[D, P]`, v - v_k `[D]`, the weight, and c and std of the transition."""

    matrix: np.ndarray
    difference: np.ndarray
    weight: float
    c: float
    std: float

    @property
    def direct(self) -> np.ndarray:
        """∇ w·‖v - v_k‖²/D."""
        return 2 * self.weight / DIMS * self.matrix.T @ self.difference

    @property
    def gap(self) -> float:
        return self.weight * float(np.mean(self.difference**2))

    @property
    def score_covariance(self) -> np.ndarray:
        """Of ∇ log π averaged over D: c/(D·std)·Mᵀε."""
        return (self.c / (DIMS * self.std)) ** 2 * self.matrix.T @ self.matrix

    @property
    def log_ratio_covariance(self) -> np.ndarray:
        """Of -r·∇ log π with r = (u·ε - ‖u‖²/2)/D and u = (μ_k - μ_θ)/std, by Isserlis: (‖u‖² + ‖u‖⁴/4)·I + u·uᵀ."""
        u = -self.c * self.difference / self.std
        square = float(u @ u)
        inner = (square + square**2 / 4) * np.eye(DIMS) + np.outer(u, u)
        return (self.c / (DIMS**2 * self.std)) ** 2 * self.matrix.T @ inner @ self.matrix


def exact(objective: Objective, transition: Transition) -> Exact:
    matrix = np.float64(MATRIX).reshape(DIMS, PARAMETERS)
    difference = matrix @ np.float64(THETA) - np.float64(TEACHER).ravel()
    w = float(weight(objective.weighting, transition, SIGMA, SIGMA_NEXT))
    _, c, std = map(float, transition.coefficients(SIGMA, SIGMA_NEXT))
    # CPS's log-density, -(x' - μ)² as its authors have it, is the Gaussian one of 2·std² = 1 with noise std.
    return Exact(matrix, difference, w, c * 2 * std**2 if isinstance(transition, CPS) else c, std)


def statistic(gradients: np.ndarray, expected: np.ndarray, covariance: np.ndarray) -> float:
    """Chi-squared with as many degrees of freedom as parameters, where `expected` is the mean."""
    offset = gradients.mean(0) - expected
    return float(len(gradients) * offset @ np.linalg.solve(covariance, offset))


@pytest.mark.parametrize(
    ("weighting", "transition", "seed"),
    [("kl", SDE(0.7), 1), ("kl_no_dt", SDE(0.7), 2), ("uniform", SDE(0.7), 3), ("ode", CPS(0.7), 4)],
    ids=["kl-sde", "kl_no_dt-sde", "uniform-sde", "ode-cps"],
)
def test_attached_reward_has_the_direct_gradient_in_the_mean(weighting: str, transition: Transition, seed: int) -> None:
    objective = Objective("clipped", "kl", weighting)
    gradients, law = drawn_gradients(objective, transition, seed), exact(objective, transition)
    covariance = law.gap**2 * law.score_covariance
    found = statistic(gradients, law.direct, covariance)
    wrong = [statistic(gradients, factor * law.direct, covariance) for factor in (0.0, 0.9, 1.1, 2.0)]
    print(f"{weighting}: chi2 {found:.2f} (critical {CRITICAL:.1f}); of 0, 0.9, 1.1, 2 times the gradient: {wrong}")
    assert found < CRITICAL
    assert min(wrong) > 3 * CRITICAL
    np.testing.assert_allclose(np.cov(gradients.T), covariance, rtol=0.05, atol=0.02 * covariance.max())


@pytest.mark.parametrize(("weighting", "seed"), [("kl", 5), ("uniform", 6)])
def test_detached_kl_does_not_learn(weighting: str, seed: int) -> None:
    objective = Objective("clipped", "kl_detached", weighting)
    gradients, law = drawn_gradients(objective, SDE(0.7), seed), exact(objective, SDE(0.7))
    assert law.gap < objective.reward_limit
    covariance = law.gap**2 * law.score_covariance
    found = statistic(gradients, np.zeros(PARAMETERS), covariance)
    wrong = statistic(gradients, 0.1 * law.direct, covariance)
    print(f"{weighting}: chi2 {found:.2f} (critical {CRITICAL:.1f}); a tenth of the direct gradient: {wrong:.0f}")
    assert found < CRITICAL
    assert wrong > 3 * CRITICAL


def test_log_ratio_has_the_direct_gradient_over_the_number_of_dimensions() -> None:
    objective = Objective("clipped", "log_ratio", "kl")
    gradients, law = drawn_gradients(objective, SDE(0.7)), exact(objective, SDE(0.7))
    found = statistic(gradients, law.direct / DIMS, law.log_ratio_covariance)
    wrong = [statistic(gradients, f * law.direct / DIMS, law.log_ratio_covariance) for f in (0.0, 0.8, 1.2, 2.0, DIMS)]
    print(f"chi2 {found:.2f} (critical {CRITICAL:.1f}); of 0, 0.8, 1.2, 2 and D times: {wrong}")
    assert found < CRITICAL
    assert min(wrong) > 3 * CRITICAL
    covariance = law.log_ratio_covariance
    np.testing.assert_allclose(np.cov(gradients.T), covariance, rtol=0.05, atol=0.02 * covariance.max())
