"""The anchor that follows the student, and its weight that learns: in every form of the update, and against PyTorch.

Tolerances on ‖a - b‖/‖b‖: 1e-4 of gradients against PyTorch's in float64, fixed beforehand.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from fopd_jax.config.schema import EMA, Objective
from fopd_jax.flow.transition import SDE
from fopd_jax.flow.weighting import weight
from fopd_jax.objectives.dual import dual_ascent
from fopd_jax.steps.opd import mixed
from fopd_jax.steps.opd.anchor import following
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.pieces import Pieces, metric_names, regular_names
from fopd_jax.steps.opd.replay import collect, replay, replayed_gradients
from fopd_jax.steps.opd.spec import Bound, OPDSpec
from fopd_jax.steps.opd.step import fused
from fopd_jax.steps.opd.targets import anchor_picks, ask
from fopd_jax.steps.state import TrainState, init_state
from fopd_jax.steps.student import network
from tests.steps.opd.network import (
    BANK,
    BATCH,
    CLIPPED,
    DIRECT,
    GUIDED,
    SGD,
    SHAPE,
    SIGMAS,
    STUDENT,
    TEACHERS,
    adapter,
    check,
    frozen_of,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    make_velocity,
    quick,
    variables,
)
from tests.steps.opd.test_mixed import ADVANTAGE, MIXED, batch_of, credit_of, drive
from tests.steps.opd.torch_network import torch_factors, torch_velocity

STILL = EMA(decay=0.0, every=1)  # the average is what trains, after every step
BOUND = Bound(gap=0.02, rate=0.3, limits=(1e-3, 10.0))
UPDATES = {
    "fused": (fused, CLIPPED, {}),
    "one timestep": (fused, DIRECT, {"one_timestep": True}),
    "replay": (replay, CLIPPED, {"updates_per_rollout": 1, "micro_batches": 3}),
}


def moving(objective: Objective, moves: str = "ema", guidance: Any = GUIDED, **fields: Any) -> OPDSpec:
    return make_spec(objective, guidance=guidance, anchor_moves=moves, **fields)


def state_of(student: Any = STUDENT, average: Any = None, old: Any = None, beta: float | None = None) -> TrainState:
    state = init_state(student, SGD, 5, beta=beta)
    return dataclasses.replace(state, ema=state.ema if average is None else average, old=old)


# ---- where it is


@pytest.mark.parametrize("form", ["fused", "replay", pytest.param("one timestep", marks=pytest.mark.slow)])
def test_the_gap_is_exactly_nothing_where_the_average_is_what_trains(form: str) -> None:
    """At the start, and after a step with decay 0."""
    update, objective, fields = UPDATES[form]
    run, batch = quick(update, make_pieces(moving(objective, **fields)), SGD, STILL), make_batch()
    after, first = run(frozen_of(BANK), state_of(), batch)
    _, second = run(frozen_of(BANK), after, batch)
    assert (float(first["anchor_gap"]), float(second["anchor_gap"])) == (0.0, 0.0)
    assert float(second["teacher_gap"]) > 0
    _, third = run(frozen_of(BANK), dataclasses.replace(after, ema=STUDENT), batch)
    assert float(third["anchor_gap"]) > 1e-6


@pytest.mark.parametrize("match", ["conditional", "branches"])
def test_it_is_compared_as_the_student_is(match: str) -> None:
    """Whatever of the student is held to targets: of equal weights the gap is rounding, of others it is not."""
    spec = moving(dataclasses.replace(DIRECT, match=match))
    run = quick(fused, make_pieces(spec), SGD, STILL)
    _, same = run(frozen_of(BANK), state_of(), make_batch())
    _, other = run(frozen_of(BANK), state_of(average=adapter(60)), make_batch())
    assert float(same["anchor_gap"]) <= 1e-10 * float(other["anchor_gap"])


def test_a_whole_network_is_its_own_anchor_too() -> None:
    params = variables()["params"]
    pieces = Pieces(moving(CLIPPED), make_velocity(), network(jnp.float32))
    state, frozen = init_state(params, SGD, 5), frozen_of(BANK)
    frozen = dataclasses.replace(frozen, variables={**frozen.variables, "constants": {}})
    run = quick(fused, pieces, SGD, STILL)
    _, same = run(frozen, state, make_batch())
    moved = dataclasses.replace(state, ema=jax.tree.map(lambda leaf: leaf + 0.1, params))
    _, other = run(frozen, moved, make_batch())
    assert float(same["anchor_gap"]) == 0
    assert float(other["anchor_gap"]) > 0


def test_the_same_weights_in_the_bank_are_the_same_target() -> None:
    """What the average says is what a bank entry of its weights says, asked under the student's scale."""
    other, batch = adapter(60), make_batch()
    spec = moving(CLIPPED)
    here, totals = quick(fused_gradients, make_pieces(spec))(
        following(make_pieces(spec), frozen_of(BANK), state_of(average=other)), state_of(average=other), batch
    )
    scales = (*GUIDED[1][:-1], GUIDED[0])
    there = make_spec(CLIPPED, guidance=(GUIDED[0], scales))
    expected, known = quick(fused_gradients, make_pieces(there))(
        frozen_of({**BANK, "anchor": other}), state_of(), batch
    )
    check(here, expected)
    np.testing.assert_allclose(totals["anchor_gap"], known["anchor_gap"], rtol=1e-4)


