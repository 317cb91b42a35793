"""Costs of tables are those of their students' updates, each counted once."""

import pytest

from fopd_jax.config.parse import override, resolve
from fopd_jax.performance.topology import CHIPS
from fopd_jax.stages.costs import step_cost
from fopd_jax.studies.estimate import Cost, as_rows, costs_of, flops_of
from tests.configs import load

PLAIN = resolve(load("miniature"))
TWICE = resolve(override(load("miniature"), {"batch_size": 2 * PLAIN.batch_size}))


def test_a_student_is_counted_at_its_first_table() -> None:
    found = costs_of({"one": [("a", PLAIN), ("b", TWICE)], "two": [("a", PLAIN)]})
    assert found["one"] == Cost(2, flops_of(PLAIN) + flops_of(TWICE))
    assert found["two"] == Cost(0, 0.0)
    assert flops_of(TWICE) == pytest.approx(2 * flops_of(PLAIN))
    assert flops_of(PLAIN) == step_cost(PLAIN).model * PLAIN.run.steps


def test_hours_are_flops_by_peak_and_share() -> None:
    cost = Cost(1, 0.5 * CHIPS["v6e"].peak_flops * 7200)
    assert cost.hours(CHIPS["v6e"], 0.5) == 2
    rows = as_rows({"one": cost}, 0.5)
    assert rows[1][rows[0].index("v6e hours")] == "2"
    assert rows[2] == ["all", *rows[1][1:]]
