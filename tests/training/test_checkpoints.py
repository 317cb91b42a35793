"""Checkpoints: bit by bit, the newest whole one, as many as asked for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fopd_jax.adapters import Adapter
from fopd_jax.training.checkpoints import Checkpoints
from fopd_jax.training.state import EMA, TrainState, advance, apply_gradients, init_state, make_optimizer

OPTIMIZER = make_optimizer(1e-3, 2, (0.9, 0.999), 1e-4, 1.0)


def _adapter(seed: int) -> Adapter:
    keys = jax.random.split(jax.random.key(seed))
    layer = {"a": jax.random.normal(keys[0], (2, 3, 4)), "b": jax.random.normal(keys[1], (2, 4, 5))}
    return Adapter({"blocks": {"attn": {"to_q": layer}}}, 2.0)


def _trained(steps: int) -> TrainState:
    """A state whose moments, average and counters have all moved."""
    state = init_state(_adapter(0), OPTIMIZER, seed=2**32 - 5)
    for i in range(steps):
        state = _update(state, i + 1)
    return state


@jax.jit
def _update_on(state: TrainState, gradients: Adapter) -> TrainState:
    with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
        state, _ = apply_gradients(state, gradients, OPTIMIZER)
    return advance(state, EMA(0.9, 1))


def _update(state: TrainState, seed: int) -> TrainState:
    return _update_on(state, _adapter(seed))


def _same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == reference.dtype
        np.testing.assert_array_equal(leaf, reference)


def test_a_state_comes_back_bit_by_bit_with_optimizer_and_average(tmp_path: Path):
    state = _trained(3)
    leaves = jax.tree.leaves((state.trained, state.ema, state.opt_state))
    assert not any(np.array_equal(one, two) for one, two in zip(leaves[:2], leaves[2:4], strict=True))  # EMA lags
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, state)
    checkpoints.close()
    reopened = Checkpoints(tmp_path, keep=2)
    assert reopened.latest_step() == 3
    restored = reopened.restore(init_state(_adapter(7), OPTIMIZER, seed=0))
    reopened.close()
    _same(restored, state)
    assert isinstance(restored, TrainState)
    assert isinstance(restored.trained, Adapter)
    assert restored.trained.scale == 2.0


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, _trained(2))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = checkpoints.restore(_trained(0))
    checkpoints.close()
    _same(_update(state, 3), _trained(3))


def test_what_is_saved_is_the_state_at_the_call_even_if_it_is_donated_after(tmp_path: Path):
    state = _trained(1)
    kept = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, state))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state)
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(state))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=1)
    _same(jax.tree.map(np.asarray, checkpoints.restore(_trained(0))), kept)
    checkpoints.close()


def test_an_empty_folder_has_no_step(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.latest_step() is None
    checkpoints.close()


def test_only_the_newest_are_kept(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, _trained(step))
    checkpoints.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}


def test_a_step_that_is_there_is_not_saved_again(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, _trained(1))
    checkpoints.save(1, _trained(2))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=2)
    _same(checkpoints.restore(_trained(0)), _trained(1))
    checkpoints.close()


def test_a_save_that_a_kill_interrupted_is_not_taken_for_a_checkpoint(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, _trained(1))
    checkpoints.close()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest_step() == 1
    checkpoints.close()
