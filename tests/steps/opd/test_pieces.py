"""The noise that a step starts from, and the means that it reports."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fopd_jax.flow.transition import standard_normal
from fopd_jax.objectives.opd import TERMS
from fopd_jax.steps.opd.pieces import mean_metrics, start
from fopd_jax.steps.state import TrainState, init_state
from tests.steps.opd.network import BATCH, DIRECT, SHAPE, STEPS, TEACHERS, adapter, make_spec, make_state


def noise(state: TrainState, size: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    x, keys = start(make_spec(DIRECT), state, size)
    return np.asarray(x), np.asarray(jax.random.key_data(keys))


def test_noise_depends_on_seed_and_step_alone() -> None:
    state = make_state()
    x, keys = noise(state)
    assert x.shape == (BATCH, *SHAPE)
    assert keys.shape[:2] == (STEPS - 1, BATCH)
    assert len(np.unique(keys.reshape(-1, keys.shape[-1]), axis=0)) == (STEPS - 1) * BATCH
    other_history = init_state(adapter(80), optax.adam(1e-3), 5)
    for left, right in zip(noise(other_history), (x, keys), strict=True):
        np.testing.assert_array_equal(left, right)
    for other in (dataclasses.replace(state, step=jnp.int32(1)), make_state(seed=6)):
        other_x, other_keys = noise(other)
        assert (other_x != x).mean() > 0.99
        assert (other_keys != keys).any(-1).all()


def test_the_start_shares_no_noise_with_the_steps() -> None:
    x, keys = start(make_spec(DIRECT), make_state(), BATCH)
    drawn = np.stack([x, *(standard_normal(each, SHAPE) for each in keys)]).reshape(-1, x[0].size)  # step and sample
    correlation = np.corrcoef(drawn)[~np.eye(len(drawn), dtype=bool)]
    assert np.abs(correlation).max() < 5 / np.sqrt(x[0].size)


def test_noise_of_a_sample_does_not_depend_on_the_batch_size() -> None:
    state = make_state()
    (x, keys), (more_x, more_keys) = noise(state), noise(state, 2 * BATCH)
    np.testing.assert_array_equal(more_x[:BATCH], x)
    np.testing.assert_array_equal(more_keys[:, :BATCH], keys)


def test_metrics_are_means_and_a_missing_task_reports_zero() -> None:
    totals = {name: jnp.asarray([1.0, 2.0, 6.0]) for name in TERMS} | {"weight": jnp.asarray([4.0, 4.0, 4.0])}
    metrics = mean_metrics(totals, jnp.asarray([1, 1, 1]), TEACHERS)
    assert float(metrics["loss"]) == 0.75
    assert float(metrics["teacher_gap/counting"]) == 0.75
    assert (float(metrics["teacher_gap/ocr"]), float(metrics["weights/teacher_gap/ocr"])) == (0, 0)
    assert float(metrics["weights/teacher_gap/counting"]) == 12
    metrics = mean_metrics(totals, jnp.asarray([0, 1, 0]), TEACHERS)
    assert (float(metrics["teacher_gap/ocr"]), float(metrics["teacher_gap/counting"])) == (0.875, 0.5)
