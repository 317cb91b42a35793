"""The fused gradient: equal to the replayed one, a mean over samples that do not mix, and zero where it should be."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fopd_jax.config.schema import Objective
from fopd_jax.flow.transition import CPS, ODE, SDE
from fopd_jax.objectives.opd import TERMS
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.pieces import start
from fopd_jax.steps.opd.replay import collect, replayed_gradients
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.state import TrainState
from fopd_jax.worlds.prompt_stream import Batch
from tests.steps.opd.network import (
    ALWAYS,
    BANK,
    BATCH,
    CLIPPED,
    DIRECT,
    GUIDED,
    PLAIN,
    STUDENT,
    TOLERANCE,
    WINDOW,
    check,
    frozen_of,
    fused,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    quick,
    relative_error,
    scaled_sum,
)

# ---- fused and replayed

COMBINATIONS = (
    *(("direct", "kl", w, SDE(0.7)) for w in ("kl", "kl_no_dt", "ode", "uniform")),
    *(("direct", "kl", w, kind) for w in ("ode", "uniform") for kind in (CPS(0.7), ODE())),
    *(("clipped", r, w, SDE(0.7)) for r in ("kl", "kl_detached") for w in ("kl", "kl_no_dt", "ode", "uniform")),
    *(("clipped", r, w, CPS(0.7)) for r in ("kl", "kl_detached") for w in ("ode", "uniform")),
    ("clipped", "log_ratio", "kl", SDE(0.7)),
)
# Every combination with one of the eight settings, every setting with two or three of each objective.
SETTINGS = tuple(itertools.product((ALWAYS, WINDOW), (GUIDED, PLAIN), (0.0, 0.3)))
CASES = {
    f"{name}-{reward}-{weighting}-{type(kind).__name__}-{setting % 8}": (
        Objective(name, reward, weighting, mar_beta=SETTINGS[setting % 8][2], window_only=bool(index % 2)),
        kind,
        *SETTINGS[setting % 8][:2],
    )
    for index, (name, reward, weighting, kind) in enumerate(COMBINATIONS)
    for setting in (3 * index, *((3 * index + 4,) if reward == "log_ratio" else ()))
}


@pytest.mark.parametrize("case", CASES)
def test_fused_and_replayed_gradients_agree(case: str) -> None:
    objective, transition, noisy, guidance = CASES[case]
    spec = make_spec(objective, transition, guidance, noisy=noisy)
    spec.check(BATCH)
    pieces = make_pieces(spec)
    frozen, state, batch = frozen_of(BANK), make_state(), make_batch()

    @quick
    def both(frozen: Frozen, state: TrainState, batch: Batch) -> Any:
        stored = collect(pieces, frozen, state, batch)
        replayed = replayed_gradients(pieces, frozen, state.trained, batch, stored)
        return fused_gradients(pieces, frozen, state, batch), replayed

    fused, replayed = both(frozen, state, batch)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(fused[0]))
    check(replayed[0], fused[0])
    for name in TERMS:
        assert fused[1][name].shape == (BATCH,)
        np.testing.assert_allclose(replayed[1][name], fused[1][name], rtol=TOLERANCE, atol=1e-6, err_msg=name)


def test_the_cases_cover_every_setting() -> None:
    for name in ("direct", "clipped"):
        used = {case.rpartition("-")[2] for case in CASES if case.startswith(name)}
        assert len(used) == len(SETTINGS)


@pytest.mark.parametrize("updates", [1, 2])
def test_training_some_timesteps_is_their_part_of_the_loss(updates: int) -> None:
    """T·∇L = Σ T_w·∇L_w over windows that split the timesteps."""
    windows, batch = ((0, 1), (1, 4)), make_batch()
    state = make_state()

    def gradient(**fields: Any) -> Any:
        pieces = make_pieces(make_spec(DIRECT, **fields))
        if updates == 1:
            return quick(fused_gradients, pieces)(frozen_of(BANK), state, batch)[0]
        stored = quick(collect, pieces)(frozen_of(BANK), state, batch)
        return quick(replayed_gradients, pieces)(frozen_of(BANK), state.trained, batch, stored)[0]

    parts = [gradient(trained=window) for window in windows]
    check(scaled_sum(parts, [1 / 4, 3 / 4]), gradient())
    assert relative_error(parts[0], parts[1]) > 1e-2


# ---- samples do not mix


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED], ids=["direct", "clipped"])
@pytest.mark.parametrize("sample", range(BATCH))
def test_each_entry_of_the_totals_belongs_to_one_sample(objective: Objective, sample: int) -> None:
    state, batch = make_state(), make_batch()
    _, before = fused(objective.name)(frozen_of(BANK), state, batch)
    conditioning, route = jax.tree.map(np.copy, batch.conditioning), batch.route.copy()
    conditioning.context[sample] += 1
    route[sample] = 1 - route[sample]
    others = np.arange(BATCH) != sample
    for changed in (Batch(conditioning, batch.route), Batch(batch.conditioning, route)):
        _, after = fused(objective.name)(frozen_of(BANK), state, changed)
        for name in ("loss", "teacher_gap", "velocity_mse"):
            np.testing.assert_allclose(after[name][others], before[name][others], rtol=1e-6, err_msg=name)
            assert abs(after[name][sample] / before[name][sample] - 1) > 1e-2, name


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED], ids=["direct", "clipped"])
def test_gradient_is_the_mean_over_samples_alone(objective: Objective) -> None:
    """Each sample as a batch of one, under the noise it has in the batch."""
    spec = make_spec(objective)

    @quick
    def alone(frozen: Frozen, state: TrainState, batch: Batch, i: jax.Array) -> Any:
        x, keys = start(spec, state, BATCH)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fopd_jax.steps.opd.pieces.start", lambda *_: (x[i][None], keys[:, i][:, None]))
            alone = jax.tree.map(lambda leaf: leaf[i][None], batch)
            return fused_gradients(make_pieces(spec), frozen, state, alone)

    frozen, state = frozen_of(BANK), make_state()
    batch = jax.tree.map(jnp.asarray, make_batch())
    gradients, totals = fused(objective.name)(frozen, state, batch)
    apart = [alone(frozen, state, batch, jnp.int32(i)) for i in range(BATCH)]
    check(jax.tree.map(lambda *leaves: sum(leaves) / BATCH, *(each[0] for each in apart)), gradients)
    for name in TERMS:
        np.testing.assert_allclose(
            np.concatenate([each[1][name] for each in apart]), totals[name], rtol=TOLERANCE, err_msg=name
        )


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED], ids=["direct", "clipped"])
def test_no_gradient_where_student_teachers_and_anchor_are_one(objective: Objective) -> None:
    """Up to rounding: below 1e-5 of the gradient of this student among its true teachers."""
    state, same = make_state(), (4.5, (4.5, 4.5, 4.5))
    run = quick(fused_gradients, make_pieces(make_spec(objective, None, same)))
    zero, _ = run(frozen_of(dict.fromkeys(BANK, STUDENT)), state, make_batch())
    usual, _ = run(frozen_of(BANK), state, make_batch())
    found, size = float(optax.tree.norm(zero)), float(optax.tree.norm(usual))
    print(f"gradient {found:.1e}, usually {size:.1e}")
    assert found <= 1e-5 * size
