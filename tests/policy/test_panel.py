"""Questions to a panel against velocities computed one by one: hard and soft routing, extrapolation, subsets.

Tolerance on ‖a - b‖/‖b‖: 1e-6, float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import effective, stack_bank
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.policy.groups import GroupedPanel, Member
from fopd_jax.policy.panel import AdapterPanel, Answer, Questions, RoutingTable, make_panel
from fopd_jax.worlds.prompt_stream import Mix
from tests.steps.opd.network import SHAPE, adapter, check, make_velocity, normal, prompts, quick, variables

BATCH, TOLERANCE = 6, 1e-6
SCALES, PLAIN = (4.5, 1.0, 2.0, 3.0), (1.0,) * 4
BASE = 3  # an adapter without effect
ADAPTERS = {str(k): adapter(20 * k + 20) for k in range(BASE)}
ADAPTERS["base"] = jax.tree.map(jnp.zeros_like, ADAPTERS["0"])
X, SIGMA = jnp.asarray(normal(3, BATCH, *SHAPE)), jnp.float32(0.7)
TEXT, NULL = (jax.tree.map(jnp.asarray, prompts(seed, count)) for seed, count in ((1, BATCH), (7, 1)))
ROUTE = jnp.asarray([1, 0, 2, 2, 0, 1], jnp.int32)


@functools.cache
def networks() -> Any:
    """Four whole networks, stacked."""
    return jax.tree.map(
        lambda leaf: jnp.stack([leaf + 0.1 * normal(k + leaf.size, *leaf.shape) for k in range(4)]),
        variables()["params"],
    )


def panel_of(networked: bool, scales: tuple[float, ...] = SCALES, rows: list[int] | None = None) -> Any:
    everything, velocity = {"params": variables()["params"], "constants": {}}, make_velocity(rows=rows)
    if not networked:
        return AdapterPanel(velocity, scales, everything, stack_bank(ADAPTERS), None if scales == PLAIN else NULL)
    member = Member(velocity, tuple(range(len(scales))), everything, networks(), stacked=True)
    return GroupedPanel((member,), RoutingTable(("a", "b", "c", "d"), scales), NULL, 1)


def ask(networked: bool, *questions: Questions, scales: tuple[float, ...] = SCALES) -> tuple[Answer, ...]:
    return quick(panel_of(networked, scales).ask)(X, SIGMA, TEXT, questions)


@functools.cache
def alone(networked: bool, entry: int, guided: bool = True) -> np.ndarray:
    """One bank entry's velocity at every sample, by two unrouted forwards."""
    if networked:
        weights, own = {"params": jax.tree.map(lambda leaf: leaf[entry], networks())}, {}
    else:
        weights, own = variables(), effective(list(ADAPTERS.values())[entry])
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (BATCH, *leaf.shape[1:])), NULL)
    forward = functools.partial(make_velocity(), weights, own, X, SIGMA)
    text, null = (np.float64(forward(conditioning)) for conditioning in (TEXT, empty))
    return null + (SCALES[entry] if guided else 1.0) * (text - null)


def own(networked: bool, route: Any = ROUTE, guided: bool = True) -> np.ndarray:
    """Each sample's velocity by its own entry."""
    return np.stack([alone(networked, int(k), guided)[i] for i, k in enumerate(route)])


both = pytest.mark.parametrize("networked", [False, True], ids=["adapters", "networks"])


@both
@pytest.mark.parametrize("scales", [SCALES, PLAIN], ids=["guided", "plain"])
def test_one_question_is_hard_routing(networked: bool, scales: tuple[float, ...]) -> None:
    (found,) = ask(networked, Questions(ROUTE[:, None]), scales=scales)
    assert found.counts is None
    check(found.velocity, own(networked, guided=scales == SCALES), TOLERANCE)


@both
def test_several_questions_are_soft_routing(networked: bool) -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(3), BATCH).astype(np.float32)
    entries = jnp.broadcast_to(jnp.arange(3), (BATCH, 3))
    (found,) = ask(networked, Questions(entries, jnp.asarray(shares)))
    expected = sum(shares[:, k, None, None, None] * alone(networked, k) for k in range(3))
    check(found.velocity, expected, TOLERANCE)


