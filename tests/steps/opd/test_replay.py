"""Stored trajectories gone through again: the loss that is differentiated, minibatches, and any given trajectory.

Finite differences run in float64, at 1e-6.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fopd_jax.adapters.lora import Adapter
from fopd_jax.config.schema import EMA
from fopd_jax.flow.rollout import rollout
from fopd_jax.objectives.opd import TERMS, Targets
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.pieces import Pieces, mean_metrics, start, student_policy
from fopd_jax.steps.opd.replay import collect, loss_and_gradient, replay, replayed_gradients
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.state import TrainState
from fopd_jax.steps.visits import Stored, make_passes
from fopd_jax.worlds.prompt_stream import Batch
from tests.steps.opd.network import (
    BANK,
    BATCH,
    CLIPPED,
    DIRECT,
    SGD,
    SHAPE,
    SIGMAS,
    STEPS,
    STUDENT,
    TEACHERS,
    TOLERANCE,
    check,
    frozen_of,
    fused,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    make_velocity,
    normal,
    quick,
    relative_error,
    variables,
)

# ---- the replayed loss is the one that is differentiated

OFF_POLICY = {
    "direct": (DIRECT, 0.05),
    "clipped, on policy": (dataclasses.replace(CLIPPED, clip=0.01), 0.0),
    "clipped, off policy": (dataclasses.replace(CLIPPED, clip=0.01), 0.05),
    "clipped, no weighting": (dataclasses.replace(CLIPPED, clip=0.01, weighting="uniform"), 0.05),
}


@pytest.mark.parametrize("case", OFF_POLICY)
def test_replayed_gradient_by_finite_differences(case: str) -> None:
    """Float64, central differences of step 1e-5, along four random directions and four single entries."""
    objective, distance = OFF_POLICY[case]
    spec = make_spec(objective)
    stored = quick(collect, make_pieces(spec))(frozen_of(BANK), make_state(), make_batch())
    moved = jax.tree.map(lambda leaf: leaf + distance * normal(leaf.size, *leaf.shape), STUDENT)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = dataclasses.replace(spec, sigmas=np.float64(spec.sigmas))
        pieces = Pieces(wide, make_velocity(jnp.float64))
        frozen, batch, stored, moved = (widened(tree) for tree in (frozen_of(BANK), make_batch(), stored, moved))
        run = quick(lambda trained: replayed_gradients(pieces, frozen, trained, batch, stored))

        def loss(trained: Adapter) -> float:
            totals = run(trained)[1]
            return float(totals["loss"].sum() / totals["weight"].sum())

        gradient, totals = run(moved)
        print(f"{case}: share clipped {float(totals['clipped'].sum() / totals['weight'].sum()):.2f}")
        found, numeric = [], []
        for direction in directions(moved):
            up, down = (jax.tree.map(lambda leaf, d, h=h: leaf + h * d, moved, direction) for h in (1e-5, -1e-5))
            numeric.append((loss(up) - loss(down)) / 2e-5)
            found.append(inner(gradient, direction))
        check(np.array(found), np.array(numeric), 1e-6)
        np.testing.assert_allclose(found, numeric, rtol=1e-5, atol=1e-8)


def widened(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf if np.asarray(leaf).dtype.kind == "i" else jnp.asarray(np.float64(leaf)), tree
    )


def inner(left: Adapter, right: Adapter) -> float:
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: float((a * b).sum()), left, right)))


def directions(like: Adapter) -> list[Adapter]:
    random = [
        jax.tree.map(lambda leaf, s=seed: np.float64(normal(s + leaf.size, *leaf.shape)), like) for seed in range(4)
    ]
    single = []
    for chosen in range(len(jax.tree.leaves(like))):
        leaves = [np.zeros(leaf.shape) for leaf in jax.tree.leaves(like)]
        leaves[chosen][0, 1] = 1.0
        single.append(jax.tree.unflatten(jax.tree.structure(like), leaves))
    return random + single


# ---- minibatches


@pytest.mark.parametrize(("updates", "minibatches", "micro"), [(1, 1, 1), (2, 2, 1), (5, 3, 1), (1, 1, 4), (4, 2, 3)])
def test_passes(updates: int, minibatches: int, micro: int) -> None:
    """Every part is rolled out once before anything trains; an update is its minibatch's parts, then it lands."""
    passes, parts = make_passes(updates, minibatches, micro), minibatches * micro
    np.testing.assert_array_equal(passes.part[:parts], range(parts))
    np.testing.assert_array_equal(passes.draws, np.arange(len(passes.part)) < parts)
    np.testing.assert_array_equal(passes.trains, ~passes.draws)
    trained = passes.part[parts:].reshape(updates, micro)
    for update, found in enumerate(trained):
        np.testing.assert_array_equal(found % minibatches, update % minibatches)
        assert len(set(found)) == micro
    np.testing.assert_array_equal(
        passes.lands[parts:].reshape(updates, micro), [[False] * (micro - 1) + [True]] * updates
    )


