"""Which prompts come when: shares exact at every draw, epochs without repeats, any draw without the ones before it."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from fopd_jax.tasks.sampling import Shares, Walk

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