def test_it_may_see_one_sample_in_three() -> None:
    """The samples that are picked, with the answers that they have alone, three times."""
    spec = moving(CLIPPED, anchor_every=3)
    pieces, state, batch = make_pieces(spec), state_of(average=adapter(60)), jax.tree.map(jnp.asarray, make_batch(6))
    frozen = following(pieces, frozen_of(BANK), state)
    picks = anchor_picks(spec, state, 6)
    assert picks is not None
    x, level = jnp.asarray(np.random.default_rng(0).normal(size=(6, *SHAPE)), jnp.float32), spec.levels(1, 2)
    level = jax.tree.map(lambda leaf: leaf[0], level)
    some = quick(ask, pieces)(frozen, batch, x, level, picks[1])
    whole = quick(ask, pieces)(frozen, batch, x, level)
    counted = np.asarray(some.anchored)
    assert sorted(counted.tolist()) == [0, 0, 0, 0, 3, 3]
    np.testing.assert_array_equal(np.flatnonzero(counted), np.asarray(picks[1]) + np.array([0, 3]))
    np.testing.assert_allclose(some.anchor[counted > 0], whole.anchor[counted > 0], rtol=1e-5, atol=1e-6)
    assert whole.anchored is None


def test_a_slow_anchor_is_a_copy_of_its_own() -> None:
    """It moves by its decay at each step, whatever the average does."""
    spec = moving(CLIPPED, "slow", anchor_decay=0.75)
    state = state_of(old=jax.tree.map(jnp.copy, adapter(60)), average=adapter(40))
    after, metrics = quick(fused, make_pieces(spec), SGD, EMA())(frozen_of(BANK), state, make_batch())
    check(after.old, jax.tree.map(lambda o, x: 0.75 * o + 0.25 * x, state.old, after.trained), 1e-6)
    as_average = quick(fused, make_pieces(moving(CLIPPED)), SGD, EMA())
    _, same = as_average(frozen_of(BANK), state_of(average=adapter(60)), make_batch())
    assert float(metrics["anchor_gap"]) == float(same["anchor_gap"])


def test_without_parameters_of_it_whoever_asks_is_told() -> None:
    with pytest.raises(ValueError, match=r"anchor\.moves: found no parameters of the moving anchor"):
        quick(fused_gradients, make_pieces(moving(CLIPPED)))(frozen_of(BANK), state_of(), make_batch())


def test_an_anchor_without_weight_is_not_asked_whatever_it_is() -> None:
    """The very program that has none."""
    none = dataclasses.replace(CLIPPED, mar_beta=0.0)
    arguments = frozen_of(BANK), state_of(), make_batch()
    programs = [partial(fused, make_pieces(each), SGD, EMA()) for each in (make_spec(none), moving(none))]
    texts = {str(jax.make_jaxpr(program)(*arguments)) for program in programs}
    assert len(texts) == 1


# ---- its weight


def expected_beta(beta: float, gap: Any) -> float:
    return float(dual_ascent(jnp.float32(beta), jnp.asarray(gap), BOUND.gap, BOUND.rate, BOUND.limits))


@pytest.mark.parametrize(
    "form", ["fused", *(pytest.param(each, marks=pytest.mark.slow) for each in ("one timestep", "replay"))]
)
def test_the_weight_moves_by_the_gap_of_each_step(form: str) -> None:
    """And the loss reads it: the first update is that of an objective with this weight."""
    update, objective, fields = UPDATES[form]
    spec, frozen = make_spec(objective, bound=BOUND, **fields), frozen_of(BANK)
    run, state, beta = quick(update, make_pieces(spec), SGD, EMA()), state_of(beta=2.0), 2.0
    fixed = make_pieces(make_spec(dataclasses.replace(objective, mar_beta=2.0), **fields))
    expected, _ = quick(update, fixed, SGD, EMA())(frozen, state_of(), make_batch())
    for step in range(2):
        state, metrics = run(frozen, state, make_batch())
        assert float(metrics["mar_beta"]) == pytest.approx(beta, rel=1e-6)
        beta = expected_beta(beta, metrics["anchor_gap"])
        assert float(state.beta) == pytest.approx(beta, rel=1e-6)
        if step == 0:
            check(*(jax.tree.map(jnp.subtract, each.trained, STUDENT) for each in (state, expected)), 1e-6)
    assert state.beta.dtype == jnp.float32
    scalars = {name for name in metrics if not name.startswith(("samples/", "weights/"))}
    assert scalars == {*metric_names(TEACHERS), *regular_names(spec)}