def rows_of(update: int, minibatches: int, batch: int) -> np.ndarray:
    return np.arange(update % minibatches, batch, minibatches)


def test_replay_is_one_rollout_and_then_plain_updates() -> None:
    """Against a Python loop over its parts, at 1e-5 of the distance moved: two passes over two minibatches."""
    objective = dataclasses.replace(CLIPPED, clip=0.01)
    spec = make_spec(objective, updates_per_rollout=4, minibatches=2)
    pieces = make_pieces(spec)
    frozen, batch, state = frozen_of(BANK), jax.tree.map(jnp.asarray, make_batch(6)), make_state()
    stored: Stored = quick(collect, pieces)(frozen, state, batch)
    gradients_of = quick(replayed_gradients, pieces)
    student, visited, losses, ratios = state.trained, [], [], []
    for rows in (rows_of(update, 2, 6) for update in range(4)):
        part = jax.tree.map(lambda leaf, rows=rows: leaf[:, rows], stored)
        gradients, totals = gradients_of(frozen, student, jax.tree.map(lambda leaf, r=rows: leaf[r], batch), part)
        student = jax.tree.map(lambda x, g: x - 0.1 * g, student, gradients)
        visited.extend(rows)
        losses.append(float(totals["loss"].sum() / totals["weight"].sum()))
        ratios.append(float(totals["ratio"].sum() / totals["weight"].sum()))
    after, metrics = quick(replay, pieces, SGD, EMA())(frozen, state, batch)
    moved = [jax.tree.map(jnp.subtract, each, state.trained) for each in (after.trained, student)]
    check(*moved)
    assert sorted(visited) == sorted([*range(6), *range(6)])
    assert int(after.step) == 1
    np.testing.assert_allclose([metrics["loss"], metrics["ratio"]], [np.mean(losses), np.mean(ratios)], rtol=1e-5)
    assert abs(ratios[0] - 1) < 1e-5 < abs(ratios[-1] - 1)  # on policy at first, off it later


def test_one_pass_without_moving_sees_the_fused_batch() -> None:
    spec = make_spec(CLIPPED, updates_per_rollout=3, minibatches=3)
    batch, state = make_batch(), make_state()
    _, metrics = quick(replay, make_pieces(spec), optax.sgd(0.0), EMA())(frozen_of(BANK), state, batch)
    _, totals = fused(CLIPPED.name)(frozen_of(BANK), state, batch)
    expected = mean_metrics(totals, jnp.asarray(batch.route), TEACHERS)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)


# ---- any given trajectory


def rolled_out(pieces: Pieces, frozen: Frozen, state: TrainState) -> Stored:
    """A rollout without the step's own: flow's, whose last sampler step is left out."""
    spec, conditioning = pieces.spec, jax.tree.map(jnp.asarray, make_batch().conditioning)
    x, keys = start(spec, state, BATCH)
    policy = student_policy(pieces, frozen, state.trained, conditioning)
    found = rollout(policy, spec.transition, spec.levels(0, STEPS - 1), x, keys)
    return Stored(found.latents[:-1], found.latents[1:], found.log_probs)


