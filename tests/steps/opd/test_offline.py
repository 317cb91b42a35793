"""Flow matching beside distillation: its gradient is added to the one without it, in every form of the update.

Tolerances on ‖a - b‖/‖b‖, float32: 1e-6 of the split gradients; 1e-4 against PyTorch in float64.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from fopd_jax.config.schema import EMA, LogitNormal, Offline
from fopd_jax.objectives.flow_matching import sample_levels
from fopd_jax.steps.flow_matching import matching_gradient
from fopd_jax.steps.opd import mixed
from fopd_jax.steps.opd.offline import apart, noise_and_levels, offline_gradient
from fopd_jax.steps.opd.pieces import metric_names, regular_names
from fopd_jax.steps.opd.replay import replay
from fopd_jax.steps.opd.spec import OPDSpec
from fopd_jax.steps.opd.step import fused, make_step
from fopd_jax.steps.state import TrainState
from fopd_jax.steps.student import ADAPTER
from fopd_jax.worlds.prompt_stream import Batch
from tests.steps.opd.network import (
    BANK,
    CLIPPED,
    DIRECT,
    SHAPE,
    STUDENT,
    TEACHERS,
    check,
    frozen_of,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    make_velocity,
    normal,
    prompts,
    quick,
    variables,
)
from tests.steps.opd.test_mixed import ADVANTAGE, MIXED, batch_of, credit_of, drive
from tests.steps.opd.torch_network import to_torch, torch_factors, torch_velocity

ROWS, WEIGHT = 4, 0.7
OFFLINE = Offline(weight=WEIGHT, batch_size=ROWS, levels=LogitNormal(0.3, 0.8, 2.0))
SGD = optax.sgd(0.1)
FORMS = {
    "fused": (fused, CLIPPED, {}),
    "one timestep": (fused, DIRECT, {"one_timestep": True}),
    "replay": (replay, CLIPPED, {"micro_batches": 3}),
}


def captioned(size: int = ROWS, seed: int = 50) -> dict[str, Any]:
    return {
        "x0": jnp.asarray(normal(seed, size, *SHAPE)),
        "conditioning": jax.tree.map(jnp.asarray, prompts(seed, size)),
    }


def beside(batch: Batch, rows: Any) -> Batch:
    return dataclasses.replace(batch, offline=rows)


@functools.cache
def matching() -> Any:
    """Compiled once for all tests of the file."""
    return quick(matching_gradient, make_velocity(), ADAPTER, make_pieces(make_spec(CLIPPED)).groups)


def matched(spec: OPDSpec, state: TrainState, rows: Any) -> Any:
    """w times the gradient of stage flow_matching's mean loss at the same rows, noise and levels."""
    noise, sigma = noise_and_levels(spec, state, ROWS)
    whole = rows["x0"], noise, sigma, rows["conditioning"]
    sums, losses = matching()(variables(), state.trained, whole)
    return jax.tree.map(lambda g: WEIGHT * g.sum(0) / ROWS, sums), losses.mean()


# ---- split


