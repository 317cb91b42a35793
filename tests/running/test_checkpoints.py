"""Checkpoints: bit by bit, the newest intact one, as many as asked for; another config's or shapes are refused."""

import dataclasses
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import Adapter
from fopd_jax.config.schema import EMA, Optimizer
from fopd_jax.running import integrity, saving
from fopd_jax.running.checkpoints import Checkpoints, kept_steps, newest_step, read_kept, seal_of, stored_shape
from fopd_jax.steps.state import TrainState, advance, apply_gradients, init_state, make_optimizer

OPTIMIZER = make_optimizer(Optimizer(1e-3, 2, (0.9, 0.999), 1e-4, 1.0))


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


def _open(workdir: Path, keep: int = 2, keep_best: str = "", config_hash: str = "c0ffee") -> Checkpoints:
    return Checkpoints(workdir, keep, keep_best=keep_best, config_hash=config_hash)


def _names(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir()}


def _same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == reference.dtype
        np.testing.assert_array_equal(leaf, reference)


def test_a_state_comes_back_bit_by_bit_with_optimizer_and_average(tmp_path: Path):
    state = _trained(3)
    leaves = jax.tree.leaves((state.trained, state.ema, state.opt_state))
    assert not any(np.array_equal(one, two) for one, two in zip(leaves[:2], leaves[2:4], strict=True))  # EMA lags
    checkpoints = _open(tmp_path)
    checkpoints.save(3, state)
    checkpoints.close()
    reopened = _open(tmp_path)
    assert reopened.latest_step() == 3
    restored = reopened.restore(init_state(_adapter(7), OPTIMIZER, seed=0))
    reopened.close()
    _same(restored, state)
    assert isinstance(restored, TrainState)
    assert isinstance(restored.trained, Adapter)
    assert restored.trained.scale == 2.0


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path):
    checkpoints = _open(tmp_path, keep=1)
    checkpoints.save(2, _trained(2))
    checkpoints.close()
    checkpoints = _open(tmp_path, keep=1)
    state = checkpoints.restore(_trained(0))
    checkpoints.close()
    _same(_update(state, 3), _trained(3))


def test_what_is_saved_is_the_state_at_the_call_even_if_it_is_donated_after(tmp_path: Path):
    state = _trained(1)
    kept = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, state))
    checkpoints = _open(tmp_path, keep=1)
    checkpoints.save(1, state)
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(state))
    checkpoints.close()
    checkpoints = _open(tmp_path, keep=1)
    _same(jax.tree.map(np.asarray, checkpoints.restore(_trained(0))), kept)
    checkpoints.close()


def test_an_empty_folder_has_no_step(tmp_path: Path):
    checkpoints = _open(tmp_path, keep=1)
    assert checkpoints.latest_step() is None
    checkpoints.close()


def test_only_the_newest_are_kept(tmp_path: Path):
    checkpoints = _open(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, _trained(step))
    checkpoints.close()
    assert _names(tmp_path) == {"2", "3"}


def test_a_step_that_is_there_is_not_saved_again(tmp_path: Path):
    checkpoints = _open(tmp_path)
    checkpoints.save(1, _trained(1))
    checkpoints.save(1, _trained(2))
    checkpoints.close()
    checkpoints = _open(tmp_path)
    _same(checkpoints.restore(_trained(0)), _trained(1))
    checkpoints.close()


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    checkpoints = _open(tmp_path)
    checkpoints.save(1, _trained(1))
    checkpoints.close()
    shutil.copytree(tmp_path / "checkpoints/1", tmp_path / "checkpoints/5")
    with pytest.raises(ValueError, match=r"checkpoints/5/: found step 1 under this name"):
        read_kept(tmp_path, 5, _trained(0))
    checkpoints = _open(tmp_path)
    _same(checkpoints.restore(_trained(0)), _trained(1))
    checkpoints.close()
    assert "found step 1 under this name" in caplog.text


