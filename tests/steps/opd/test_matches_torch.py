"""Everything that can be compared, through the whole update, against PyTorch's gradients.

The small network is written again in PyTorch, in float64, and takes its loss of the trajectory that our student rolled
out; targets are summed there question by question. Tolerance on ‖a - b‖/‖b‖ over all adapter gradients, and on the
loss: 1e-4, float32 against float64. Every match by every weighting, normalised or not, for one teacher a sample and for
mixes with extrapolation; by default six of them: every weighting once, every two of match, routing and normalisation.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
import torch

from fopd_jax.adapters.lora import Adapter, zeros_like
from fopd_jax.config.schema import Objective
from fopd_jax.config.teaching import MATCHES, WEIGHTINGS
from fopd_jax.steps.opd.replay import collect, loss_and_gradient
from fopd_jax.steps.visits import Stored
from fopd_jax.worlds.prompt_stream import Batch
from tests.steps.opd.matching import FOLDED, LAMBDAS, bank_of, batch_of, spec_of
from tests.steps.opd.network import (
    BANK,
    BATCH,
    GUIDED,
    SHAPE,
    SIGMAS,
    STUDENT,
    frozen_of,
    make_pieces,
    make_state,
    prompts,
    quick,
    relative_error,
    variables,
)

TOLERANCE = 1e-4


# ---- the same in PyTorch


def torch_branches(weights: Any, x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The small network's velocities under the prompts and under the empty one; weights: an adapter's in PyTorch."""
    params = jax.tree.map(lambda leaf: torch.tensor(np.float64(leaf)), variables()["params"])

    def dense(name: str, inputs: torch.Tensor) -> torch.Tensor:
        out = inputs @ params[name]["kernel"] + params[name]["bias"]
        return out + STUDENT.scale * inputs @ weights[name]["a"] @ weights[name]["b"] if name in weights else out

    def forward(text: Any) -> torch.Tensor:
        pooled, context = (torch.tensor(np.float64(each)) for each in (text.pooled, text.context))
        prompt = dense("pooled", pooled) + dense("context", context.mean(1)) + sigma
        hidden = dense("up", x.reshape(len(x), -1, SHAPE[-1])) + prompt[:, None]
        return dense("down", torch.tanh(hidden)).reshape(x.shape)

    return forward(prompts(1, len(x))), forward(prompts(7, 1))


def torch_weights(tree: Adapter, *, leaf: bool = False) -> Any:
    return jax.tree.map(lambda each: torch.tensor(np.float64(each), requires_grad=leaf), tree.weights)


def guided(text: torch.Tensor, null: torch.Tensor, scale: float) -> torch.Tensor:
    return null + scale * (text - null)


Said = tuple[torch.Tensor, torch.Tensor]
"""What is matched: a velocity, and the difference of the branches."""


def torch_targets(x: torch.Tensor, sigma: float, match: str, batch: Batch) -> tuple[Said, Said]:
    """Teachers' and anchor's: Σ α_k·((1 + λ_k)·v_k - λ_k·v_base) term by term, each base under its teacher's scale."""
    said = [torch_branches(torch_weights(each), x, sigma) for each in (*BANK.values(), zeros_like(STUDENT))]

    def at(entry: int, scale: float) -> Said:
        text, null = said[entry]
        return (text if match == "branches" else guided(text, null, scale)), text - null

    def mixed(which: int) -> torch.Tensor:
        each = []
        for i in range(len(x)):
            if batch.mix is None:
                each.append(at(int(batch.route[i]), GUIDED[1][int(batch.route[i])])[which][i])
                continue
            clean, noisy = np.asarray(batch.mix.weights[i], np.float64)
            shares = (1 - sigma) * clean + sigma * noisy
            beyond = [
                (1 + extra) * at(k, scale)[which][i] - extra * at(3, scale)[which][i]
                for k, (scale, extra) in enumerate(zip(GUIDED[1][:2], LAMBDAS, strict=True))
            ]
            each.append(shares[0] * beyond[0] + shares[1] * beyond[1])
        return torch.stack(each).detach()

    anchor = at(2, GUIDED[1][2])
    return (mixed(0), mixed(1)), (anchor[0].detach(), anchor[1].detach())


