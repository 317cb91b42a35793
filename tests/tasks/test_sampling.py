"""Which prompts come when: shares exact at every draw, epochs without repeats, any draw without the ones before it."""

import dataclasses
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from fopd_jax.tasks.sampling import Curriculum, Shares, Walk

WEIGHTS = [
    (1.0,), (1.0, 1.0), (3.0, 1.0, 1.0), (0.3, 0.5, 0.2), (1.0, 0.0, 2.0), (1.0,) * 7, (1e6, 1.0), (1e-6, 1.0, 1.0),
    (0.7, 0.3, 0.1, 0.5, 0.1), (1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0), (0.1, 1e6, 0.123456789),
]  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counts_follow_the_shares_at_every_draw(weights: tuple[float, ...]):
    shares = Shares(weights)
    exact = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    for start in (0, 10**15):
        before = None
        for draws in range(start, start + 300):
            counts = shares.counts(draws)
            assert counts.sum() == draws
            gaps = [abs(int(count) - draws * share) for count, share in zip(counts, exact, strict=True)]
            assert max(gaps) <= shares.bound() + 1e-9
            assert before is None or (counts >= before).all()
            before = counts
    assert shares.bound() <= 1.5
    assert all(counts == 0 for counts, weight in zip(shares.counts(10**9), weights, strict=True) if not weight)


def test_the_bound_is_small():
    assert Shares((1.0,)).bound() == 0
    assert Shares((2.0, 1.0)).bound() == 0.5
    assert Shares((3.0, 1.0, 1.0)).bound() == 0.75
    random = np.random.default_rng(0)
    for _ in range(200):
        weights = random.exponential(size=random.integers(2, 17)) ** random.integers(1, 6)
        assert Shares(tuple(weights.tolist())).bound() < 1.5


def test_without_weight_nothing_can_be_drawn():
    with pytest.raises(ValueError, match=r"^tasks: found weights \[0\.0, 0\.0\], expected at least one above 0$"):
        Shares((0.0, 0.0))


