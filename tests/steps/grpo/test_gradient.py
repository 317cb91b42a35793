"""Gradients of the GRPO update: against PyTorch's autograd, and by finite differences.

PyTorch's side is written straight from the formulas, in float64: network, guidance, transition, densities, surrogates,
divergence from the base, weights of steps, reduction. Shared are weights and the trajectory. 1e-4 on ‖a - b‖/‖b‖ of the
gradient and on the loss; finite differences run in float64, at 1e-6.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.config.learning import NoiseWindow, PolicyGradient
from fopd_jax.flow.transition import CPS, SDE, Transition
from fopd_jax.steps.grpo.spec import Credit, Rollout
from tests.steps.grpo.network import SIZE, Host, base, copied, grouped, make_credit, make_spec, moved, recorded
from tests.steps.opd.network import SIGMAS, STEPS, STUDENT, normal, relative_error

TOLERANCE, NUMERIC = 1e-4, 1e-6
GUIDANCE, LEVEL = 4.5, 0.7
ADVANTAGE = np.array([1.3, -0.4, 0.9, -1.7, 0.6, 2.0])
VALID = np.array([True, True, False, True, True, True])
FLAT = np.array([False, False, False, False, True, False])
COUNTS = VALID & ~FLAT


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how far from the rollout's policy."""

    objective: PolicyGradient
    distance: float
    transition: Transition = dataclasses.field(default_factory=lambda: SDE(LEVEL))
    window: NoiseWindow = dataclasses.field(default_factory=NoiseWindow)


CASES = {
    "clip, on policy": Case(PolicyGradient(clip=0.01, kl_beta=0.3), 0.0),
    "clip": Case(PolicyGradient(clip=5e-4, kl_beta=0.3), 0.02),
    "clip, weights of steps, window": Case(
        PolicyGradient(clip=3e-4, kl_beta=0.3, step_weighting="noise", kl_weighting="kl"),
        0.02, window=NoiseWindow(within=(1, 4), size=2),
    ),
    "clip, coefficient-preserving": Case(
        PolicyGradient(clip=1e-3, kl_beta=0.3, kl_weighting="uniform"), 0.01, CPS(LEVEL)
    ),
    "guard, on policy": Case(PolicyGradient("guard", clip=0.01, kl_beta=0.3), 0.0),
    "guard": Case(PolicyGradient("guard", clip=2e-4, kl_beta=0.3), 0.04),
    "dppo": Case(PolicyGradient("dppo", divergence=3e-4, kl_beta=0.3), 0.02),
    "dppo, not held to the base": Case(PolicyGradient("dppo", divergence=0.0, kl_beta=0.0), 0.02),
}  # fmt: skip


def run(case: Case) -> tuple[Rollout, dict[str, np.ndarray], Any, Any]:
    """The rollout, sums of terms by sample, the gradient, and the parameters that it is of."""
    host = Host(make_spec(case.objective, case.transition, window=case.window))
    state, rolled = host.roll_out(host.start(), grouped())
    kept, there = copied(rolled[0]), moved(case.distance)
    state = dataclasses.replace(state, trained=copied(there))
    state, _, [(totals, _, _)] = host.learn(state, rolled, grouped(), make_credit(ADVANTAGE, VALID, FLAT))
    return kept, totals, recorded(state), there


# ---- the same in PyTorch


def wide(array: Any) -> torch.Tensor:
    return torch.tensor(np.float64(array))


def torch_velocity(factors: list[torch.Tensor] | None, x: torch.Tensor, sigma: float, prompts: Any) -> torch.Tensor:
    """The two layers at x `[B, h, w, c]`; `factors`: a and b of `down` and of `up`, None for the base."""
    params = jax.tree.map(wide, base().variables["params"])

    def dense(name: str, inputs: torch.Tensor, pair: list[torch.Tensor]) -> torch.Tensor:
        outputs = inputs @ params[name]["kernel"] + params[name]["bias"]
        return outputs + STUDENT.scale * (inputs @ pair[0] @ pair[1]) if pair else outputs

    down, up = (factors[:2], factors[2:]) if factors else ([], [])
    prompt = dense("pooled", wide(prompts.pooled), []) + dense("context", wide(prompts.context).mean(1), [])
    hidden = dense("up", x.flatten(1, 2), up) + (prompt + sigma)[:, None]
    return dense("down", torch.tanh(hidden), down).reshape(x.shape)