def test_what_is_no_folder_or_no_number_is_no_step(tmp_path: Path):
    for name in ("7", "\N{SUPERSCRIPT TWO}", "007", "-1", "1.0"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "9").touch()
    assert newest_step(tmp_path) == 7
    assert kept_steps(tmp_path) == [7, 9]  # the file stands in the way of a save: it is damage


def test_a_save_that_a_kill_interrupted_is_not_taken_for_a_checkpoint(tmp_path: Path):
    checkpoints = _open(tmp_path)
    checkpoints.save(1, _trained(1))
    checkpoints.close()
    for name in ("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-unsealed"):
        shutil.copytree(tmp_path / "checkpoints/1", tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "2.tmp0").touch()  # in the place of the next save
    checkpoints = _open(tmp_path)
    assert checkpoints.latest_step() == newest_step(tmp_path) == 1
    checkpoints.save(2, _trained(2))
    _same(checkpoints.restore(_trained(0)), _trained(2))
    checkpoints.close()
    assert _names(tmp_path) == {"1", "2"}


def test_full_parameters_and_shapes_alone(tmp_path: Path):
    """A whole network's tree of several dtypes; restoring needs no arrays, only their shapes."""
    tree = {"params": {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones((3,), jnp.bfloat16) / 3}}}
    state = TrainState(
        jnp.asarray(5, jnp.int32), jnp.asarray(2**32 - 1, jnp.uint32), tree, {"count": jnp.arange(3)}, tree
    )
    checkpoints = _open(tmp_path)
    checkpoints.save(5, state)
    restored = checkpoints.restore(jax.eval_shape(lambda: state))
    checkpoints.close()
    _same(restored, state)


# ---- what is kept


def test_the_best_is_kept_beside_the_newest_across_restarts(tmp_path: Path):
    scores = {1: 0.2, 2: 0.9, 3: 0.5, 4: None, 5: float("nan"), 6: 0.8}
    for steps in ((1, 2, 3), (4, 5, 6)):
        checkpoints = _open(tmp_path, keep=2, keep_best="max:eval/text")
        for step in steps:
            score = scores[step]
            checkpoints.save(step, _trained(0))
            checkpoints.score(step, {} if score is None else {"eval/text": score, "eval/other": -score})
        checkpoints.close()
    assert _names(tmp_path) == {"2", "5", "6"}


def test_the_best_may_be_the_least(tmp_path: Path):
    checkpoints = _open(tmp_path, keep=1, keep_best="min:loss")
    for step, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
        checkpoints.save(step, _trained(0))
        checkpoints.score(step, {"loss": loss})
    checkpoints.close()
    assert _names(tmp_path) == {"2", "3"}


