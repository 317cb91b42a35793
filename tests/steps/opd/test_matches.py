"""What is compared, in every form of the update: fused, stored and mixed; and how often the student is asked."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.config.schema import EMA, Objective
from fopd_jax.config.teaching import MATCHES
from fopd_jax.steps.grpo.spec import Credit
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.mixed import make_programs
from fopd_jax.steps.opd.pieces import mean_metrics, student_says, student_velocity
from fopd_jax.steps.opd.replay import replay
from fopd_jax.steps.visits import make_passes
from tests.steps.opd.matching import bank_of, batch_of, spec_of
from tests.steps.opd.network import (
    BANK,
    BATCH,
    GUIDED,
    PLAIN,
    SGD,
    SHAPE,
    STUDENT,
    TEACHERS,
    check,
    frozen_of,
    level,
    make_pieces,
    make_spec,
    make_state,
    normal,
    quick,
)

# ---- forms

FORMS = {
    "conditional": (
        Objective("direct", weighting="x_next", match="conditional", normalise=True, mar_beta=0.3), {},
    ),
    "branches": (
        Objective("clipped", weighting="x0", match="branches", normalise=True, mar_beta=0.3),
        {"trained": (1, 3), "anchor_every": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMS)
def test_an_update_that_is_stored_and_replayed_is_the_fused_one(case: str) -> None:
    """Of mixed and extrapolated targets, which are kept for the replay; its metrics, too. Rates are 0.1."""
    objective, fields = FORMS[case]
    pieces, state, batch = make_pieces(spec_of(objective, soft=True, **fields)), make_state(), batch_of(soft=True)
    expected, totals = quick(fused_gradients, pieces)(bank_of(soft=True), state, batch)
    after, metrics = quick(replay, pieces, SGD, EMA())(bank_of(soft=True), state, batch)
    moved = jax.tree.map(lambda new, old: (old - new) / 0.1, after.trained, state.trained)
    check(moved, expected, 1e-4)  # a difference of parameters
    for name, value in mean_metrics(totals, batch.route, TEACHERS).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_without_tasks_the_mixed_objective_is_the_clipped_one() -> None:
    """Branches, normalised, in the programs that a host drives; the loss of the last pass and where it leads."""
    objective = Objective("mixed", task_weight=0.0, match="branches", normalise=True, mar_beta=0.3, clip=0.01)
    batch, state = batch_of(soft=False), make_state()
    programs = make_programs(make_pieces(spec_of(objective)), SGD, EMA())
    credit = Credit(jnp.ones(BATCH), jnp.zeros((1, BATCH)), jnp.zeros((1, BATCH), bool), *jnp.ones((2, BATCH), bool))
    passes, frozen = make_passes(1, 1, 1), bank_of(soft=False)
    progress: Any = (jax.tree.map(jnp.array, state), *programs.begin(frozen, state, batch))
    for k in range(2):
        each = jax.tree.map(lambda leaf, k=k: jnp.asarray(leaf[k]), passes)
        progress, _ = programs.go(frozen, progress, batch, credit, each)
    clipped = make_pieces(spec_of(dataclasses.replace(objective, name="clipped")))
    expected, _ = quick(fused_gradients, clipped)(frozen, make_state(), batch)
    check(jax.tree.map(lambda new, old: (old - new) / 0.1, progress[0].trained, STUDENT), expected, 1e-4)


# ---- the student's forwards


@pytest.mark.parametrize(
    ("match", "scale", "said", "sampled"),
    [  # rows a sample where it is compared, and where it is only sampled
        ("guided", 1.0, 1, 1), ("guided", 4.5, 2, 2), ("conditional", 1.0, 1, 1), ("conditional", 2.0, 2, 2),
        ("branches", 1.0, 2, 1), ("branches", 4.5, 2, 2),
    ],
)  # fmt: skip
def test_the_empty_prompt_is_read_where_it_is_needed_alone(match: str, scale: float, said: int, sampled: int) -> None:
    """Whatever the teachers' scales: a student of scale 1 that learns guided velocities never reads it."""
    rows: list[int] = []
    spec = make_spec(Objective(match=match), guidance=(scale, GUIDED[1]))
    frozen, x, sigma = frozen_of(BANK), jnp.zeros((BATCH, *SHAPE)), level(True).sigma
    for function in (student_says, student_velocity):
        call = functools.partial(function, make_pieces(spec, rows), frozen)
        jax.eval_shape(call, STUDENT, batch_of(soft=False).conditioning, x, sigma)
    assert rows == [said * BATCH, sampled * BATCH]


def test_the_student_samples_by_the_same_velocity_whatever_is_compared() -> None:
    """Its guided one of its own scale; what is compared stands beside it."""
    frozen, x, text = frozen_of(BANK), jnp.asarray(normal(3, BATCH, *SHAPE)), batch_of(soft=False).conditioning
    for match, scale in itertools.product(MATCHES, (1.0, 2.0)):
        pieces = make_pieces(make_spec(Objective(match=match), guidance=(scale, GUIDED[1])))
        arguments = frozen, STUDENT, text, x, jnp.float32(0.7)
        v, own = student_says(pieces, *arguments)
        check(v, student_velocity(pieces, *arguments), 1e-6)
        alone = make_pieces(make_spec(Objective(), guidance=PLAIN))
        conditional = student_velocity(alone, *arguments)
        check(own.velocity, v if match == "guided" else conditional, 1e-6)
        if match == "branches":
            check(v, conditional + (scale - 1) * own.difference, 1e-6)


def test_hard_routing_of_guided_velocities_is_what_it_was() -> None:
    """Nothing is multiplied, joined or taken apart: one question a sample without coefficient or scale of its own."""
    spec = make_spec(Objective())
    own, anchor = spec.table.questions(jnp.asarray([1, 0, 1]), sigma=jnp.float32(0.3))
    for questions in (own, anchor):
        assert (questions.coefficient, questions.scale, questions.pick) == (None, None, None)
        assert (questions.bank.shape, questions.every, questions.branches) == ((BATCH, 1), 1, False)
    pieces, x = make_pieces(spec), jnp.zeros((BATCH, *SHAPE))
    says = functools.partial(student_says, pieces, frozen_of(BANK), STUDENT, batch_of(soft=False).conditioning)
    says_nothing_else = jax.make_jaxpr(lambda x, s: says(x, s)[1].velocity)(x, jnp.float32(0.7))
    velocity = functools.partial(student_velocity, pieces, frozen_of(BANK), STUDENT)
    text = batch_of(soft=False).conditioning
    assert str(says_nothing_else) == str(jax.make_jaxpr(lambda x, s: velocity(text, x, s))(x, jnp.float32(0.7)))
