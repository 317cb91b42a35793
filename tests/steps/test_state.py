"""What trains: the average's formula, the optimizer against a float64 reimplementation (1e-6), copies and counting."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fopd_jax.adapters.lora import Adapter
from fopd_jax.config.learning import OldDecay
from fopd_jax.config.schema import EMA, Optimizer
from fopd_jax.steps.state import (
    TrainState,
    advance,
    apply_gradients,
    init_state,
    learning_rate,
    make_optimizer,
    move_average,
    move_old,
    old_decay,
)

RATE, BETAS, DECAY, CLIP = 1e-2, (0.9, 0.999), 1e-1, 1.0


def adapter(seed: int) -> Adapter:
    random = np.random.default_rng(seed)
    a, b = (jnp.asarray(random.standard_normal(shape, dtype=np.float32)) for shape in ((4, 2), (2, 3)))
    return Adapter({"layer": {"a": a, "b": b}}, 2.0)


def relaxed(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Optax raises its betas to an integer count, which strict promotion refuses; our own code stays strict."""

    def update(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(*arguments)

    return optax.GradientTransformation(tx.init, update)


def optimizer(warmup: int = 0) -> optax.GradientTransformation:
    return relaxed(make_optimizer(Optimizer(RATE, warmup, BETAS, DECAY, CLIP)))


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])


# ---- the average


def test_the_average_counts_steps_not_the_updates_in_them() -> None:
    """Its unit is that of `run.steps`: a step of three updates moves it once, and two steps are what `every` counts."""
    tx, ema = optimizer(), EMA(0.5, every=2)
    state = start = init_state(adapter(0), tx, seed=0)
    for step in range(1, 5):
        before = flat(state.ema)
        for _ in range(3):
            state, _ = apply_gradients(state, adapter(step), tx)
        state = advance(state, ema)
        assert int(state.step) == step
        assert (flat(state.ema) != before).any() == (step % 2 == 0)
    assert (flat(state.ema) != flat(start.ema)).any()


@pytest.mark.parametrize(("decay", "every"), [(0.9, 8), (0.5, 1), (0.999, 3)])
def test_average_follows_the_formula(decay: float, every: int) -> None:
    ema = EMA(decay, every)
    update = jax.jit(functools.partial(move_average, ema))
    found, expected = adapter(0), flat(adapter(0))
    for n in range(1, 30):
        trained = adapter(n)
        found = update(found, trained, jnp.int32(n))
        if n % every == 0:
            d = min((1 + n) / (10 + n), decay)
            expected = d * expected + (1 - d) * flat(trained)
        np.testing.assert_allclose(flat(found), expected, rtol=1e-5, atol=1e-6, err_msg=str(n))


def test_average_rests_between_its_steps() -> None:
    before = adapter(0)
    for n in range(1, 8):
        after = move_average(EMA(0.9, 8), before, adapter(n), jnp.int32(n))
        jax.tree.map(np.testing.assert_array_equal, after, before)


# ---- the optimizer


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_learning_rate_that_is_told_is_that_of_the_coming_update(warmup: int) -> None:
    settings, tx = Optimizer(RATE, warmup, BETAS, DECAY, CLIP), optimizer(warmup)
    state, told = init_state(adapter(0), tx, seed=0), jax.jit(functools.partial(learning_rate, settings))
    for n in range(1, 6):
        np.testing.assert_allclose(told(state.opt_state), RATE * min(n / max(warmup, 1), 1.0), rtol=1e-6)
        state, _ = apply_gradients(state, adapter(n), tx)


