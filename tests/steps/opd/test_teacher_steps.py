"""Targets along the teachers' own way from a state: order of convergence, each form of asking, and all forms of update.

`ask` at one state, which `test_targets.py` holds to the network by hand, is the oracle of asking along the way.
"""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import EMA, Objective
from fopd_jax.flow.schedule import Level, sublevels
from fopd_jax.objectives.opd import Targets
from fopd_jax.steps.opd.one_timestep import picked_gradients
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.replay import collect, loss_and_gradient, replay
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.opd.step import fused
from fopd_jax.steps.opd.targets import ask
from fopd_jax.worlds.prompt_stream import Batch, Mix
from tests.steps.opd.network import (
    BANK,
    BATCH,
    CLIPPED,
    DIRECT,
    PLAIN,
    SGD,
    SHAPE,
    SIGMAS,
    adapter,
    check,
    frozen_of,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    normal,
    quick,
    scaled_sum,
)
from tests.steps.opd.test_mixed import ADVANTAGE, MIXED, batch_of, mix, moved

STEPS = 3  # of the teachers
FINER = sublevels(SIGMAS, STEPS)


# ---- of a field whose flow is known: that of images drawn from N(0, std²)


def gaussian(variables: Any, bank: Any, x: Any, sigma: Any, conditioning: Any, route: Any = None) -> Any:
    """Velocity x·(sigma - (1 - sigma)·std²)/((1 - sigma)²·std² + sigma²), std of a bank's entry or of the network."""
    std = bank["std"][route] if bank else variables["params"]["std"]
    sigma = jnp.broadcast_to(sigma, x.shape[:1])
    slope = (sigma - (1 - sigma) * std**2) / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return x * slope[:, None, None, None]


def exact_chord(x: Any, std: Any, start: float, stop: float) -> Any:
    """The flow scales a state as the images' and noise's standard deviation together."""
    spread = [np.sqrt((1 - each) ** 2 * std**2 + each**2) for each in (start, stop)]
    return x * ((spread[1] / spread[0] - 1) / (stop - start))[:, None, None, None]


STD = np.array([0.4, 2.0, 0.4], np.float32)  # two teachers; the anchor is like the first
ROUTE = np.array([1, 0, 1])


def of_gaussians(steps: int, networks: bool, t: int = 1) -> tuple[Targets, np.ndarray, Level]:
    """Targets at one step of the schedule, and the states."""
    spec = make_spec(DIRECT, guidance=PLAIN, whole_teachers=networks, between=sublevels(SIGMAS, steps))
    nothing = Conditioning(jnp.zeros((BATCH, 1, 1)), jnp.zeros((BATCH, 1)))
    frozen = Frozen({"params": {"std": jnp.ones(())}, "constants": {}}, {"std": jnp.asarray(STD)}, nothing)
    batch = Batch(nothing, jnp.asarray(ROUTE))
    x, level = normal(0, BATCH, *SHAPE), jax.tree.map(lambda leaf: leaf[t], spec.levels(*spec.window))
    return jax.jit(partial(ask, Pieces(spec, gaussian)))(frozen, batch, jnp.asarray(x), level), x, level


@pytest.mark.parametrize("networks", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["adapters", "networks"])
def test_the_target_converges_to_the_exact_flows_chord_in_first_order(networks: bool):
    """Errors of m = 16, 32, 64 steps: order between 0.9 and 1.1 by their slope, each below the one before."""
    counts, errors = np.array([16, 32, 64]), []
    for steps in counts:
        found, x, level = of_gaussians(int(steps), networks)
        exact = exact_chord(np.float64(x), np.float64(STD[ROUTE]), float(level.sigma), float(level.sigma_next))
        errors.append(np.linalg.norm(found.teacher - exact) / np.linalg.norm(exact))
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    print(f"errors {errors}, order {order:.3f}")
    assert 0.9 < order < 1.1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_an_anchor_that_agrees_with_the_teacher_is_no_pull():
    """As it would be at the state alone: there the tangent is another velocity than the chord."""
    chord, *_ = of_gaussians(STEPS, networks=False)
    tangent, *_ = of_gaussians(1, networks=False)
    same = ROUTE == 0
    np.testing.assert_allclose(chord.anchor[same], chord.teacher[same], rtol=1e-6)
    assert np.abs(tangent.anchor[same] - chord.teacher[same]).mean() > 0.01
    assert np.abs(chord.anchor[~same] - chord.teacher[~same]).mean() > 0.1