def test_an_epoch_is_a_permutation_and_each_is_another():
    walk = Walk(0, "ocr", 50)
    epochs = [walk(50 * epoch, 50 * epoch + 50).tolist() for epoch in range(20)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_any_part_of_a_walk_can_be_asked_for_by_itself():
    whole = Walk(7, "ocr", 5)(0, 100).tolist()
    asked = Walk(7, "ocr", 5)
    for start, stop in ((0, 3), (3, 12), (97, 100), (0, 100), (41, 41), (4, 6)):
        assert asked(start, stop).tolist() == whole[start:stop]
    assert asked(10**15, 10**15 + 7).tolist() == Walk(7, "ocr", 5)(10**15 - 2, 10**15 + 7).tolist()[2:]
    assert Walk(0, "one", 1)(0, 4).tolist() == [0, 0, 0, 0]


def test_walks_differ_by_seed_and_task_alone():
    walks = {(seed, task): tuple(Walk(seed, task, 30)(0, 30).tolist()) for seed in (0, 1) for task in ("a", "b")}
    assert len(set(walks.values())) == 4


def test_every_order_is_as_likely():
    """First places of 3,000 permutations of ten: χ² with 9 degrees of freedom below its 99.9% point."""
    first = Counter(Walk(0, "ocr", 10)(0, 30_000)[::10].tolist())
    assert sum((first[k] - 300) ** 2 / 300 for k in range(10)) < 27.88


# ---- weights that change


@dataclasses.dataclass
class Weighted:
    weight: float
    schedule: dict[str, float] = dataclasses.field(default_factory=dict)


CHANGES = {
    "one task after the other": [Weighted(1.0, {"7": 0.0}), Weighted(0.0, {"7": 1.0})],
    "three stretches": [Weighted(3.0, {"10": 1.0}), Weighted(1.0, {"4": 2.0, "10": 0.3}), Weighted(1.0)],
    "never": [Weighted(3.0), Weighted(1.0)],
}


def simulated(tasks: list[Weighted], draws: int, steps: int) -> list[list[int]]:
    """Step by step: the weights that hold, and a stretch's own count of draws, from which each step's are taken."""
    counts, rows, weights, since = [0] * len(tasks), [[0] * len(tasks)], None, 0
    for step in range(steps):
        now = tuple(
            next((task.schedule[str(s)] for s in range(step, 0, -1) if str(s) in task.schedule), task.weight)
            for task in tasks
        )
        starts = any(str(step) in task.schedule for task in tasks)
        if weights is None or starts:
            weights, since = now, step
        before, after = (Shares(weights).counts(draws * (each - since)) for each in (step, step + 1))
        counts = [count + int(b) - int(a) for count, a, b in zip(counts, before, after, strict=True)]
        rows.append(counts)
    return rows


@pytest.mark.parametrize("draws", [1, 7, 12])
@pytest.mark.parametrize("case", CHANGES)
def test_a_curriculum_is_its_simulation_at_any_step(case: str, draws: int):
    curriculum, expected = Curriculum.of(CHANGES[case]), simulated(CHANGES[case], draws, 30)
    for step in (0, 29, 3, 4, 7, 10, 11, 30):  # whatever was asked before
        assert curriculum.counts(step, draws).tolist() == expected[step]
    far = curriculum.counts(10**9, draws)
    assert far.sum() == draws * 10**9


def test_counts_follow_the_weights_of_every_stretch():
    curriculum = Curriculum.of(CHANGES["three stretches"])
    assert [(start, stop) for start, stop, _ in curriculum.within(30)] == [(0, 4), (4, 10), (10, 30)]
    assert [(start, stop) for start, stop, _ in curriculum.within(4)] == [(0, 4)]
    bounds = 0.0
    for start, stop, shares in curriculum.within(400):
        bounds += shares.bound()
        drawn = curriculum.counts(stop, 5) - curriculum.counts(start, 5)
        exact = 5 * (stop - start) * np.array(shares.weights) / sum(shares.weights)
        assert np.abs(drawn - exact).max() <= shares.bound() + 1e-9
    assert bounds < 3


def test_a_stretch_without_weights_is_named():
    with pytest.raises(ValueError, match=r"^tasks: found weights \[0\.0, 0\.0\], expected .* above 0, from step 5 on$"):
        Curriculum.of([Weighted(1.0, {"5": 0.0}), Weighted(0.0)])


# ---- by turns


@pytest.mark.parametrize("turn", [1, 3])
@pytest.mark.parametrize("weights", [(3.0, 1.0, 1.0), (1.0, 1.0), (1.0, 0.0, 2.0), (2.0,), (0.3, 0.5, 0.2)], ids=str)
def test_a_turn_is_one_tasks_and_turns_follow_the_shares(weights: tuple[float, ...], turn: int):
    curriculum, draws, cycle = Curriculum.of([Weighted(weight) for weight in weights], turn), 7, 60
    counts = np.stack([curriculum.counts(step, draws) for step in range(turn * cycle + 1)])
    steps = np.diff(counts, axis=0)
    assert (np.sort(steps, axis=1)[:, -1] == draws).all()
    assert (steps.sum(1) == draws).all()
    tasks = steps.argmax(1).reshape(cycle, turn)
    assert (tasks == tasks[:, :1]).all()
    exact = np.array([float(Fraction(weight) / sum(map(Fraction, weights))) for weight in weights])
    np.testing.assert_array_equal(counts[-1], np.round(turn * cycle * draws * exact))  # all of them whole numbers
    bound = turn * draws * Shares(weights).bound()
    assert (np.abs(counts[::turn] - draws * turn * np.arange(cycle + 1)[:, None] * exact) <= bound + 1e-9).all()
    np.testing.assert_array_equal(curriculum.most(draws), steps.max(0))
    far = 10**15 + 1
    assert (curriculum.counts(far + 1, draws) - curriculum.counts(far, draws)).max() == draws


def test_turns_of_three_to_one_to_one_are_spread():
    curriculum = Curriculum.of([Weighted(3.0), Weighted(1.0), Weighted(1.0)], 1)
    turns = [int((curriculum.counts(k + 1, 1) - curriculum.counts(k, 1)).argmax()) for k in range(10)]
    assert turns[:5] == turns[5:]
    assert sorted(turns[:5]) == [0, 0, 0, 1, 2]


def test_a_change_of_weights_begins_a_turn():
    curriculum = Curriculum.of([Weighted(1.0, {"7": 0.0}), Weighted(0.0, {"7": 1.0})], 4)
    counts = [curriculum.counts(step, 2).tolist() for step in (0, 6, 7, 8, 20)]
    assert counts == [[0, 0], [12, 0], [14, 0], [14, 2], [14, 26]]
