"""Panels of several networks against their velocities one by one: whoever is asked, in whatever slots.

Tolerance on ‖a - b‖/‖b‖: 1e-6, float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import effective, stack_bank
from fopd_jax.policy.groups import SURPLUS, GroupedPanel, Member, Slots, tile_of
from fopd_jax.policy.panel import Questions, RoutingTable
from fopd_jax.worlds.prompt_stream import Mix
from tests.steps.opd.network import SHAPE, adapter, check, make_velocity, normal, prompts, quick, variables

BATCH, TOLERANCE = 12, 1e-6
TEACHERS, ANCHOR, BASE = ("ocr", "counting", "large", "tuned"), 4, 5
SCALES = (4.5, 1.0, 2.0, 3.0, 1.5, 1.0)
OWN, OTHER = (
    (0, 1, 5),
    (2, 3, 4),
)  # the student's base answers its adapters and for itself; of the other's the first is none
STRENGTH = (0.0, 0.5, 0.25, 0.0)
TABLE = RoutingTable(TEACHERS, SCALES, ANCHOR)
BEYOND = RoutingTable(TEACHERS, SCALES, ANCHOR, STRENGTH, BASE)
X, SIGMA = jnp.asarray(normal(3, BATCH, *SHAPE)), jnp.float32(0.7)
TEXT, NULL = (jax.tree.map(jnp.asarray, prompts(seed, count)) for seed, count in ((1, BATCH), (7, 1)))
ROUTE = np.array([0, 2, 1, 3, 2, 0, 3, 1, 1, 2, 0, 3], np.int32)  # one of each network in any pair of neighbours


def nothing(like: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, like)


ADAPTERS = {0: adapter(20), 1: adapter(40), 2: nothing(adapter(60)), 3: adapter(60), 4: adapter(80)}
ADAPTERS[5] = nothing(ADAPTERS[0])


def other_velocity(rows: list[int] | None = None) -> Any:
    """Another network in the same latent space: twice what the first one says of a scaled state."""
    velocity = make_velocity(rows=rows)
    return lambda weights, bank, x, *rest: 2 * velocity(weights, bank, 0.5 * x, *rest)


def panel(
    ways: int = 1, slots: Slots | None = None, table: RoutingTable = TABLE, rows: Any = (None, None)
) -> GroupedPanel:
    own, other = (stack_bank({str(k): ADAPTERS[k] for k in entries}) for entries in (OWN, OTHER))
    weights = {"params": variables()["params"], "constants": {}}
    members = (
        Member(make_velocity(rows=rows[0]), OWN if table is BEYOND else OWN[:2], weights, own),
        Member(other_velocity(rows[1]), OTHER, weights, other),
    )
    return GroupedPanel(members, table, NULL, ways, slots)


@functools.cache
def alone(entry: int, side: str = "guided", scale: float | None = None) -> np.ndarray:
    """One entry's velocity at every sample, by two unrouted forwards of its network."""
    velocity = other_velocity() if entry in OTHER else make_velocity()
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (BATCH, *leaf.shape[1:])), NULL)
    forward = functools.partial(velocity, variables(), effective(ADAPTERS[entry]), X, SIGMA)
    text, null = (np.float64(forward(conditioning)) for conditioning in (TEXT, empty))
    found = {"text": text, "difference": text - null}
    return found[side] if side in found else null + (SCALES[entry] if scale is None else scale) * (text - null)


def routed(side: str = "guided") -> np.ndarray:
    return np.stack([alone(int(k), side)[i] for i, k in enumerate(ROUTE)])


def ask(found: GroupedPanel, *questions: Questions) -> Any:
    return quick(found.ask)(X, SIGMA, TEXT, questions)