# ---- of a network, step by step


def by_hand(spec: OPDSpec, frozen: Frozen, batch: Batch, x: Any, level: Level, pick: Any) -> tuple[Any, Any, Any]:
    """The chord of the teachers' steps, one at a time, and the mean of what the anchor says on the way."""
    plain = dataclasses.replace(spec, between=None)
    say = quick(ask, make_pieces(plain))
    ends = [level.sigma, *np.moveaxis(np.asarray(level.between), -1, 0), level.sigma_next]
    at, anchors, counts = jnp.asarray(x), [], None
    for start, stop in itertools.pairwise(ends):
        sigma, sigma_next = jnp.asarray(start), jnp.asarray(stop)
        said = say(frozen, batch, at, Level(sigma, sigma_next), pick)
        step, counts = np.asarray(stop - start).reshape(-1, 1, 1, 1), said.anchored
        at = at + step * said.teacher
        anchors.append(np.float64(said.anchor) * np.float64(step))
    whole = np.asarray(level.sigma_next - level.sigma).reshape(-1, 1, 1, 1)
    return (np.float64(at) - np.float64(x)) / whole, sum(anchors) / whole, counts


BATCH_OF = {True: BATCH, False: 6}
EXTRAPOLATED = {**BANK, "base": adapter(80)}
WEIGHTS = np.array([[[1, 0], [0.25, 0.75]]] * BATCH, np.float32)
MIX = Mix(np.broadcast_to(np.arange(2, dtype=np.int32), (BATCH, 2)), WEIGHTS)
ASKED: dict[str, Any] = {  # fields of the spec, a mix, whether the anchor is asked about some, whether levels are apart
    "hard, guided": ({}, None, False, False),
    "soft by the noise level": ({}, MIX, False, False),
    "extrapolated": ({"extrapolation": (0.5, 0.0)}, None, False, False),
    "some samples' anchor": ({"anchor_every": 3}, None, True, False),
    "a level a sample": ({}, None, False, True),
}


@pytest.mark.parametrize("case", ASKED)
def test_targets_are_means_along_the_teachers_own_steps(case: str):
    fields, mix, some, apart = ASKED[case]
    size = BATCH_OF[not some]
    spec = make_spec(DIRECT, between=FINER, **fields)
    frozen = frozen_of(EXTRAPOLATED if "extrapolation" in fields else BANK)
    batch = dataclasses.replace(jax.tree.map(jnp.asarray, make_batch(size)), mix=jax.tree.map(jnp.asarray, mix))
    x = normal(3, size, *SHAPE)
    places = jnp.asarray([2, 0, 1]) if apart else 1
    level = jax.tree.map(lambda leaf: leaf[places], spec.levels(*spec.window))
    pick = jnp.asarray([2, 0]) if some else None
    found = quick(ask, make_pieces(spec))(frozen, batch, jnp.asarray(x), level, pick)
    teacher, anchor, counts = by_hand(spec, frozen, batch, x, level, pick)
    check(found.teacher, teacher)
    check(found.anchor, anchor)
    assert (counts is None) == (found.anchored is None) == (not some)
    if some:
        np.testing.assert_array_equal(found.anchored, counts)
    tangent = quick(ask, make_pieces(spec))(
        frozen, batch, jnp.asarray(x), dataclasses.replace(level, between=None), pick
    )
    assert np.abs(tangent.teacher - found.teacher).mean() > 0.01


