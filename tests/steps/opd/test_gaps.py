"""The gap by task and timestep: against a plain loop over timesteps, in every form of the update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fopd_jax.config.schema import EMA
from fopd_jax.running.means import Means, split
from fopd_jax.steps.opd.gaps import gap_names, timesteps
from fopd_jax.steps.opd.pieces import Pieces, metric_names, student_velocity
from fopd_jax.steps.opd.replay import collect, replay
from fopd_jax.steps.opd.spec import OPDSpec
from fopd_jax.steps.opd.step import fused
from tests.steps.opd.network import (
    ALWAYS,
    BANK,
    CLIPPED,
    DIRECT,
    TEACHERS,
    WINDOW,
    frozen_of,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    quick,
)

SIZE, STILL = 4, optax.sgd(0.0)


def metrics_of(spec: OPDSpec, seed: int = 1) -> tuple[Any, dict[str, Any]]:
    """The state after one update that moves nothing, and its metrics."""
    update = replay if spec.replays else fused
    batch, pieces = jax.tree.map(jnp.asarray, make_batch(SIZE, seed)), make_pieces(spec)
    return quick(update, pieces, STILL, EMA())(frozen_of(BANK), make_state(), batch)


def plain_gaps(spec: OPDSpec) -> dict[str, float]:
    """A Python loop over timesteps, tasks and samples of the rollout that `collect` stores, in NumPy's float64."""
    pieces, batch, state = make_pieces(dataclasses.replace(spec, gaps=False)), make_batch(SIZE), make_state()
    frozen, first = frozen_of(BANK), spec.window[0]
    stored = quick(collect, pieces)(frozen, state, jax.tree.map(jnp.asarray, batch))
    ask, found = quick(student_velocity, pieces), {}
    for slot in range(stored.x.shape[0]):
        sigma = jnp.asarray(spec.sigmas[first + slot])
        conditioning = jax.tree.map(jnp.asarray, batch.conditioning)
        v = np.float64(ask(frozen, state.trained, conditioning, stored.x[slot], sigma))
        squares = np.square(v - np.float64(stored.targets.teacher[slot])).mean((1, 2, 3))
        for k, name in enumerate(TEACHERS):
            found[f"gap/{name}/t{first + slot:02d}"] = squares[batch.route == k].mean()
    return found


@pytest.mark.parametrize(
    "fields", [{}, {"trained": (1, 4)}, {"updates_per_rollout": 2, "minibatches": 2}], ids=["fused", "window", "replay"]
)
def test_gaps_are_those_of_a_plain_loop(fields: dict[str, Any]) -> None:
    spec = make_spec(CLIPPED, gaps=True, **fields)
    _, metrics = metrics_of(spec)
    expected = plain_gaps(spec)
    assert {name for name in metrics if name.startswith("gap/")} == expected.keys() == set(gap_names(spec))
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    scalars = {name for name in metrics if not name.startswith(("samples/", "weights/"))}
    assert scalars == set(metric_names(spec.teachers, gap_names(spec)))


@pytest.mark.parametrize(
    ("spec", "counted"),
    [
        (make_spec(CLIPPED, gaps=True), 4 * SIZE),
        (make_spec(CLIPPED, gaps=True, noisy=WINDOW), 2 * SIZE),
        (make_spec(CLIPPED, gaps=True, updates_per_rollout=4, minibatches=2), 2 * 4 * SIZE),
        (make_spec(DIRECT, gaps=True, one_timestep=True, noisy=ALWAYS), SIZE),
    ],
    ids=["fused", "noise window", "replay", "one timestep"],
)
def test_their_mean_over_all_that_counts_is_the_velocity_mse(spec: OPDSpec, counted: int) -> None:
    _, metrics = metrics_of(spec)
    weights = {name: float(metrics[f"weights/{name}"]) for name in gap_names(spec)}
    assert sum(weights.values()) == counted
    mean = sum(weights[name] * float(metrics[name]) for name in weights) / counted
    np.testing.assert_allclose(mean, metrics["velocity_mse"], rtol=1e-5)


def test_a_timestep_or_task_that_is_not_there_leaves_means_alone() -> None:
    spec = make_spec(CLIPPED, gaps=True, noisy=WINDOW)
    _, metrics = metrics_of(spec)
    scalars = {name: float(value) for name, value in metrics.items() if not name.startswith("samples/")}
    means = Means()
    means.add(*split(scalars))
    there = {name for name in means.take() if name.startswith("gap/")}
    assert there == {f"gap/{name}/{t}" for name in TEACHERS for t in ("t01", "t02")}


def test_measuring_moves_nothing_of_the_update() -> None:
    """The same state to the bit."""
    optimizer, frozen, batch = optax.sgd(0.1), frozen_of(BANK), jax.tree.map(jnp.asarray, make_batch(SIZE))

    def run(pieces: Pieces) -> Any:
        return quick(fused, pieces, optimizer, EMA())(frozen, make_state(), batch)

    plain, measured = (make_pieces(make_spec(CLIPPED, gaps=gaps)) for gaps in (False, True))
    (state, metrics), (other, more) = run(plain), run(measured)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    assert not timesteps(plain.spec)
    for name, value in metrics.items():
        np.testing.assert_array_equal(more[name], value, err_msg=name)