@both
def test_extrapolation_asks_teacher_and_base(networked: bool) -> None:
    """v_k + λ·(v_k - v_base), beside the anchor as a second target."""
    strength = 0.4
    entries = jnp.stack([ROUTE, jnp.full(BATCH, BASE, jnp.int32)], 1)
    coefficients = jnp.broadcast_to(jnp.asarray([1 + strength, -strength]), (BATCH, 2))
    teacher, anchor = ask(networked, Questions(entries, coefficients), Questions(jnp.full((BATCH, 1), 2, jnp.int32)))
    routed = own(networked)
    check(teacher.velocity, routed + strength * (routed - alone(networked, BASE)), TOLERANCE)
    check(anchor.velocity, alone(networked, 2), TOLERANCE)


@both
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_one_of_some_neighbours_is_asked_and_counts_for_all(networked: bool, every: int, soft: bool) -> None:
    count = BATCH // every
    pick = np.arange(1, count + 1) % every
    anchor, coefficient = jnp.full((count, 1), 2, jnp.int32), None
    if soft:
        anchor, coefficient = jnp.asarray([[2, 0]] * count, jnp.int32), jnp.asarray([[0.75, 0.25]] * count)
    teacher, found = ask(networked, Questions(ROUTE[:, None]), Questions(anchor, coefficient, jnp.asarray(pick), every))
    check(teacher.velocity, own(networked), TOLERANCE)
    asked = np.arange(count) * every + pick
    expected = 0.75 * alone(networked, 2) + 0.25 * alone(networked, 0) if soft else alone(networked, 2)
    check(found.velocity, np.repeat(expected[asked], every, axis=0), TOLERANCE)
    counts = np.zeros(BATCH)
    counts[asked] = every
    np.testing.assert_array_equal(found.counts, counts)


