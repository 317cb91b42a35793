"""The whole step, in both forms: what is not finite does not land, and nothing is compiled twice."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from fopd_jax.config.schema import EMA, Optimizer
from fopd_jax.steps.opd.pieces import metric_names
from fopd_jax.steps.opd.replay import replay
from fopd_jax.steps.opd.step import fused, make_step
from fopd_jax.steps.state import init_state, make_optimizer
from fopd_jax.worlds.prompt_stream import Batch
from tests.steps.opd.network import (
    BANK,
    BATCH,
    CLIPPED,
    STUDENT,
    frozen_of,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    prompts,
    quick,
    relative_error,
)


@pytest.mark.parametrize(("updates", "minibatches"), [(1, 1), (2, 1)], ids=["fused", "replay"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_does_not_land(updates: int, minibatches: int, value: float) -> None:
    spec = make_spec(CLIPPED, updates_per_rollout=updates, minibatches=minibatches)
    optimizer, update = make_optimizer(Optimizer(1e-2, 1, (0.9, 0.999), 1e-4, 1.0)), fused if updates == 1 else replay
    run, state = quick(update, make_pieces(spec), optimizer, EMA(0.5, 1)), init_state(STUDENT, optimizer, 5)
    bad = make_batch(4)
    bad.conditioning.pooled[2] = value
    with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
        after, metrics = run(frozen_of(BANK), state, bad)
        moved, landed = run(frozen_of(BANK), after, make_batch(4))
    assert (int(after.step), int(moved.step)) == (1, 2)
    for name in ("trained", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
        assert relative_error(getattr(moved, name), getattr(state, name)) > 1e-6
    assert (float(metrics["skipped"]), float(landed["skipped"])) == (1, 0)
    assert np.isfinite(metrics["samples/loss"]).tolist() == [True, True, False, True]
    assert np.isfinite(landed["samples/loss"]).all()


def test_losses_by_sample_average_to_the_loss() -> None:
    for updates, minibatches in ((1, 1), (3, 3)):
        spec = make_spec(CLIPPED, updates_per_rollout=updates, minibatches=minibatches)
        run = quick(fused if updates == 1 else replay, make_pieces(spec), optax.sgd(0.0), EMA())
        _, metrics = run(frozen_of(BANK), make_state(), make_batch())
        assert metrics["samples/loss"].shape == (BATCH,)
        np.testing.assert_allclose(metrics["samples/loss"].mean(), metrics["loss"], rtol=1e-5)
        scalars = {name for name in metrics if not name.startswith(("samples/", "weights/"))}
        assert scalars == set(metric_names(spec.teachers))


@pytest.mark.parametrize(("updates", "minibatches"), [(1, 1), (4, 2)], ids=["fused", "replay"])
def test_the_step_compiles_once(updates: int, minibatches: int) -> None:
    traced: list[int] = []
    spec = make_spec(CLIPPED, updates_per_rollout=updates, minibatches=minibatches)
    spec.check(4)
    optimizer = make_optimizer(Optimizer(1e-3, 2, (0.9, 0.999), 1e-4, 1.0))
    run: Any = make_step(make_pieces(spec, traced), optimizer, EMA())
    frozen, state = frozen_of(BANK), init_state(STUDENT, optimizer, 5)
    with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
        state, _ = run(frozen, state, make_batch(4, seed=0))
        first = len(traced)
        for n, route in enumerate(([0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]), start=1):
            state, metrics = run(frozen, state, Batch(prompts(n, 4), np.asarray(route)))
    assert run._cache_size() == 1
    assert len(traced) == first > 0
    assert int(state.step) == 4
    assert all(np.isfinite(value).all() for value in metrics.values())