def torch_guided(factors: list[torch.Tensor] | None, x: torch.Tensor, sigma: float) -> torch.Tensor:
    null = torch_velocity(factors, x, sigma, base().null)
    return null + GUIDANCE * (torch_velocity(factors, x, sigma, grouped()) - null)


def textbook(transition: Transition, t: int) -> tuple[float, float, float]:
    """Coefficients of x and v in the mean, and the std."""
    sigma, after = float(SIGMAS[t]), float(SIGMAS[t + 1])
    if isinstance(transition, CPS):
        std = after * math.sin(LEVEL * math.pi / 2)
        rest = math.sqrt(after**2 - std**2)
        return (1 - after) + rest, -(1 - after) * sigma + rest * (1 - sigma), std
    s = LEVEL * math.sqrt(sigma / (1 - (after if sigma == 1 else sigma)))
    dt = after - sigma
    return 1 + s**2 / (2 * sigma) * dt, (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt, s * math.sqrt(-dt)


def mean_square(difference: torch.Tensor) -> torch.Tensor:
    return (difference**2).mean((1, 2, 3))


def torch_log_prob(transition: Transition, x_next: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    if isinstance(transition, CPS):
        return -mean_square(x_next - mean)
    return torch.distributions.Normal(mean, std).log_prob(x_next).mean((1, 2, 3))


def torch_step(case: Case, t: int, stored: Any, factors: list[torch.Tensor], old: list[torch.Tensor]) -> torch.Tensor:
    """Loss of one timestep by sample."""
    objective, sigma, advantage = case.objective, float(SIGMAS[t]), torch.tensor(ADVANTAGE)
    x, x_next = wide(stored.x), wide(stored.x_next)
    p, c, std = textbook(case.transition, t)
    v, v_old, v_base = (torch_guided(each, x, sigma) for each in (factors, old, None))
    mean, mean_old = p * x + c * v, (p * x + c * v_old).detach()
    log_ratio = torch_log_prob(case.transition, x_next, mean, std)
    log_ratio = log_ratio - torch_log_prob(case.transition, x_next, mean_old, std)
    apart = mean_square(mean - mean_old)
    if objective.name == "guard":
        log_ratio = log_ratio * std + apart / (2 * std)
    ratio = log_ratio.exp()
    if objective.name == "dppo":
        far = apart.detach() / (2 * std**2) >= objective.divergence
        dropped = far & (((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0)))
        loss = -(ratio * advantage * ~dropped)
    else:
        limited = ratio.clamp(1 - objective.clip, 1 + objective.clip)
        loss = -torch.minimum(ratio * advantage, limited * advantage)
    if objective.step_weighting == "noise":
        loss = loss * std / np.mean([textbook(case.transition, k)[2] for k in range(STEPS - 1)])
    gap = mean_square(v - v_base.detach())
    variance = {"kl": std**2, "kl_no_dt": std**2 / (sigma - float(SIGMAS[t + 1]))}
    weight = c**2 / (2 * variance[objective.kl_weighting]) if objective.kl_weighting in variance else 1.0
    return loss + objective.kl_beta * weight * gap


def torch_loss(case: Case, rollout: Rollout, there: Any) -> tuple[float, list[np.ndarray]]:
    """The mean over what counts, and its gradient."""
    factors = [wide(leaf).requires_grad_() for leaf in jax.tree.leaves(there)]
    old = [wide(leaf) for leaf in jax.tree.leaves(STUDENT)]
    first, count = int(rollout.first), len(rollout.stored.log_prob)
    total = torch.zeros((), dtype=torch.float64)
    for slot in range(count):
        stored = jax.tree.map(lambda leaf, slot=slot: leaf[slot], rollout.stored)
        total = total + torch_step(case, first + slot, stored, factors, old)[torch.tensor(COUNTS)].sum()
    loss = total / (COUNTS.sum() * count)
    return float(loss.detach()), [each.numpy() for each in torch.autograd.grad(loss, factors)]


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_pytorchs(name: str) -> None:
    case = CASES[name]
    rollout, totals, gradient, there = run(case)
    loss, expected = torch_loss(case, rollout, there)
    error = relative_error(jax.tree.leaves(gradient), expected)
    found = {key: float(value.sum() / totals["weight"].sum()) for key, value in totals.items()}
    print(f"{name}: gradient {error:.1e}, loss {abs(found['loss'] / loss - 1):.1e}, {found}")
    assert error <= TOLERANCE
    assert found["loss"] == pytest.approx(loss, rel=TOLERANCE, abs=1e-6)
    assert found["loss"] == pytest.approx(
        found["policy_loss"] + case.objective.kl_beta * found["reference_gap"], rel=1e-5, abs=1e-6
    )
    if case.distance:  # some are limited, some are not
        assert 0.05 < found["clipped"] < 0.95
        assert found["off_policy"] == 1
    else:
        assert (found["clipped"], found["off_policy"], found["ratio"]) == (0, 0, 1)


def test_what_does_not_count_has_no_part_in_any_sum() -> None:
    totals = run(CASES["clip"])[1]
    for value in totals.values():
        assert not np.asarray(value)[~COUNTS].any()
        assert np.asarray(value)[COUNTS].any()


def test_the_divergence_from_the_base_has_a_gradient_of_its_own() -> None:
    """Without an advantage it is all that trains: inside of no_grad this would be 0."""
    case = CASES["clip, on policy"]
    host = Host(make_spec(case.objective))
    state, rolled = host.roll_out(host.start(), grouped())
    kept = copied(rolled[0])
    state, _, _ = host.learn(state, rolled, grouped(), make_credit(np.zeros(SIZE), VALID, FLAT))
    factors = [wide(leaf).requires_grad_() for leaf in jax.tree.leaves(STUDENT)]
    total = torch.zeros((), dtype=torch.float64)
    for t in range(STEPS - 1):
        x, sigma, (_, c, std) = wide(kept.stored.x[t]), float(SIGMAS[t]), textbook(case.transition, t)
        gap = mean_square(torch_guided(factors, x, sigma) - torch_guided(None, x, sigma))[torch.tensor(COUNTS)].sum()
        total = total + 0.3 * c**2 / (2 * std**2) * (sigma - float(SIGMAS[t + 1])) * gap
    expected = torch.autograd.grad(total / (COUNTS.sum() * (STEPS - 1)), factors)
    assert relative_error(jax.tree.leaves(recorded(state)), [each.numpy() for each in expected]) <= TOLERANCE
    assert all(np.any(each.numpy()) for each in expected)


# ---- finite differences


@pytest.mark.parametrize("name", ["clip", "guard", "dppo"])
def test_gradients_by_finite_differences(name: str) -> None:
    """Float64, central differences of step 1e-5 along four random directions, off the rollout's policy."""
    case = CASES[name]
    host = Host(make_spec(case.objective))
    _, rolled = host.roll_out(host.start(), grouped())
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide_host = Host(dataclasses.replace(host.spec, sigmas=np.float64(SIGMAS)), dtype=jnp.float64)
        rollout = dataclasses.replace(rolled[0], x=double(rolled[0].x), stored=double(rolled[0].stored))
        credit: Credit = double(make_credit(ADVANTAGE, VALID, FLAT))

        def at(trained: Any) -> tuple[float, Any]:
            sums = jax.tree.map(jnp.zeros_like, rolled[1])
            sums = dataclasses.replace(sums, loss=double(sums.loss), weight=double(sums.weight))
            begun = wide_host.start(trained), copied(rollout), sums
            (after, *_), (totals, _, _) = wide_host.programs.go(
                double(base()), begun, double(grouped()), credit, wide_host.learning[0]
            )
            return float(totals["loss"].sum() / totals["weight"].sum()), recorded(after)

        there = double(moved(case.distance))
        gradient, found, numeric = at(there)[1], [], []
        for seed in range(4):
            along = jax.tree.map(lambda leaf, s=seed: np.float64(normal(s + leaf.size, *leaf.shape)), there)
            up, down = (jax.tree.map(lambda leaf, d, h=h: leaf + h * d, there, along) for h in (1e-5, -1e-5))
            numeric.append((at(up)[0] - at(down)[0]) / 2e-5)
            found.append(sum(jax.tree.leaves(jax.tree.map(lambda a, b: float((a * b).sum()), gradient, along))))
        error = relative_error(np.array(found), np.array(numeric))
        print(f"{name}: {error:.1e}")
        assert error <= NUMERIC


def double(tree: Any) -> Any:
    def widened(leaf: Any) -> Any:
        return jnp.asarray(np.float64(leaf)) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) else leaf

    return jax.tree.map(widened, tree)