@pytest.mark.parametrize(
    ("ways", "slots"), [(1, None), (3, None), (1, Slots(12, (6, 6))), (3, Slots(4, (2, 2))), (3, Slots(2, (1, 1)))]
)
def test_everyone_is_answered_by_their_own_network(ways: int, slots: Slots | None) -> None:
    teacher, anchor = ask(panel(ways, slots), *TABLE.questions(jnp.asarray(ROUTE)))
    check(teacher.velocity, routed(), TOLERANCE)
    check(anchor.velocity, alone(ANCHOR), TOLERANCE)


def test_extrapolation_leads_away_from_the_students_base() -> None:
    """v_k + λ·(v_k - v_base), the base under the teacher's scale, whatever network the teacher is."""
    teacher, _ = ask(panel(3, Slots(4, (4, 2)), BEYOND), *BEYOND.questions(jnp.asarray(ROUTE)))
    base = np.stack([alone(BASE, scale=SCALES[k])[i] for i, k in enumerate(ROUTE)])
    strength = np.asarray(STRENGTH)[ROUTE][:, None, None, None]
    check(teacher.velocity, routed() + strength * (routed() - base), TOLERANCE)


def test_soft_routing_asks_nobody_who_counts_nothing() -> None:
    """Half of the samples mix teachers of both networks, the others have one."""
    weights = np.zeros((BATCH, 2, len(TEACHERS)), np.float32)
    weights[::2, 0, 0], weights[::2, 1, 0], weights[::2, :, 2] = 0.4, 0.8, 0.6
    weights[1::2, :, 3] = 1.0
    bank = jnp.broadcast_to(jnp.arange(len(TEACHERS)), (BATCH, len(TEACHERS)))
    mix = Mix(bank, jnp.asarray(weights))
    found = panel(3, Slots(4, (2, 4)))
    teacher, _ = ask(found, *TABLE.questions(jnp.asarray(ROUTE), mix=mix, sigma=SIGMA))
    shares = 0.3 * weights[:, 0] + 0.7 * weights[:, 1]
    expected = sum(shares[:, k, None, None, None] * alone(k) for k in range(len(TEACHERS)))
    check(teacher.velocity, expected, TOLERANCE)


def test_branches_are_told_apart_and_the_anchor_is_asked_of_some() -> None:
    pick = np.array([1, 0, 1, 1, 0, 0])
    asked = np.arange(6) * 2 + pick
    questions = TABLE.questions(jnp.asarray(ROUTE), 2, jnp.asarray(pick), branches=True)
    teacher, anchor = ask(panel(3, Slots(4, (2, 2))), *questions)
    check(teacher.velocity, routed("text"), TOLERANCE)
    check(teacher.difference, routed("difference"), TOLERANCE)
    check(anchor.velocity, np.repeat(alone(ANCHOR, "text")[asked], 2, axis=0), TOLERANCE)
    check(anchor.difference, np.repeat(alone(ANCHOR, "difference")[asked], 2, axis=0), TOLERANCE)


# ---- slots


def test_who_finds_no_slot_gets_no_number_and_nobody_else_is_harmed() -> None:
    found = panel(3, Slots(4, (1, 2)))
    questions = TABLE.questions(jnp.asarray(ROUTE))
    teacher, anchor = ask(found, *questions)
    lost = np.array([np.flatnonzero(ROUTE[4 * k : 4 * k + 4] < 2)[1:] + 4 * k for k in range(3)]).ravel()
    assert np.isnan(np.asarray(teacher.velocity)[lost]).all()
    kept = np.setdiff1d(np.arange(BATCH), lost)
    check(np.asarray(teacher.velocity)[kept], routed()[kept], TOLERANCE)
    check(anchor.velocity, alone(ANCHOR), TOLERANCE)
    assert int(found.unanswered(questions, BATCH)) == len(lost) == 3
    assert int(panel(3, Slots(4, (2, 2))).unanswered(questions, BATCH)) == 0