def test_mixed_updates_have_both() -> None:
    """The steps that a host drives: the anchor's gap is 0 at first, and β moves by it."""
    spec = make_spec(MIXED, anchor_moves="ema", bound=BOUND)
    programs = mixed.make_programs(make_pieces(spec), SGD, EMA())
    after, metrics, _ = drive(programs, spec, frozen_of(BANK), state_of(beta=0.3), batch_of(), credit_of(ADVANTAGE))
    assert float(metrics["anchor_gap"]) == 0
    assert float(metrics["mar_beta"]) == pytest.approx(0.3)
    assert float(after.beta) == pytest.approx(0.3 * np.exp(-BOUND.rate))
    assert {"mar_beta"} == set(mixed.mixed_names(spec)) - set(mixed.mixed_names(make_spec(MIXED)))


def test_what_is_not_finite_moves_neither() -> None:
    spec = moving(CLIPPED, "slow", anchor_decay=0.5, bound=BOUND)
    bad = make_batch(4)
    bad.conditioning.pooled[2] = np.nan
    state = state_of(old=jax.tree.map(jnp.copy, adapter(60)), beta=0.3)
    after, metrics = quick(fused, make_pieces(spec), SGD, EMA())(frozen_of(BANK), state, bad)
    assert float(metrics["skipped"]) == 1
    for name in ("trained", "ema", "old", "beta"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


def test_limits_have_to_hold_where_the_weight_starts() -> None:
    spec = make_spec(CLIPPED, bound=dataclasses.replace(BOUND, limits=(0.5, 1.0)))
    with pytest.raises(ValueError, match=r"anchor\.bound_limits: found \(0\.5, 1\.0\), expected to hold objective"):
        spec.check(BATCH)


# ---- against PyTorch


def test_the_gradient_is_pytorchs() -> None:
    """Of the direct loss, at a stored rollout, under a weight of the state's; the anchor is not differentiated."""
    average, beta, objective = adapter(60), 1.7, Objective("direct", weighting="kl")
    spec = moving(objective, bound=BOUND)
    pieces, state, batch = make_pieces(spec), state_of(average=average, beta=beta), make_batch()
    frozen = following(pieces, frozen_of(BANK), state)
    stored = quick(collect, pieces)(frozen, state, batch)
    plain = dataclasses.replace(objective, mar_beta=beta)
    found, totals = quick(replayed_gradients, make_pieces(moving(plain)))(frozen, state.trained, batch, stored)

    factors, total = torch_factors(STUDENT.weights, requires_grad=True), torch.zeros((), dtype=torch.float64)
    others = torch_factors(average.weights)
    for t in range(stored.log_prob.shape[0]):
        w = float(weight("kl", SDE(0.7), jnp.float32(SIGMAS[t]), jnp.float32(SIGMAS[t + 1])))
        x, sigma = stored.x[t], float(SIGMAS[t])
        v, anchor = (torch_velocity(each, x, sigma, batch.conditioning, GUIDED[0]) for each in (factors, others))
        teacher = torch.tensor(np.float64(stored.targets.teacher[t]))
        total = total + w * ((v - teacher) ** 2).mean((1, 2, 3)).sum()
        total = total + beta * w * ((v - anchor.detach()) ** 2).mean((1, 2, 3)).sum()
    loss = total / float(totals["weight"].sum())
    expected = torch.autograd.grad(loss, list(factors.values()))
    ours = [found.weights[layer][factor] for layer, factor in factors]
    assert float(totals["loss"].sum() / totals["weight"].sum()) == pytest.approx(float(loss.detach()), rel=1e-4)
    check(ours, [each.numpy() for each in expected], 1e-4)


def test_optimizers_of_ones_own_may_hold_the_state() -> None:
    """A state with β and a slow anchor is a state like any other: as many leaves more, at the end."""
    plain, beside = make_state(), init_state(STUDENT, optax.sgd(0.1), 5, keeps_old=True, beta=0.3)
    names = [[jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(each)] for each in (plain, beside)]
    assert names[1][: len(names[0])] == names[0]
    assert names[1][-1] == ".beta"
