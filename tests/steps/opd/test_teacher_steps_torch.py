"""The loss along the teachers' own way against PyTorch, on a stored trajectory of the true network, PyTorch's.

As `test_torch.py`, at its tolerances; the teachers' steps are gone again by hand, in float64.
"""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch

from fopd_jax.config.schema import Objective
from fopd_jax.flow.schedule import sublevels
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.replay import loss_and_gradient
from fopd_jax.steps.visits import Stored
from tests.steps.opd.test_torch import (
    BANK,
    EVERYWHERE,
    SIGMAS,
    TOLERANCE,
    Visit,
    adapted,
    adapter,
    check_gradient,
    drawn_noise,
    make_pieces,
    our_inputs,
    prompts,
    torch_factors,
    torch_loss_and_gradient,
    torch_rollout,
    torch_teachers,
)

STEPS = 3
FINER = sublevels(SIGMAS, STEPS)


@torch.no_grad()
def taken_on(visit: Visit, within: list[float]) -> Visit:
    """The teachers walk from the state, each sample's own; what they and the anchor say is averaged on the way."""
    frozen, text = {name: adapted(torch_factors(adapter(seed).weights)) for name, seed in BANK.items()}, prompts(900, 3)
    ends, x = [visit.sigma, *within, visit.sigma_next], visit.x
    anchor = torch.zeros_like(x)
    for start, stop in itertools.pairwise(ends):
        teacher, said = torch_teachers(frozen, x, start, text)
        x, anchor = x + (stop - start) * teacher, anchor + (stop - start) * said
    whole = visit.sigma_next - visit.sigma
    return dataclasses.replace(visit, targets=[(x - visit.x) / whole, anchor / whole])


def stacked(tensors: list[torch.Tensor]) -> jax.Array:
    return jnp.asarray(torch.stack(tensors).numpy(), jnp.float32)


@pytest.mark.slow
def test_loss_and_gradient_are_pytorchs() -> None:
    objective = Objective("direct", mar_beta=0.5)
    plain = make_pieces(objective, EVERYWHERE)
    pieces = Pieces(dataclasses.replace(plain.spec, between=FINER), plain.velocity)
    frozen, state, batch = our_inputs()
    visits = torch_rollout(EVERYWHERE, *drawn_noise(plain))
    stored = Stored(*(stacked([getattr(each, name) for each in visits]) for name in ("x", "x_next", "log_prob")))
    loss, gradient, _ = jax.jit(partial(loss_and_gradient, pieces))(frozen, state.trained, batch, stored)
    expected_loss, expected = torch_loss_and_gradient(
        objective, [taken_on(visit, FINER[t].tolist()) for t, visit in enumerate(visits)], adapter(1).weights
    )
    print(f"loss {abs(float(loss) / expected_loss - 1):.1e}")
    assert float(loss) == pytest.approx(expected_loss, rel=TOLERANCE)
    check_gradient("along the teachers' way", gradient, expected)
