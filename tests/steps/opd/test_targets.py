"""Teachers and anchor: whose targets a sample gets, in how many rows, and what asking the anchor less often keeps."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import effective
from fopd_jax.config.schema import Objective
from fopd_jax.objectives.opd import TERMS
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.pieces import student_velocity
from fopd_jax.steps.opd.targets import ask
from fopd_jax.worlds.prompt_stream import Batch
from tests.steps.opd.network import (
    BANK,
    BATCH,
    CLIPPED,
    DIRECT,
    GUIDED,
    PLAIN,
    SHAPE,
    STUDENT,
    TEACHERS,
    TOLERANCE,
    check,
    frozen_of,
    fused,
    level,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    make_velocity,
    normal,
    quick,
    relative_error,
    scaled_sum,
)


def test_targets_are_each_samples_own_teacher_and_the_banks_last_entry() -> None:
    """Guided by hand, one unrouted forward per adapter: per-teacher scales, the anchor for everyone."""
    pieces, frozen, batch = make_pieces(make_spec(DIRECT)), frozen_of(BANK), jax.tree.map(jnp.asarray, make_batch())
    x, at = jnp.asarray(normal(3, BATCH, *SHAPE)), level(True)
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (BATCH, *leaf.shape[1:])), frozen.null)

    def by_hand(name: str, scale: float) -> np.ndarray:
        forward = functools.partial(make_velocity(), frozen.variables, effective(BANK[name]), x, at.sigma)
        text, null = (np.float64(forward(c)) for c in (batch.conditioning, empty))
        return null + scale * (text - null)

    ocr, counting, anchor = (by_hand(name, scale) for name, scale in zip(BANK, GUIDED[1], strict=True))
    found = ask(pieces, frozen, batch, x, at)
    chosen = np.where((np.asarray(batch.route) == 0)[:, None, None, None], ocr, counting)
    check(found.teacher, chosen, 1e-6)
    check(found.anchor, anchor, 1e-6)


@pytest.mark.parametrize("sample", range(BATCH))
def test_a_mixed_batch_is_each_sample_with_its_teacher_alone(sample: int) -> None:
    """A bank of one teacher and the anchor, all samples routed to it: the sample's totals are those of the mix."""
    batch = make_batch()
    k = int(batch.route[sample])
    _, totals = fused(CLIPPED.name)(frozen_of(BANK), make_state(), batch)
    alone = single_teacher(k)
    bank = {TEACHERS[k]: BANK[TEACHERS[k]], "anchor": BANK["anchor"]}
    _, found = alone(frozen_of(bank), make_state(), Batch(batch.conditioning, np.zeros_like(batch.route)))
    for name in TERMS:
        np.testing.assert_allclose(found[name][sample], totals[name][sample], rtol=TOLERANCE, err_msg=name)


@functools.cache
def single_teacher(k: int) -> Any:
    student, scales = GUIDED
    spec = make_spec(CLIPPED, None, (student, (scales[k], scales[-1])), teachers=(TEACHERS[k],))
    return quick(fused_gradients, make_pieces(spec))


@pytest.mark.parametrize(
    ("beta", "guidance", "student", "teachers"),
    [  # rows per forward: doubled by the anchor, doubled by any scale other than 1
        (0.3, GUIDED, 2 * BATCH, 4 * BATCH),
        (0.0, GUIDED, 2 * BATCH, 2 * BATCH),
        (0.3, PLAIN, BATCH, 2 * BATCH),
        (0.0, PLAIN, BATCH, BATCH),
        (0.3, (1.0, GUIDED[1]), BATCH, 4 * BATCH),
        (0.3, (4.5, PLAIN[1]), 2 * BATCH, 2 * BATCH),
    ],
)
def test_forwards_hold_no_more_rows_than_needed(beta: float, guidance: Any, student: int, teachers: int) -> None:
    rows: list[int] = []
    pieces = make_pieces(make_spec(dataclasses.replace(DIRECT, mar_beta=beta), None, guidance), rows)
    x = jnp.zeros((BATCH, *SHAPE))
    batch = jax.tree.map(jnp.asarray, make_batch())
    found = jax.eval_shape(partial(ask, pieces), frozen_of(BANK), batch, x, level(True))
    assert (found.anchor is None) == (beta == 0)
    assert found.teacher.shape == x.shape
    jax.eval_shape(
        partial(student_velocity, pieces), frozen_of(BANK), STUDENT, batch.conditioning, x, level(True).sigma
    )
    assert rows == [teachers, student]


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED], ids=["direct", "clipped"])
def test_an_anchor_asked_of_some_samples_is_unbiased(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over every pick is the gradient of asking it of all."""
    every, batch = 3, make_batch(6)
    pieces, state, parts = make_pieces(make_spec(objective, anchor_every=every)), make_state(), []
    for pick in range(every):
        monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high, pick=pick: jnp.full(shape, pick))
        run = quick(fused_gradients, make_pieces(make_spec(objective, anchor_every=every)))
        parts.append(run(frozen_of(BANK), state, batch)[0])
    monkeypatch.undo()
    whole = quick(fused_gradients, make_pieces(make_spec(objective)))(frozen_of(BANK), state, batch)[0]
    check(scaled_sum(parts, [1 / every] * every), whole)
    assert relative_error(parts[0], whole) > 1e-2
    drawn = quick(fused_gradients, pieces)(frozen_of(BANK), state, batch)[0]
    assert min(relative_error(drawn, part) for part in parts) > 1e-3  # picks differ from block to block


def test_the_anchor_sees_fewer_rows() -> None:
    rows: list[int] = []
    pieces = make_pieces(make_spec(DIRECT, guidance=PLAIN, anchor_every=3), rows)
    batch = jax.tree.map(jnp.asarray, make_batch(6))
    x, pick = jnp.zeros((6, *SHAPE)), jnp.zeros(2, jnp.int32)
    jax.eval_shape(partial(ask, pieces), frozen_of(BANK), batch, x, level(True), pick)
    assert rows == [6 + 2]