def reference(x: np.ndarray, gradients: list[np.ndarray], warmup: int) -> np.ndarray:
    """AdamW (Loshchilov & Hutter) behind clipping by norm, float64; the rate of update n is RATE·min(n/warmup, 1)."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    for n, g in enumerate(gradients, 1):
        g = g * min(1.0, CLIP / np.linalg.norm(g))
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        rate = RATE * min(n / max(warmup, 1), 1.0)
        x = x - rate * (m / (1 - BETAS[0] ** n) / (np.sqrt(v / (1 - BETAS[1] ** n)) + 1e-8) + DECAY * x)
    return x


@pytest.mark.parametrize("warmup", [0, 1, 2, 4])
def test_optimizer_is_clipped_adamw_with_linear_warmup(warmup: int) -> None:
    """Gradients of norm 0.01 to 100, so that clipping changes their proportions in the moments."""
    tx = optimizer(warmup)
    gradients = [jax.tree.map(lambda leaf, s=10.0**k: s * leaf, adapter(9 + k)) for k in (-2, 1, 0, -1, 1, -2, 0)]
    state = init_state(adapter(0), tx, 0)
    apply = jax.jit(lambda state, gradients: apply_gradients(state, gradients, tx))
    for n, gradient in enumerate(gradients, 1):
        state, norm = apply(state, gradient)
        np.testing.assert_allclose(norm, np.linalg.norm(flat(gradient)), rtol=1e-6)  # before clipping
        expected = reference(flat(adapter(0)), [flat(each) for each in gradients[:n]], warmup)
        np.testing.assert_allclose(flat(state.trained), expected, rtol=0, atol=1e-6, err_msg=str(n))


def test_rate_stays_after_warmup() -> None:
    """No horizon in the schedule: with both betas 0 an update is -rate·sign(gradient), so it shows the rate."""
    tx = relaxed(make_optimizer(Optimizer(RATE, 3, (0.0, 0.0), 0.0, 1e9)))
    state, rates = init_state({"x": jnp.ones(2)}, tx, 0), []
    apply = jax.jit(lambda state: apply_gradients(state, {"x": jnp.ones(2)}, tx)[0])
    for _ in range(50):
        before = state.trained["x"]
        state = apply(state)
        rates.append(float((before - state.trained["x"])[0]))
    np.testing.assert_allclose(rates, RATE * np.minimum(np.arange(1, 51) / 3, 1), rtol=1e-4)


# ---- the state


def test_fresh_state() -> None:
    state = init_state(adapter(0), optimizer(), 17)
    assert (int(state.step), int(state.seed)) == (0, 17)
    assert (state.step.dtype, state.seed.dtype) == (jnp.int32, jnp.uint32)
    jax.tree.map(np.testing.assert_array_equal, state.trained, adapter(0))
    jax.tree.map(np.testing.assert_array_equal, state.ema, adapter(0))


def test_donating_the_state_leaves_the_callers_tree_alive() -> None:
    given, tx = adapter(0), optimizer()
    state = init_state(given, tx, 0)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((given, state.trained, state.ema))}
    assert len(pointers) == 3 * len(jax.tree.leaves(given))
    step = jax.jit(lambda s: advance(apply_gradients(s, s.trained, tx)[0], EMA()), donate_argnums=0)
    jax.block_until_ready(step(state))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trained, state.ema)))  # else nothing was donated
    jax.tree.map(np.testing.assert_array_equal, given, adapter(0))


def test_updates_leave_the_step_and_the_average_alone() -> None:
    tx = optimizer()
    state = init_state(adapter(0), tx, 3)
    after, _ = apply_gradients(state, adapter(1), tx)
    assert (int(after.step), int(after.seed)) == (0, 3)
    jax.tree.map(np.testing.assert_array_equal, after.ema, state.ema)
    assert (flat(after.trained) != flat(state.trained)).all()


def test_advance_counts_one_step_and_averages_after_counting() -> None:
    state = dataclasses.replace(init_state(adapter(0), optimizer(), 3), trained=adapter(1), step=jnp.int32(6))
    rested, moved = advance(state, EMA(0.9, 8)), advance(advance(state, EMA(0.9, 8)), EMA(0.9, 8))
    assert (int(rested.step), int(moved.step)) == (7, 8)
    jax.tree.map(np.testing.assert_array_equal, rested.ema, state.ema)
    d = 9 / 18  # (1 + 8)/(10 + 8)
    np.testing.assert_allclose(flat(moved.ema), d * flat(adapter(0)) + (1 - d) * flat(adapter(1)), atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, moved.trained, state.trained)


def key_data(state: TrainState) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(state.rng())).tolist())


def test_rng_is_a_function_of_seed_and_step_alone() -> None:
    tx = optimizer()
    state = init_state(adapter(0), tx, 3)
    trained, _ = apply_gradients(state, adapter(1), tx)
    assert key_data(trained) == key_data(state) == key_data(init_state(adapter(5), tx, 3))
    others = [dataclasses.replace(init_state(adapter(0), tx, s), step=jnp.int32(n)) for s in (3, 4) for n in range(3)]
    assert len({key_data(each) for each in others}) == 6


# ---- the old copy


SCHEDULES = {  # of DiffusionNFT (both), and of CRD: settings, and the formula as it is published
    "slow": (OldDecay(slope=0.001, limit=0.5), lambda k: min(0.001 * k, 0.5)),
    "late": (OldDecay(slope=0.0075, wait=75, limit=0.999), lambda k: 0.0 if k < 75 else min(0.0075 * (k - 75), 0.999)),
    "early": (OldDecay(start=0.25, slope=0.005, limit=0.999), lambda k: min(0.25 + 0.005 * k, 0.999)),
    "none": (OldDecay(slope=0.0), lambda k: 0.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_how_much_of_the_old_copy_stays(name: str) -> None:
    settings, formula = SCHEDULES[name]
    steps = np.array([0, 1, 2, 74, 75, 76, 149, 150, 400, 499, 500, 501, 10**6], np.int32)
    found = [float(old_decay(settings, jnp.asarray(k))) for k in steps]
    np.testing.assert_allclose(found, [formula(int(k)) for k in steps], rtol=1e-5, atol=1e-7)


def test_the_old_copy_follows_what_trains() -> None:
    tx, settings = optimizer(), OldDecay(start=0.75, slope=0.0, limit=0.9)
    state = init_state(adapter(0), tx, seed=0, keeps_old=True)
    moved, _ = apply_gradients(state, jax.tree.map(jnp.ones_like, state.trained), tx)
    np.testing.assert_array_equal(flat(moved.old), flat(state.trained))  # an update alone does not move it
    followed = move_old(settings, moved)
    np.testing.assert_allclose(flat(followed.old), 0.75 * flat(moved.old) + 0.25 * flat(moved.trained), rtol=1e-6)
    np.testing.assert_array_equal(flat(move_old(settings, moved, skipped=True).old), flat(moved.old))
    at_once = move_old(OldDecay(slope=0.0), moved)
    np.testing.assert_array_equal(flat(at_once.old), flat(moved.trained))


def test_without_an_old_copy_a_state_is_what_it_was() -> None:
    """Leaves and their order, by which checkpoints are read."""
    state = init_state(adapter(0), optimizer(), seed=0)
    assert state.old is None
    assert move_old(OldDecay(), state) is state
    beside = init_state(adapter(0), optimizer(), seed=0, keeps_old=True)
    names = [[jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(each)] for each in (state, beside)]
    assert names[1][: len(names[0])] == names[0]
    assert all(name.startswith(".old") for name in names[1][len(names[0]) :])