@pytest.mark.parametrize("form", ["fused", "replay", pytest.param("one timestep", marks=pytest.mark.slow)])
def test_the_gradient_is_that_without_it_and_its_own(form: str) -> None:
    update, objective, fields = FORMS[form]
    spec, state, rows = make_spec(objective, **fields), make_state(), captioned()
    both = dataclasses.replace(spec, offline=OFFLINE)
    batch = jax.tree.map(jnp.asarray, make_batch())
    after, metrics = quick(update, make_pieces(both), _kept(), EMA())(
        frozen_of(BANK), kept_state(), beside(batch, rows)
    )
    before, known = quick(update, make_pieces(spec), _kept(), EMA())(frozen_of(BANK), kept_state(), batch)
    own, loss = matched(both, state, rows)
    check(after.opt_state, jax.tree.map(jnp.add, before.opt_state, own), 1e-6)
    np.testing.assert_allclose(metrics["offline_loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], known["loss"], rtol=1e-6)
    scalars = {name for name in metrics if not name.startswith(("samples/", "weights/"))}
    assert scalars == {*metric_names(TEACHERS), *regular_names(both)}


def _kept() -> optax.GradientTransformation:
    """Descent by 0.01 whose state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (jax.tree.map(lambda g: -0.01 * g, updates), updates),
    )


def kept_state() -> TrainState:
    return dataclasses.replace(make_state(), opt_state=_kept().init(STUDENT))


def test_each_update_on_a_rollout_takes_it_at_its_own_weights() -> None:
    """Where nothing is distilled, two updates are two steps of descent on the captioned rows."""
    nothing = dataclasses.replace(CLIPPED, reward="kl_detached", mar_beta=0.0, reward_limit=1e-30)
    spec = make_spec(nothing, updates_per_rollout=2, minibatches=1, offline=OFFLINE)
    rows, batch = captioned(), jax.tree.map(jnp.asarray, make_batch())
    run = quick(replay, make_pieces(spec), optax.sgd(0.5), EMA())
    after, metrics = run(frozen_of(BANK), make_state(), beside(batch, rows))
    state, losses = make_state(), []
    for _ in range(2):
        own, loss = matched(spec, state, rows)
        state = dataclasses.replace(state, trained=jax.tree.map(lambda x, g: x - 0.5 * g, state.trained, own))
        losses.append(float(loss))
    moved = [jax.tree.map(jnp.subtract, each.trained, STUDENT) for each in (after, state)]
    check(*moved, 1e-5)
    np.testing.assert_allclose(metrics["offline_loss"], np.mean(losses), rtol=1e-5)
    assert losses[1] < losses[0]


def test_mixed_updates_have_it_too() -> None:
    plain = make_spec(MIXED)
    both, rows, found = dataclasses.replace(plain, offline=OFFLINE), captioned(), []
    for spec, batch in ((plain, batch_of()), (both, beside(batch_of(), rows))):
        programs = mixed.make_programs(make_pieces(spec), _kept(), EMA())
        found.append(drive(programs, spec, frozen_of(BANK), kept_state(), batch, credit_of(ADVANTAGE)))
    (before, _, _), (after, metrics, _) = found
    own, loss = matched(both, make_state(), rows)
    check(after.opt_state, jax.tree.map(jnp.add, before.opt_state, own), 1e-6)
    np.testing.assert_allclose(metrics["offline_loss"], loss, rtol=1e-6)
    assert {"offline_loss"} == set(mixed.mixed_names(both)) - set(mixed.mixed_names(plain))


# ---- its noise, and what is not finite


def test_noise_and_level_are_functions_of_seed_step_and_row_alone() -> None:
    spec, state = make_spec(CLIPPED, offline=OFFLINE), make_state()
    few, many = (noise_and_levels(spec, state, size) for size in (2, 5))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), few, many)
    assert len(np.unique(np.asarray(many[0]))) == 5 * np.prod(SHAPE)
    assert len(np.unique(np.asarray(many[1]))) == 5
    later = noise_and_levels(spec, dataclasses.replace(state, step=jnp.int32(1)), 2)
    other = noise_and_levels(spec, dataclasses.replace(state, seed=jnp.uint32(6)), 2)
    assert not any(
        (np.asarray(a) == np.asarray(b)).any() for each in (later, other) for a, b in zip(few, each, strict=True)
    )


def test_levels_have_the_distribution_of_the_section() -> None:
    spec, state = make_spec(CLIPPED, offline=OFFLINE, latent_shape=(1, 1, 1)), make_state()
    _, sigma = noise_and_levels(spec, state, 4096)
    expected = sample_levels(OFFLINE.levels, jax.random.key(0), 4096)
    np.testing.assert_allclose(np.quantile(sigma, [0.1, 0.5, 0.9]), np.quantile(expected, [0.1, 0.5, 0.9]), atol=0.02)


def test_rows_that_are_not_finite_do_not_land() -> None:
    rows = captioned()
    rows["x0"] = rows["x0"].at[1].set(jnp.nan)
    spec, state = make_spec(CLIPPED, offline=OFFLINE), make_state()
    run = quick(fused, make_pieces(spec), SGD, EMA())
    after, metrics = run(frozen_of(BANK), state, beside(jax.tree.map(jnp.asarray, make_batch()), rows))
    assert float(metrics["skipped"]) == 1
    assert np.isfinite(metrics["samples/loss"]).all()
    jax.tree.map(np.testing.assert_array_equal, after.trained, state.trained)


def test_the_step_compiles_once_and_takes_as_many_rows_as_it_likes() -> None:
    traced: list[int] = []
    spec = make_spec(CLIPPED, offline=OFFLINE, updates_per_rollout=2, minibatches=2)
    spec.check(4)
    run: Any = make_step(make_pieces(spec, traced), SGD, EMA())
    state = make_state()
    for seed in range(2):
        state, metrics = run(
            frozen_of(BANK), state, beside(jax.tree.map(jnp.asarray, make_batch(4, seed)), captioned(5, seed))
        )
    assert run._cache_size() == 1
    assert 5 in traced
    assert np.isfinite(float(metrics["offline_loss"]))


# ---- against PyTorch


def test_the_gradient_is_pytorchs() -> None:
    """Of the conditional velocity, whatever the student's guidance."""
    spec, state, rows = make_spec(CLIPPED, offline=OFFLINE), make_state(), captioned()
    found, loss = quick(offline_gradient, make_pieces(spec))(frozen_of(BANK), state, rows)
    noise, sigma = noise_and_levels(spec, state, ROWS)
    factors = torch_factors(STUDENT.weights, requires_grad=True)
    t, x0, e = to_torch(sigma)[:, None, None, None], to_torch(rows["x0"]), to_torch(noise)
    v = torch_velocity(factors, (1 - t) * x0 + t * e, sigma, rows["conditioning"])
    expected = ((v - (e - x0)) ** 2).mean()
    gradients = torch.autograd.grad(WEIGHT * expected, list(factors.values()))
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-4)
    check([found.weights[layer][factor] for layer, factor in factors], [each.numpy() for each in gradients], 1e-4)


def test_prompts_and_captioned_rows_part() -> None:
    spec = make_spec(CLIPPED, offline=OFFLINE)
    with pytest.raises(ValueError, match=r"offline\.weight: found a batch without captioned latents"):
        offline_gradient(make_pieces(spec), frozen_of(BANK), make_state(), None)
    batch, rows = beside(make_batch(), captioned()), captioned()
    prompts_alone, found = apart(batch)
    assert prompts_alone.offline is None
    jax.tree.map(np.testing.assert_array_equal, found, rows)