@pytest.mark.parametrize("every", [1, 3])
def test_a_given_trajectory_has_the_fused_loss_and_gradient(every: int) -> None:
    """Without targets, teachers and anchor are asked about every sample, however often an update asks them."""
    pieces, state, batch = make_pieces(make_spec(CLIPPED, anchor_every=every)), make_state(), make_batch()

    @quick
    def given(frozen: Frozen, state: TrainState, batch: Batch) -> Any:
        return loss_and_gradient(pieces, frozen, state.trained, batch, rolled_out(pieces, frozen, state))

    loss, gradient, totals = given(frozen_of(BANK), state, batch)
    expected, sums = fused(CLIPPED.name)(frozen_of(BANK), state, batch)
    check(gradient, expected)
    np.testing.assert_allclose(loss, sums["loss"].sum() / sums["weight"].sum(), rtol=TOLERANCE)
    assert set(totals) == set(TERMS)
    for name in TERMS:
        np.testing.assert_allclose(totals[name], sums[name], rtol=TOLERANCE, err_msg=name)


def test_targets_of_an_anchor_that_was_asked_about_some_are_taken_as_they_are() -> None:
    """One sample in three, which counts three times: the update's own loss and gradient, by the same draws."""
    pieces, state, batch = make_pieces(make_spec(CLIPPED, anchor_every=3)), make_state(), make_batch()
    stored = quick(collect, pieces)(frozen_of(BANK), state, batch)
    assert np.unique(stored.targets.anchored).tolist() == [0, 3]
    loss, gradient, totals = quick(loss_and_gradient, pieces)(frozen_of(BANK), STUDENT, batch, stored)
    expected, sums = quick(fused_gradients, pieces)(frozen_of(BANK), state, batch)
    check(gradient, expected)
    np.testing.assert_allclose(loss, sums["loss"].sum() / sums["weight"].sum(), rtol=TOLERANCE)
    np.testing.assert_allclose(totals["anchor_gap"], sums["anchor_gap"], rtol=TOLERANCE)
    everyone, _ = fused(CLIPPED.name)(frozen_of(BANK), state, batch)
    assert relative_error(gradient, everyone) > 10 * TOLERANCE


def test_targets_that_are_given_are_not_asked_for() -> None:
    """The mean squares by hand; the bank is zero, so asking it would give another teacher."""
    spec = make_spec(dataclasses.replace(DIRECT, weighting="uniform"))
    pieces, state, batch = make_pieces(spec), make_state(), make_batch()
    frozen = jax.tree.map(jnp.zeros_like, frozen_of(BANK)).replace(variables=variables())

    @quick
    def given(frozen: Frozen, state: TrainState, batch: Batch) -> Any:
        stored = rolled_out(pieces, frozen, state)
        stored = stored.replace(targets=Targets(stored.x + 1, stored.x))
        policy = student_policy(pieces, frozen, state.trained, batch.conditioning)
        v = jnp.stack([policy(x, jnp.float32(sigma)) for x, sigma in zip(stored.x, SIGMAS[:-2], strict=True)])
        return loss_and_gradient(pieces, frozen, state.trained, batch, stored)[0], v, stored

    loss, v, stored = given(frozen, state, batch)
    teacher, anchor = (np.square(np.float64(v) - np.float64(each)).mean() for each in (stored.x + 1, stored.x))
    np.testing.assert_allclose(loss, teacher + 0.3 * anchor, rtol=TOLERANCE)


@pytest.mark.parametrize("part", [slice(1, None), slice(None)], ids=["steps", "samples"])
def test_a_trajectory_of_another_size_is_refused(part: slice) -> None:
    pieces, shape = make_pieces(make_spec(DIRECT)), (STEPS - 1, BATCH)
    x = jnp.zeros((*shape, *SHAPE))[part]
    stored, batch = Stored(x, x, jnp.zeros(shape)[part]), make_batch(BATCH if part.start else 2 * BATCH)
    with pytest.raises(ValueError, match=r"^stored: found \((3|4), 3\) steps and samples, expected \(4, (3|6)\)$"):
        loss_and_gradient(pieces, frozen_of(BANK), STUDENT, batch, stored)