@pytest.mark.parametrize(
    ("scales", "expected"), [(PLAIN, [3 * BATCH + BATCH // 2]), (SCALES, [2 * (3 * BATCH + BATCH // 2)])]
)
def test_all_targets_are_rows_of_one_forward(scales: tuple[float, ...], expected: list[int]) -> None:
    rows: list[int] = []
    soft = Questions(jnp.zeros((BATCH, 3), jnp.int32), jnp.ones((BATCH, 3)))
    anchor = Questions(jnp.zeros((3, 1), jnp.int32), pick=jnp.zeros(3, jnp.int32), every=2)
    jax.eval_shape(panel_of(False, scales, rows).ask, X, SIGMA, TEXT, (soft, anchor))
    assert rows == expected


def test_a_noise_level_per_sample_is_each_samples_own() -> None:
    sigmas = jnp.linspace(0.2, 0.9, BATCH)
    (found,) = quick(panel_of(False).ask)(X, sigmas, TEXT, (Questions(ROUTE[:, None]),))
    for i in range(BATCH):
        row, text = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (X, TEXT))
        (single,) = quick(panel_of(False).ask)(row, sigmas[i], text, (Questions(ROUTE[i : i + 1, None]),))
        check(found.velocity[i : i + 1], single.velocity, TOLERANCE)


def test_a_mix_may_hold_the_base_under_the_scale_of_each_samples_own_teacher() -> None:
    """As coordinates ask: Σ_k c_k·v_k + (1 - Σ_k c_k)·v_base, in float64, at levels between the mix's ends."""
    table = RoutingTable(("a", "b", "c"), SCALES, base=BASE)
    ends = np.random.default_rng(1).uniform(0, 1.25, (BATCH, 2, 3)).astype(np.float32)
    weights = np.concatenate([ends, 1 - ends.sum(2, keepdims=True)], axis=2)
    bank = np.broadcast_to(np.arange(4, dtype=np.int32), (BATCH, 4))
    (questions,) = table.questions(ROUTE, mix=Mix(jnp.asarray(bank), jnp.asarray(weights)), sigma=SIGMA)
    assert questions.bank.shape == (BATCH, 4)  # the base is no question more
    (found,) = ask(False, questions)
    at: np.ndarray = 0.3 * np.float64(weights[:, 0]) + 0.7 * np.float64(weights[:, 1])
    each = np.stack([*(alone(False, k) for k in range(3)), _base_under(ROUTE)])
    check(found.velocity, (at.T[..., None, None, None] * each).sum(0), TOLERANCE)


def test_a_mix_with_the_base_and_extrapolation_ask_for_both() -> None:
    table = RoutingTable(("a", "b", "c"), SCALES, extrapolation=(0.5, 0.0, 0.0), base=BASE)
    bank, weights = np.asarray([[0, BASE]] * BATCH, np.int32), np.asarray([[[0.75, 0.25]] * 2] * BATCH, np.float32)
    (questions,) = table.questions(ROUTE, mix=Mix(jnp.asarray(bank), jnp.asarray(weights)), sigma=SIGMA)
    (found,) = ask(False, questions)
    gain = 1.5 * 0.75 * alone(False, 0) - 0.5 * 0.75 * _base_under(np.zeros(BATCH, int))
    check(found.velocity, gain + 0.25 * _base_under(ROUTE), TOLERANCE)


def _base_under(route: Any) -> np.ndarray:
    """The base's velocity, each sample under the scale of an entry."""
    text = alone(False, BASE, guided=False)
    null = (alone(False, BASE) - SCALES[BASE] * text) / (1 - SCALES[BASE])
    scales = np.asarray(SCALES)[np.asarray(route)][:, None, None, None]
    return null + scales * (text - null)


# ---- what is refused


def test_subsets_of_two_sizes_are_refused() -> None:
    two, three = (
        Questions(jnp.zeros((BATCH // every, 1), jnp.int32), pick=jnp.zeros(BATCH // every, jnp.int32), every=every)
        for every in (2, 3)
    )
    with pytest.raises(ValueError, match=r"^every: found \[2, 3\], expected 1 or one other number$"):
        panel_of(False).ask(X, SIGMA, TEXT, (two, three))


# ---- the routing table


def test_a_table_is_made_of_tasks_and_the_anchor_follows_them() -> None:
    table = RoutingTable.of_tasks({"ocr": 1.0, "geneval": 4.5}, 2.0)
    assert table == RoutingTable(("ocr", "geneval"), (1.0, 4.5, 2.0), 2)
    teacher, anchor = table.questions(jnp.asarray([1, 0, 0, 1]), 2, jnp.asarray([0, 1]))
    np.testing.assert_array_equal(teacher.bank, [[1], [0], [0], [1]])
    np.testing.assert_array_equal(anchor.bank, [[2], [2]])
    assert (teacher.every, anchor.every) == (1, 2)


def test_without_an_anchor_nobody_else_is_asked() -> None:
    table = RoutingTable.of_tasks({"ocr": 1.0}, None)
    assert table.anchor is None
    assert len(table.questions(jnp.zeros(4, jnp.int32))) == 1


@pytest.mark.parametrize(("scales", "anchor", "guided"), [((1.0, 1.0), 1.0, False), ((1.0, 2.0), 1.0, True)])
def test_the_empty_prompt_is_read_where_any_scale_needs_it(
    scales: tuple[float, float], anchor: float, guided: bool
) -> None:
    table = RoutingTable.of_tasks(dict(zip("ab", scales, strict=True)), anchor)
    assert table.guided == guided
    empty: Conditioning = NULL
    panel: Any = make_panel(make_velocity(), table, variables(), {}, empty)
    assert (panel.null is None) != guided


def test_an_entry_without_a_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^guidance: found 2 scales, expected 3, one for each bank entry$"):
        RoutingTable(("a", "b"), (1.0, 1.0), 2)


def _table(*teachers: str) -> RoutingTable:
    return RoutingTable.of_tasks(dict.fromkeys(teachers, 1.0), None)


def test_routes_are_indices_into_the_teachers_in_their_order() -> None:
    found = _table("c", "b", "a").routes(["b", "a", "c", "b"], list("wxyz"))
    assert found.tolist() == [1, 2, 0, 1]
    assert found.dtype == np.int32
    assert _table("a").routes([], []).shape == (0,)


def test_a_prompt_whose_task_has_no_teacher_is_named_with_the_task_and_the_teachers() -> None:
    with pytest.raises(ValueError, match=r"prompt 'two red squares': its task 'composition' has no teacher") as error:
        _table("text", "quality").routes(["text", "composition"], ['sign "ABC"', "two red squares"])
    assert "('text', 'quality')" in str(error.value)


def test_tasks_and_prompts_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        _table("text").routes(["text", "text"], ["one"])