def torch_weight(name: str, sigma: float, sigma_next: float) -> float:
    """Of Euler-Maruyama at noise level .7, from METHOD's formulas."""
    s = 0.7 * (sigma / (1 - (sigma_next if sigma == 1 else sigma))) ** 0.5
    dt = sigma_next - sigma
    c, variance = (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt, -(s**2) * dt
    kl = c**2 / (2 * variance)
    return {
        "kl": kl, "kl_no_dt": -dt * kl, "ode": dt**2 / 2, "uniform": 1.0, "x0": sigma**2, "x_next": c**2,
    }[name]  # fmt: skip


def torch_loss_and_gradient(objective: Objective, stored: Stored, batch: Batch) -> tuple[float, list[np.ndarray]]:
    """The direct loss of a trajectory, and its gradient by the student's adapter."""
    weights = torch_weights(STUDENT, leaf=True)
    student_scale = (FOLDED if objective.match == "conditional" else GUIDED)[0]
    total = torch.zeros((), dtype=torch.float64)
    for t, (sigma, sigma_next) in enumerate(itertools.pairwise(map(float, SIGMAS[:-1]))):
        x = torch.tensor(np.float64(stored.x[t]))
        text, null = torch_branches(weights, x, sigma)
        own = guided(text, null, student_scale) if objective.match == "guided" else text
        w = torch_weight(objective.weighting, sigma, sigma_next)
        teacher, anchor = torch_targets(x, sigma, objective.match, batch)
        for factor, (v, difference) in ((1.0, teacher), (objective.mar_beta, anchor)):
            square = ((own - v) ** 2).mean((1, 2, 3))
            if objective.match == "branches":
                apart = ((text - null - difference) ** 2).mean((1, 2, 3))
                square = square + objective.branch_weight * apart
            root = square.detach().sqrt()
            gap = w**0.5 * square / (root + 1e-6) if objective.normalise else w * square
            total = total + factor * gap.sum()
    loss = total / (len(SIGMAS) - 2) / len(stored.x[0])
    loss.backward()
    return float(loss.detach()), [leaf.grad.numpy() for leaf in jax.tree.leaves(weights)]


# ---- comparison

EVERY = list(itertools.product(MATCHES, (False, True), (False, True), WEIGHTINGS))
QUICK = {
    (match, normalise, (m + normalise) % 2 == 0, WEIGHTINGS[2 * m + normalise])
    for (m, match), normalise in itertools.product(enumerate(MATCHES), (False, True))
}


@functools.cache
def trajectory() -> Stored:
    """The guided student's own; targets are left out, so that they are asked for."""
    pieces = make_pieces(spec_of(Objective("direct")))
    stored = quick(collect, pieces)(frozen_of(BANK), make_state(), batch_of(soft=False))
    return dataclasses.replace(stored, targets=None)


@pytest.mark.parametrize(
    ("match", "normalise", "soft", "weighting"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in EVERY],
    ids=lambda value: {True: "yes", False: "no"}.get(value, value),
)
def test_loss_and_gradient_are_pytorchs(match: str, normalise: bool, soft: bool, weighting: str) -> None:
    objective = Objective(
        "direct", weighting=weighting, match=match, branch_weight=0.6, normalise=normalise, mar_beta=0.4
    )
    spec, batch, stored = spec_of(objective, soft=soft), batch_of(soft=soft), trajectory()
    spec.check(BATCH)
    found, gradient, _ = quick(loss_and_gradient, make_pieces(spec))(bank_of(soft=soft), STUDENT, batch, stored)
    expected, by_torch = torch_loss_and_gradient(objective, stored, batch)
    error = relative_error(jax.tree.leaves(gradient), by_torch)
    print(f"{match} {weighting}: loss {abs(float(found) / expected - 1):.1e}, gradient {error:.1e}")
    assert float(found) == pytest.approx(expected, rel=TOLERANCE)
    assert error <= TOLERANCE


def test_every_setting_occurs_by_default() -> None:
    assert not QUICK - set(EVERY)
    assert {case[3] for case in QUICK} == set(WEIGHTINGS)
    for i, k in itertools.combinations(range(3), 2):
        assert {(case[i], case[k]) for case in QUICK} == {(case[i], case[k]) for case in EVERY}
