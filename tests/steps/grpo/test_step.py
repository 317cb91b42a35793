"""The GRPO update as a whole: windows, credit, updates, and the one program against the host's three.

1e-6 of the distance moved between the two forms; windows and branches to the bit.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fopd_jax.config.learning import NoiseWindow, PolicyGradient
from fopd_jax.config.schema import EMA
from fopd_jax.flow.transition import CPS, SDE
from fopd_jax.objectives.grpo import check_objective, step_weights
from fopd_jax.rewards.advantages import advantages
from fopd_jax.steps.grpo.spec import Credit
from fopd_jax.steps.grpo.step import credit_metrics, make_step, metric_names
from tests.steps.grpo.network import (
    GROUP,
    SIZE,
    Host,
    base,
    copied,
    grouped,
    make_credit,
    make_spec,
)
from tests.steps.opd.network import SIGMAS, STEPS, STUDENT, relative_error

# ---- windows


def places(window: NoiseWindow, steps: range, seed: int = 5) -> list[int]:
    host = Host(make_spec(window=window))
    state = host.start(seed=seed)
    return [int(host.spec.place(dataclasses.replace(state, step=jnp.int32(step)))) for step in steps]


def test_a_sliding_window_moves_by_one_and_stays_at_the_end() -> None:
    window = NoiseWindow(within=(1, STEPS), size=2, moves="slide", every=3)
    assert places(window, range(10)) == [1, 1, 1, 2, 2, 2, 2, 2, 2, 2]  # steps 2 and 3: the last is never trained


def test_a_random_window_is_a_function_of_seed_and_step() -> None:
    window = NoiseWindow(within=(0, 4), size=2, moves="random")
    found = places(window, range(30))
    assert set(found) == {0, 1, 2}
    assert places(window, range(29, -1, -1)) == found[::-1]
    assert places(window, range(30), seed=6) != found


@pytest.mark.parametrize(
    ("window", "noisy", "trained"),
    [
        (NoiseWindow(), [True] * 5, 4),
        (NoiseWindow(within=(1, 3)), [False, True, True, False, False], 2),
        (NoiseWindow(within=(3, 5)), [False, False, False, True, True], 1),
        (NoiseWindow(within=(1, 5), size=2), [False, True, True, False, False], 2),
    ],
)
def test_which_steps_draw_noise_and_are_trained(window: NoiseWindow, noisy: list[bool], trained: int) -> None:
    spec = make_spec(window=window)
    np.testing.assert_array_equal(spec.levels(jnp.int32(spec.within[0])).noisy, noisy)
    assert spec.trained == trained


def test_a_window_with_one_start_is_a_branch() -> None:
    """One noisy step, the rest Euler's: a group shares its way to there to the bit, and parts from there."""
    window = NoiseWindow(within=(2, 3))
    host = Host(make_spec(PolicyGradient(kl_beta=0.0), CPS(0.8), window=window, shared_noise=True, guidance=1.0))
    _, (rollout, _) = host.roll_out(host.start(), grouped())
    stored = rollout.stored
    x, x_next = (np.asarray(each).reshape(SIZE // GROUP, GROUP, -1) for each in (stored.x, stored.x_next))
    assert stored.log_prob.shape == (1, SIZE)
    for group, after in zip(x, x_next, strict=True):
        np.testing.assert_array_equal(group, np.broadcast_to(group[:1], group.shape))
        assert len(np.unique(after, axis=0)) == GROUP
    assert not np.array_equal(x[0], x[1])
    again = Host(dataclasses.replace(host.spec, shared_noise=False))
    other = np.asarray(again.roll_out(again.start(), grouped())[1][0].stored.x).reshape(SIZE, -1)
    assert len(np.unique(other, axis=0)) == SIZE


# ---- weights of steps, and what is refused


def test_weights_of_steps_are_their_noise_with_mean_one() -> None:
    found = step_weights(PolicyGradient(step_weighting="noise"), SDE(0.7), SIGMAS)
    sigma, after = np.float64(SIGMAS[:-2]), np.float64(SIGMAS[1:-1])
    std = 0.7 * np.sqrt(sigma / (1 - np.where(sigma == 1, after, sigma)) * (sigma - after))
    np.testing.assert_allclose(found, std / std.mean(), rtol=1e-5)
    np.testing.assert_array_equal(step_weights(PolicyGradient(), SDE(0.7), SIGMAS), np.ones(STEPS - 1))


@pytest.mark.parametrize("transition", [SDE(0.0), CPS(0.0)])
def test_a_rollout_without_noise_is_refused(transition: Any) -> None:
    with pytest.raises(ValueError, match=r"rollouts\.noise_level: found 0, expected at least 1e-06"):
        check_objective(PolicyGradient(kl_beta=0.0), transition)


# ---- credit


def test_a_reward_that_was_not_asked_has_not_failed() -> None:
    asked = np.array([[True] * 4, [False] * 4])
    values = np.array([[1.0, np.nan, 3.0, 2.0], [np.nan] * 4], np.float32)
    credit = Credit(np.zeros(4, np.float32), values, asked, np.array([True, False, True, True]), np.arange(4) == 3)
    found = credit_metrics(("a", "b"), jax.tree.map(jnp.asarray, credit))
    expected = {"reward/a": 2.0, "failed/a": 0.25, "weights/reward/a": 3, "weights/failed/a": 4, "reward/b": 0,
                "failed/b": 0, "weights/reward/b": 0, "weights/failed/b": 0, "flat_share": 1 / 3,
                "dropped_share": 0.25}  # fmt: skip
    assert {name: pytest.approx(float(value)) for name, value in found.items()} == expected


@jax.numpy_dtype_promotion("standard")  # which optax's AdamW asks for
def test_where_nothing_counts_nothing_moves() -> None:
    """Not the weights, by decay either, nor Adam's moments or counts; the step is counted, the average goes on."""
    host = Host(make_spec(updates_per_rollout=2, minibatches=2), optax.adamw(1e-2, weight_decay=0.1), EMA(every=1))
    state = dataclasses.replace(host.start(), ema=jax.tree.map(jnp.zeros_like, host.start().ema))
    before = copied(state)
    state, rolled = host.roll_out(state, grouped())
    after, metrics, _ = host.learn(state, rolled, grouped(), make_credit(np.zeros(SIZE), flat=True))
    for name in ("trained", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert (int(after.step), float(metrics["skipped"]), float(metrics["weights/loss"])) == (1, 0, 0)
    assert float(metrics["flat_share"]) == 1
    assert relative_error(after.ema, STUDENT) == pytest.approx(2 / 11)  # d of the first step
    # The same programs with something to learn do move, and are compiled once for all steps.
    after, rolled = host.roll_out(after, grouped())
    moved, _, _ = host.learn(after, rolled, grouped(), make_credit([1.0, -1, 0.5, 1, -1, 0.3]))
    assert relative_error(moved.trained, before.trained) > 1e-4
    assert [each._cache_size() for each in (host.programs.begin, host.programs.go, host.programs.end)] == [1, 1, 1]


# ---- one program


def compared(values: jax.Array) -> Credit:
    groups = jnp.arange(SIZE) // GROUP
    found = advantages(values[None], jnp.ones(1), groups, SIZE // GROUP)
    return Credit(found.values, values[None], jnp.ones((1, SIZE), bool), found.valid, found.flat)


def test_one_program_makes_the_hosts_update() -> None:
    """Scores are the latents' means, one of which fails: state and metrics, at 1e-6 of the distance moved."""
    spec = make_spec(PolicyGradient(clip=1e-3, kl_beta=0.1), updates_per_rollout=3, minibatches=3, micro_batches=2)
    host = Host(spec, optax.sgd(0.05), EMA(every=1))

    def score(scorers: Any, latents: jax.Array, prompts: jax.Array) -> tuple[Credit, jax.Array]:
        return compared(jnp.where(prompts, jnp.nan, scorers * latents.mean((1, 2, 3)))), latents

    step = make_step(host.pieces, host.optimizer, host.ema, score)
    conditioning, failing = jax.tree.map(jnp.asarray, grouped()), jnp.arange(SIZE) == 4
    one, metrics, found, seen = step(base(), jnp.float32(3.0), host.start(), conditioning, failing)
    state, rolled = host.roll_out(host.start(), conditioning)
    credit, _ = jax.jit(score)(jnp.float32(3.0), rolled[0].x, failing)
    np.testing.assert_allclose(seen, rolled[0].x, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.advantage, credit.advantage, rtol=1e-5, atol=1e-5)
    two, expected, _ = host.learn(state, rolled, conditioning, credit)
    for name in ("trained", "ema"):
        changes = [jax.tree.map(jnp.subtract, getattr(each, name), STUDENT) for each in (one, two)]
        assert relative_error(*changes) <= 1e-6
        assert relative_error(getattr(one, name), STUDENT) > 1e-4
    assert metrics.keys() == expected.keys()
    scalars = {name for name in metrics if not name.startswith(("weights/", "samples/"))}
    assert scalars == set(metric_names(spec.rewards))
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert int(one.step) == int(two.step) == 1
    one, *_ = step(base(), jnp.float32(3.0), one, conditioning, failing)
    assert step._cache_size() == 1


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # which optax's Adam asks for
@pytest.mark.parametrize("name", ["clip", "guard", "dppo"])
def test_learning_raises_the_reward(name: str) -> None:
    """Twenty steps of Adam on the mean of the final latents, each on 24 images: the last five beat the first five."""
    objective = PolicyGradient(name, clip=1e-3, divergence=1e-3, kl_beta=0.0)
    spec = make_spec(objective, updates_per_rollout=2, minibatches=2)
    host = Host(spec, optax.adam(0.02))
    state, rewards, size = host.start(), [], 24
    groups = jnp.arange(size) // GROUP
    for _ in range(20):
        conditioning = grouped(size)
        state, rolled = host.roll_out(state, conditioning)
        values = rolled[0].x.mean((1, 2, 3))
        found = advantages(values[None], jnp.ones(1), groups, size // GROUP)
        credit = Credit(found.values, values[None], jnp.ones((1, size), bool), found.valid, found.flat)
        state, metrics, _ = host.learn(state, rolled, conditioning, credit)
        rewards.append(float(metrics["reward/it"]))
    print(name, np.round(rewards, 3))
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