def test_one_step_is_asking_at_the_state():
    """Up to rounding where it is written as one; the default has no levels within its steps, nor a loop."""
    spec, batch, x = make_spec(DIRECT), jax.tree.map(jnp.asarray, make_batch()), jnp.asarray(normal(3, BATCH, *SHAPE))
    one = dataclasses.replace(spec, between=sublevels(SIGMAS, 1))
    found = []
    for each, loops in ((spec, False), (one, True)):
        level = jax.tree.map(lambda leaf: leaf[0], each.levels(*each.window))
        program = jax.make_jaxpr(partial(ask, make_pieces(each)))(frozen_of(BANK), batch, x, level)
        assert ("scan" in str(program)) == loops
        found.append(quick(ask, make_pieces(each))(frozen_of(BANK), batch, x, level))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), *found)


@pytest.mark.parametrize(("beta", "rows"), [(0.3, 4 * BATCH), (0.0, 2 * BATCH)])
def test_every_step_takes_one_forward_of_as_many_rows(beta: float, rows: int):
    seen: list[int] = []
    spec = make_spec(dataclasses.replace(DIRECT, mar_beta=beta), between=FINER)
    batch, x = jax.tree.map(jnp.asarray, make_batch()), jnp.zeros((BATCH, *SHAPE))
    level = jax.tree.map(lambda leaf: leaf[0], spec.levels(*spec.window))
    program = jax.make_jaxpr(partial(ask, make_pieces(spec, seen)))(frozen_of(BANK), batch, x, level)
    assert set(seen) == {rows}
    (loop,) = [each for each in program.eqns if each.primitive.name == "scan"]
    assert loop.params["length"] == STEPS == spec.teacher_steps


# ---- forms of the update


def test_every_form_has_the_same_gradient():
    """Stored and gone through again, and one timestep at a time; the plain one is below."""
    spec, state, batch, frozen = make_spec(DIRECT, between=FINER), make_state(), make_batch(), frozen_of(BANK)
    one = quick(picked_gradients, make_pieces(dataclasses.replace(spec, one_timestep=True)))
    shares, _ = spec.shares()
    parts = [one(frozen, state, batch, jnp.full(BATCH, t))[0] for t in range(len(shares))]
    stored = quick(collect, make_pieces(spec))(frozen, state, batch)
    _, whole, _ = quick(loss_and_gradient, make_pieces(spec))(frozen, state.trained, batch, stored)
    check(scaled_sum(parts, shares), whole)


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("conditional", {"micro_batches": 3}),
        pytest.param("guided", {"trained": (1, 3), "anchor_every": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_update_of_stored_rollouts_is_the_plain_one(match: str, fields: dict[str, Any]):
    """On policy they are one, in whatever parts; also where the teachers' guidance is folded in."""
    spec = make_spec(dataclasses.replace(CLIPPED, clip=0.01, match=match), between=FINER, **fields)
    single = dataclasses.replace(spec, micro_batches=1)
    after, metrics = quick(replay, make_pieces(spec), SGD, EMA())(frozen_of(BANK), make_state(), make_batch(6))
    expected, known = quick(fused, make_pieces(single), SGD, EMA())(frozen_of(BANK), make_state(), make_batch(6))
    check(moved(after), moved(expected))
    np.testing.assert_allclose(metrics["teacher_gap"], known["teacher_gap"], rtol=1e-5)


@pytest.mark.slow
def test_beside_rewards_it_is_the_same_target():
    """Objective 'mixed' without a weight of the tasks' is the clipped one, in several updates a rollout."""
    objective = dataclasses.replace(MIXED, task_weight=0.0)
    spec = make_spec(objective, between=FINER, updates_per_rollout=2, minibatches=2)
    after, metrics, _ = mix(spec, ADVANTAGE)
    plain = dataclasses.replace(spec, objective=dataclasses.replace(objective, name="clipped"))
    expected, known = quick(replay, make_pieces(plain), SGD, EMA())(frozen_of(BANK), make_state(), batch_of())
    check(moved(after), moved(expected), 1e-6)
    np.testing.assert_allclose(metrics["anchor_gap"], known["anchor_gap"], rtol=1e-5)


def test_branches_are_refused():
    spec = make_spec(Objective("direct", match="branches"), between=FINER)
    with pytest.raises(
        ValueError, match=r"^sampler\.teacher_steps: found 3, expected 1 with objective\.match 'branches'"
    ):
        spec.check(6)
