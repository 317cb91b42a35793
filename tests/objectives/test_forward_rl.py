"""Losses of the forward process: PyTorch's autograd in float64, closed forms on policy, differences, and who counts.

Tolerances, float32 against float64: 1e-4 on ‖a - b‖/‖b‖ of values and gradients; 1e-5 of central differences within
float64.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.config.learning import ForwardObjective
from fopd_jax.objectives.forward_rl import (
    LEAST_KL,
    Noised,
    centred,
    forward_terms,
    implicit_reward,
    matching,
    over,
    term_names,
)

TOLERANCE, LIMIT, GROUP, SHAPE = 1e-4, 5.0, 4, (3, 2, 2)
LEVEL = np.repeat(np.array([0.9, 0.3], np.float32), GROUP)  # the same in a group, as `crd` asks for
ADVANTAGE = np.array([1.5, -0.5, -7.0, 2.0, 0.0, 3.0, -3.0, 9.0], np.float32)  # two beyond the limit
COUNTS = np.array([1, 1, 1, 0, 1, 1, 1, 1], np.float32)
OBJECTIVES = {
    "nft": ForwardObjective("nft", beta=1.0),
    "nft, b 0.1": ForwardObjective("nft", beta=0.1, kl_beta=0.3, old_beta=0.2),
    "awm": ForwardObjective("awm", kl_beta=2e-3, old_beta=1.0),
    "awm, clipped": ForwardObjective("awm", kl_beta=0.0, clip=0.05),
    "crd": ForwardObjective("crd", beta=0.7, kl_beta=0.1),
}
ON_POLICY = [name for name in OBJECTIVES if name != "awm, clipped"]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def velocities() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The policy's, the old one's near it, the base's."""
    v = normal(2, 8, *SHAPE)
    return v, v + 0.3 * normal(3, 8, *SHAPE), normal(4, 8, *SHAPE)


def noised(old: Any, reference: Any = None, dtype: Any = jnp.float32) -> Noised:
    x0, noise = normal(0, 8, *SHAPE), normal(1, 8, *SHAPE)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), Noised(x0, noise, LEVEL, old, reference))


def total(objective: ForwardObjective, at: Noised, counts: Any = COUNTS, name: str = "loss") -> Callable[..., Any]:
    """The sum of a term over samples, as a function of v."""

    def function(v: Any) -> Any:
        given = jnp.asarray(ADVANTAGE, v.dtype), jnp.asarray(counts, v.dtype)
        return forward_terms(objective, v, at, *given, LIMIT, GROUP)[name].sum()

    return function


def check(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    a, b = np.float64(found), np.float64(expected)
    assert a.shape == b.shape
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    print(f"relative error {error:.1e}")
    assert error <= tolerance


# ---- PyTorch


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)