@pytest.mark.parametrize(
    ("keep", "keep_best", "message"),
    [
        (0, "", "run.keep_checkpoints: found 0"),
        (1, "eval/text", "keep_best: found 'eval/text'"),
        (1, "max:", "keep_best: found 'max:'"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, keep: int, keep_best: str, message: str):
    with pytest.raises(ValueError, match=message):
        _open(tmp_path, keep, keep_best)


def test_a_best_metric_that_no_evaluation_finds_is_told_once_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoints = _open(tmp_path, keep_best="max:eval/txet")
    for step in (1, 2):
        checkpoints.save(step, _trained(0))
        checkpoints.score(step, {"eval/text": 1.0})
    checkpoints.close()
    assert capsys.readouterr().err.count("no metric 'eval/txet', expected one of eval/text") == 1
    assert _names(tmp_path) == {"1", "2"}


def test_a_save_that_failed_beside_training_is_told_once_and_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(folder: Path) -> None:
        raise OSError("no space left on device")

    checkpoints = _open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(integrity, "write_manifest", full)
        checkpoints.save(1, _trained(1))
        with pytest.raises(OSError, match="no space"):
            checkpoints.wait()
    checkpoints.wait()
    checkpoints.save(1, _trained(1))
    checkpoints.wait()
    assert checkpoints.latest_step() == 1
    checkpoints.close()


def test_a_save_that_hangs_is_given_up_and_the_next_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hangs, right = threading.Event(), saving.write_part
    checkpoints = _open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_part", lambda *part: (hangs.wait(60), right(*part)))
        patch.setattr(saving, "PATIENCE_S", 0.2)
        patch.setattr(saving, "_STEPS", 0.1)
        checkpoints.save(1, _trained(1))
        with pytest.raises(TimeoutError, match=r"checkpoints/1: not written within 1 s"):
            checkpoints.wait()
    checkpoints.save(1, _trained(1))
    checkpoints.wait()
    hangs.set()
    _same(checkpoints.restore(_trained(0)), _trained(1))
    checkpoints.close()
    assert newest_step(tmp_path) == 1


# ---- what does not belong here


def test_another_config_is_refused(tmp_path: Path):
    checkpoints = _open(tmp_path)
    checkpoints.save(1, _trained(1))
    checkpoints.close()
    checkpoints = _open(tmp_path, config_hash="decaf")
    with pytest.raises(ValueError, match=r"checkpoints/1: written under config c0ffee, this run's is decaf") as error:
        checkpoints.restore(_trained(0))
    checkpoints.close()
    assert "\n" not in str(error.value)


def _renamed(state: TrainState) -> TrainState:
    return dataclasses.replace(state, trained={"w": jnp.zeros((2,))})


def _reshaped(state: TrainState) -> TrainState:
    return dataclasses.replace(state, ema=jax.tree.map(lambda leaf: leaf[:1], state.ema))


def _cast(state: TrainState) -> TrainState:
    return dataclasses.replace(state, seed=state.seed.astype(jnp.int32))


PATH, WHOLE = "weights/blocks/attn/to_q/a", "[[2, 3, 4], 'float32']"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, "trained/w: found no such array, expected [[2], 'float32']; 3 of 11 arrays differ"),
        (_reshaped, f"ema/{PATH}: found {WHOLE}, expected [[1, 3, 4], 'float32']; 2 of 12 arrays differ"),
        (_cast, "seed: found [[], 'uint32'], expected [[], 'int32']; 1 of 12 arrays differ"),
    ],
)
def test_other_shapes_are_refused_by_name(tmp_path: Path, change: Any, message: str):
    checkpoints = _open(tmp_path)
    checkpoints.save(1, _trained(0))
    checkpoints.wait()
    with pytest.raises(ValueError, match=re.escape(f"checkpoints/1: {message}")):
        checkpoints.restore(change(_trained(0)))
    checkpoints.close()


def test_nothing_to_restore_is_an_error(tmp_path: Path):
    checkpoints = _open(tmp_path)
    with pytest.raises(ValueError, match="checkpoints: no checkpoint"):
        checkpoints.restore(_trained(0))
    checkpoints.close()


# ---- reading one without running on


def test_any_kept_checkpoint_is_read_and_nothing_is_changed(tmp_path: Path):
    states = {step: _trained(step) for step in (1, 2)}
    checkpoints = _open(tmp_path)
    for step, state in states.items():
        checkpoints.save(step, state)
    checkpoints.close()
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # of a run that lives
    names = _names(tmp_path)
    assert kept_steps(tmp_path) == [1, 2]
    shapes = jax.eval_shape(lambda: states[1])
    for step, state in states.items():
        found = read_kept(tmp_path, step, shapes)
        _same((found.step, found.seed, found.trained, found.ema), (state.step, state.seed, state.trained, state.ema))
        assert found.opt_state == ()
    assert seal_of(tmp_path, 1) != seal_of(tmp_path, 2)
    assert stored_shape(tmp_path, 1, "/a") == [2, 3, 4]
    assert stored_shape(tmp_path, 1, "/kernel") is None
    other = jax.eval_shape(lambda: init_state({"w": jnp.zeros(3)}, OPTIMIZER, 0))
    with pytest.raises(ValueError, match=r"checkpoints/1: .*: found .*no such array"):
        read_kept(tmp_path, 1, other)
    path = next(path for path in (tmp_path / "checkpoints" / "1" / "state").rglob("*") if path.is_file())
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=re.escape(f"damaged checkpoint: {path}: ")):
        read_kept(tmp_path, 1, shapes)
    assert _names(tmp_path) == names