def test_a_network_without_a_slot_is_not_run() -> None:
    rows: tuple[list[int], list[int]] = ([], [])
    route = jnp.full(BATCH, 3, jnp.int32)
    found = panel(3, Slots(4, (0, 4)), rows=rows)
    (teacher, _) = ask(found, *TABLE.questions(route))
    assert (rows[0], len(rows[1])) == ([], 1)
    check(teacher.velocity, alone(3), TOLERANCE)
    (teacher, _) = ask(found, *TABLE.questions(route.at[5].set(0)))
    assert np.isnan(np.asarray(teacher.velocity)[5]).all()
    assert np.isfinite(np.asarray(teacher.velocity)[:5]).all()


@pytest.mark.parametrize("slots", [Slots(4, (3, 1)), Slots(4, (2, 2)), Slots(4, (1, 3))])
def test_forwards_hold_the_slots_and_no_more(slots: Slots) -> None:
    """Twice: under the prompt and under the empty one. The anchor is on the second network."""
    rows: tuple[list[int], list[int]] = ([], [])
    found, questions = panel(3, slots, rows=rows), TABLE.questions(jnp.asarray(ROUTE))
    jax.eval_shape(found.ask, X, SIGMA, TEXT, questions)
    own, other = slots.questions
    assert rows == ([2 * 3 * own], [2 * (3 * other + BATCH)])
    assert found.rows(questions, BATCH) == (2 * own, 2 * (other + 4))


def test_slots_of_several_parts_are_those_of_each() -> None:
    assert [Slots(4, (3, 1)).of(group, 12) for group in (0, 1)] == [9, 3]
    assert Slots(4, (3, 1)).of(1, 6) == 2


# ---- whole networks


@functools.cache
def networks() -> Any:
    stack = lambda leaf: jnp.stack([leaf + 0.1 * normal(k + leaf.size, *leaf.shape) for k in range(5)])  # noqa: E731
    return jax.tree.map(stack, variables()["params"])


@pytest.mark.parametrize(("ways", "slots", "rows"), [
    (1, None, [2 * 12]), (3, Slots(4, (1, 1, 1, 1, 0)), [2 * 3]), (3, Slots(4, (2, 2, 2, 2, 0)), [2 * 6]),
])  # fmt: skip
def test_whole_networks_go_through_one_body(ways: int, slots: Slots | None, rows: list[int]) -> None:
    seen: list[int] = []
    route = jnp.asarray([0, 1, 2, 3] * 3, jnp.int32)
    weights = {"params": variables()["params"], "constants": {}}
    member = Member(make_velocity(rows=seen), tuple(range(5)), weights, networks(), stacked=True)
    teacher, anchor = ask(GroupedPanel((member,), TABLE, NULL, ways, slots), *TABLE.questions(route))
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (BATCH, *leaf.shape[1:])), NULL)
    expected = []
    for entry in range(5):
        params = jax.tree.map(lambda leaf, entry=entry: leaf[entry], networks())
        forward = functools.partial(make_velocity(), {"params": params}, {}, X, SIGMA)
        text, null = (np.float64(forward(conditioning)) for conditioning in (TEXT, empty))
        expected.append(null + SCALES[entry] * (text - null))
    check(teacher.velocity, np.stack([expected[int(k)][i] for i, k in enumerate(route)]), TOLERANCE)
    check(anchor.velocity, expected[ANCHOR], TOLERANCE)
    assert seen[:1] == rows


@pytest.mark.parametrize(
    ("counts", "tile"), [((5, 2, 2, 8), 2), ((4, 4, 4), 4), ((2, 2, 2, 4), 2), ((0, 3), 3), ((0, 0), 1), ((1, 64), 8)]
)
def test_tiles_are_as_large_as_leave_few_slots_empty(counts: tuple[int, ...], tile: int) -> None:
    assert tile_of(counts) == tile
    filled = sum(-(-count // tile) * tile for count in counts)
    assert sum(counts) <= filled <= (1 + SURPLUS) * sum(counts)