def torch_loss(objective: ForwardObjective, v: torch.Tensor, old: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """The sum over samples that count, written from the papers' formulas, sample by sample."""
    x0, e = torch.tensor(np.float64(normal(0, 8, *SHAPE))), torch.tensor(np.float64(normal(1, 8, *SHAPE)))
    t = torch.tensor(np.float64(LEVEL))
    tt = t[:, None, None, None]
    x_t, u = (1 - tt) * x0 + tt * e, e - x0
    a = torch.clip(torch.tensor(np.float64(ADVANTAGE)) / LIMIT, -1, 1)
    r, b = a / 2 + 0.5, objective.beta
    l_new, l_old = mean((v - u) ** 2), mean((old - u) ** 2)
    kl = objective.kl_beta * mean((v - ref) ** 2)
    if objective.name == "nft":
        plus, minus = x_t - tt * (b * v + (1 - b) * old), x_t - tt * ((1 + b) * old - b * v)
        w_plus, w_minus = (mean((each - x0).abs()).detach().clip(min=1e-5) for each in (plus, minus))
        loss = LIMIT * (r * mean((plus - x0) ** 2) / w_plus + (1 - r) * mean((minus - x0) ** 2) / w_minus) / b
    elif objective.name == "awm":
        new, before = (t / 0.25 * ((each + 1e-10) ** 0.25 - 1e-10**0.25) for each in (l_new, l_old))
        ratio = torch.exp(before - new)
        loss = torch.maximum(-a * ratio, -a * torch.clip(ratio, 1 - objective.clip, 1 + objective.clip))
    else:
        w, w_old = (mean((each - u).abs()).detach().clip(min=1e-5) for each in (v, old))
        q, counts = -(l_new / w - l_old / w_old), torch.tensor(np.float64(COUNTS))
        pieces = []
        for k in range(0, 8, GROUP):
            rows = [i for i in range(k, k + GROUP) if counts[i] > 0]
            q_mean, r_mean = q[rows].mean().detach(), r[rows].mean()
            pieces.append(LIMIT / b * (b * (q[k : k + GROUP] - q_mean) - (r[k : k + GROUP] - r_mean)) ** 2)
        loss = torch.cat(pieces)
        kl = kl * (1e-4 / objective.kl_beta + r * (1 - 1e-4 / objective.kl_beta))
    loss = loss + objective.old_beta * mean((v - old) ** 2) + kl
    return (loss * torch.tensor(np.float64(COUNTS))).sum()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_are_pytorchs(name: str) -> None:
    objective, (v, old, ref) = OBJECTIVES[name], velocities()
    value, gradient = jax.value_and_grad(total(objective, noised(old, ref)))(jnp.asarray(v))
    theirs = torch.tensor(np.float64(v), requires_grad=True)
    loss = torch_loss(objective, theirs, torch.tensor(np.float64(old)), torch.tensor(np.float64(ref)))
    loss.backward()
    check(value, loss.item())
    check(gradient, theirs.grad)


# ---- on policy


def closed_form(objective: ForwardObjective, at: Noised, v: Any) -> Any:
    """What the module says the policy's loss has the gradient of, where v is the old policy's."""
    a = np.clip(ADVANTAGE / LIMIT, -1, 1)
    r = (1 + a) / 2
    if objective.name == "awm":
        return (jnp.asarray(a * COUNTS) * matching(v, at)).sum()
    if objective.name == "crd":
        mine = np.concatenate([r[k : k + GROUP] - r[k : k + GROUP][COUNTS[k : k + GROUP] > 0].mean() for k in (0, 4)])
        return (jnp.asarray(-2 * LIMIT * mine * COUNTS) * implicit_reward(v, at)).sum()
    apart = at.state - over(at.t, v) * v - at.x0
    size = jax.lax.stop_gradient(jnp.abs(apart).mean((1, 2, 3)))
    return (jnp.asarray(LIMIT * (2 * r - 1) * COUNTS) * jnp.square(apart).mean((1, 2, 3)) / size).sum()


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_the_gradient_has_a_closed_form(name: str) -> None:
    objective = dataclasses.replace(OBJECTIVES[name], kl_beta=0.0)
    v = jnp.asarray(velocities()[0])
    at = noised(v)
    check(jax.grad(total(objective, at))(v), jax.grad(lambda v: closed_form(objective, at, v))(v), 1e-5)
    if objective.name == "awm":
        terms = forward_terms(objective, v, at, jnp.asarray(ADVANTAGE), jnp.asarray(COUNTS), LIMIT, GROUP)
        np.testing.assert_array_equal(terms["ratio"], COUNTS)  # exactly 1 where they count


def test_a_gradient_through_the_mean_of_a_group_changes_nothing() -> None:
    v, old, _ = velocities()
    objective, at = OBJECTIVES["crd"], noised(old)
    counts, r = jnp.asarray(COUNTS), jnp.clip(jnp.asarray(ADVANTAGE) / LIMIT, -1, 1) / 2 + 0.5

    def detached(v: Any) -> Any:
        q = implicit_reward(v, at)
        rest = jax.lax.stop_gradient(q - centred(q, counts, GROUP))
        apart = objective.beta * (q - rest) - centred(r, counts, GROUP)
        return LIMIT / objective.beta * (jnp.square(apart) * counts).sum()

    mine = total(dataclasses.replace(objective, kl_beta=0.0), at, name="policy_loss")
    check(jax.grad(detached)(jnp.asarray(v)), jax.grad(mine)(jnp.asarray(v)), 1e-5)


# ---- differences


@pytest.mark.parametrize("name", ["awm", "nft, b 0.1"])
def test_gradients_are_differences_of_values(name: str) -> None:
    """In float64, along random directions; what the loss holds fixed, NFT's weights, is held fixed here by hand."""
    with jax.enable_x64(True):
        v, old, ref = (jnp.asarray(np.float64(each)) for each in velocities())
        objective, at = OBJECTIVES[name], noised(old, ref, jnp.float64)
        gradient = np.asarray(jax.grad(total(objective, at))(v))
        value = total(objective, at) if objective.name == "awm" else fixed_weights(objective, v, at)
        for seed in range(3):
            way, h = jnp.asarray(np.float64(normal(10 + seed, *v.shape))), 1e-5
            slope = float(value(v + h * way) - value(v - h * way)) / (2 * h)
            np.testing.assert_allclose(slope, (gradient * np.asarray(way)).sum(), rtol=1e-5)


def fixed_weights(objective: ForwardObjective, v: Any, at: Noised) -> Callable[[Any], Any]:
    """NFT's loss with the weights that it has at v."""
    b, t = objective.beta, over(at.t, at.x0)
    r = jnp.asarray(np.float64(np.clip(ADVANTAGE / LIMIT, -1, 1))) / 2 + 0.5

    def errors(v: Any) -> list[Any]:
        return [at.state - t * each - at.x0 for each in (b * v + (1 - b) * at.old, (1 + b) * at.old - b * v)]

    sizes = [jnp.abs(each).mean((1, 2, 3)) for each in errors(v)]

    def value(v: Any) -> Any:
        plus, minus = ((e**2).mean((1, 2, 3)) / size for e, size in zip(errors(v), sizes, strict=True))
        held = [
            beta * ((v - other) ** 2).mean((1, 2, 3))
            for beta, other in ((objective.kl_beta, at.reference), (objective.old_beta, at.old))
        ]
        return ((LIMIT / b * (r * plus + (1 - r) * minus) + sum(held)) * jnp.asarray(np.float64(COUNTS))).sum()

    return value


# ---- who counts


@pytest.mark.parametrize("name", ON_POLICY)
def test_what_does_not_count_is_nowhere(name: str) -> None:
    """Its velocity moves no other sample's terms, and all of its own are 0."""
    v, old, ref = (jnp.asarray(each) for each in velocities())
    given = jnp.asarray(ADVANTAGE), jnp.asarray(COUNTS), LIMIT, GROUP
    moved = v.at[3].add(1.0)
    first, second = (forward_terms(OBJECTIVES[name], each, noised(old, ref), *given) for each in (v, moved))
    assert tuple(sorted(first)) == tuple(sorted(term_names(OBJECTIVES[name])))
    for term in first:
        np.testing.assert_array_equal(first[term], second[term])
        assert first[term][3] == 0
    gradient = jax.grad(total(OBJECTIVES[name], noised(old, ref)))(v)
    assert not gradient[3].any()
    assert all(gradient[i].any() for i in range(8) if i != 3)


def test_means_of_a_group_are_those_of_who_counts() -> None:
    values, counts = normal(5, 8), np.array([1, 0, 0, 1, 0, 0, 0, 0], np.float32)
    found = centred(jnp.asarray(values), jnp.asarray(counts), GROUP)
    np.testing.assert_allclose(found[:4], values[:4] - (values[0] + values[3]) / 2, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[4:], values[4:])  # of a group where nobody counts the mean is none


def test_nothing_is_learned_of_the_middle() -> None:
    """A = 0 is r = 1/2: on policy DiffusionNFT has no gradient there, whatever its weight."""
    v = jnp.asarray(velocities()[0])
    given = jnp.zeros(8), jnp.ones(8), LIMIT, GROUP

    def loss(v: Any, old: Any) -> Any:
        return forward_terms(OBJECTIVES["nft"], v, noised(old), *given)["policy_loss"].sum()

    assert float(jnp.abs(jax.grad(loss)(v, v)).max()) < 1e-6
    assert float(jnp.abs(jax.grad(loss)(v, v + 0.1)).max()) > 1e-3  # off policy it would hold the policy back


def test_crds_distance_to_the_base_grows_with_the_reward() -> None:
    v, old, ref = (jnp.asarray(each) for each in velocities())
    given = jnp.asarray(ADVANTAGE), jnp.ones(8), LIMIT, GROUP
    terms = forward_terms(OBJECTIVES["crd"], v, noised(old, ref), *given)
    share = (np.asarray(terms["loss"]) - np.asarray(terms["policy_loss"])) / np.asarray(terms["reference_gap"])
    r = np.clip(ADVANTAGE / LIMIT, -1, 1) / 2 + 0.5
    np.testing.assert_allclose(share, LEAST_KL + r * (0.1 - LEAST_KL), rtol=1e-3, atol=1e-5)
