"""Intervals and p-values against scipy's, closed forms, exact enumeration and plain Python; coverage by simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from fopd_jax.evaluation.statistics import EXACT, RESAMPLES, Sums, estimate, holm, interval, p_value

APART = 0.15
"""Of a standard error: four deviations of the difference of two 2.5% points, each of 10,000 draws."""


def sums(values: np.ndarray, strata: np.ndarray | None = None) -> Sums:
    """Of scores `[prompts, samples]`, NaN where there is none; a stratum a term, all alike."""
    strata = np.zeros(len(values), int) if strata is None else strata
    terms = strata.max() + 1
    belongs = (strata[:, None] == np.arange(terms)).astype(float)
    there = ~np.isnan(values)
    return Sums(
        belongs * np.where(there, values, 0).sum(1)[:, None], belongs * there.sum(1)[:, None].astype(float),
        np.full(terms, 1 / terms), strata,
    )  # fmt: skip


def test_of_single_images_right_or_wrong_the_interval_is_the_binomial_s():
    """The bootstrap's mean of n outcomes is binomial with their mean: its quantiles are known."""
    for right, count in ((30, 100), (92, 100), (3, 12)):
        value, low, high = interval(sums(np.repeat([1.0, 0.0], [right, count - right])[:, None]))
        expected = stats.binom(count, right / count).ppf([0.025, 0.975]) / count
        assert value == pytest.approx(right / count)
        assert np.abs(np.array([low, high]) - expected).max() <= 1 / count + 1e-12  # one step


def test_prompts_are_drawn_with_all_their_images_as_scipy_draws_pairs():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(60, 1)) + 0.3 * rng.normal(size=(60, 4))
    values[rng.random(values.shape) < 0.2] = np.nan
    of = sums(values)
    found = interval(of)
    expected = stats.bootstrap(
        (of.sums[:, 0], of.counts[:, 0]), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, vectorized=True,
        n_resamples=RESAMPLES, method="percentile", rng=2,
    )  # fmt: skip
    assert found.value == pytest.approx(np.nanmean(values))
    limits = np.array([found.low, found.high]) - np.array(expected.confidence_interval)
    assert np.abs(limits).max() < APART * expected.standard_error
    apart = stats.sem(values[~np.isnan(values)])  # as if images were independent
    assert expected.standard_error > 1.5 * apart


def test_terms_are_drawn_apart_as_scipy_draws_several_samples():
    first, second = np.random.default_rng(3).normal(size=(30, 1)), np.random.default_rng(4).normal(3, 2, (50, 1))
    found = interval(sums(np.concatenate([first, second]), np.repeat([0, 1], [30, 50])))
    expected = stats.bootstrap(
        (first[:, 0], second[:, 0]), lambda a, b, axis: (a.mean(axis) + b.mean(axis)) / 2, vectorized=True,
        n_resamples=RESAMPLES, method="percentile", rng=5,
    )  # fmt: skip
    assert found.value == pytest.approx((first.mean() + second.mean()) / 2)
    limits = np.array([found.low, found.high]) - np.array(expected.confidence_interval)
    assert np.abs(limits).max() < APART * expected.standard_error


def test_where_nothing_can_be_told_there_is_no_interval():
    assert interval(sums(np.array([[0.5, 0.7]])))[1:] == (None, None)
    assert interval(sums(np.array([[1.0], [2.0], [3.0]]), np.array([0, 0, 1])))[1:] == (None, None)
    empty = Sums(np.zeros((2, 2)), np.array([[1.0, 0.0], [1.0, 0.0]]), np.ones(2), np.zeros(2, int))
    assert np.isnan(estimate(empty))
    assert interval(empty)[1:] == (None, None)
    assert np.isnan(p_value(empty))
    assert interval(sums(np.full((5, 2), 0.25))) == (0.25, 0.25, 0.25)


def test_equal_scores_have_equal_intervals():
    values = np.random.default_rng(0).random((40, 2))
    assert interval(sums(values)) == interval(sums(values.copy()))


# ---- p-values


@pytest.mark.parametrize("seed", range(4))
def test_of_few_prompts_p_is_scipy_s_exact_one(seed: int):
    differences = np.random.default_rng(seed).normal(0.4, 1, 8)
    expected = stats.permutation_test(
        (differences,), lambda x, axis: x.mean(axis), vectorized=True, permutation_type="samples", n_resamples=np.inf
    )
    assert p_value(sums(differences[:, None])) == pytest.approx(expected.pvalue)


def test_prompts_that_do_not_differ_do_not_count():
    differences = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    assert p_value(sums(differences[:, None])) == 2 / 2**3
    assert p_value(sums(np.zeros((5, 2)))) == 1.0
    assert p_value(sums(np.array([[0.1 + 0.2 - 0.3]] * 3 + [[1.0]]))) == 1.0  # rounding is no difference


def test_signs_are_of_prompts_and_terms_are_weighed():
    """Every pattern by hand: a prompt's images change sign together, whichever terms they stand in."""
    rng = np.random.default_rng(7)
    values, counts = rng.normal(0.5, 1, (6, 2)), rng.integers(1, 4, (6, 2)).astype(float)
    of = Sums(values, counts, np.array([0.7, 0.3]), np.zeros(6, int))

    def difference(signs: tuple[int, ...]) -> float:
        total = [
            sum(sign * row[t] for sign, row in zip(signs, values, strict=True)) / counts[:, t].sum() for t in (0, 1)
        ]
        return 0.7 * total[0] + 0.3 * total[1]

    patterns = list(itertools.product((1, -1), repeat=6))
    larger = [abs(difference(each)) >= abs(difference((1,) * 6)) - 1e-12 for each in patterns]
    assert p_value(of) == pytest.approx(sum(larger) / len(patterns))


def test_of_many_prompts_random_signs_stand_for_all():
    differences = np.random.default_rng(0).normal(0.3, 1, EXACT + 4)
    patterns = np.array(list(itertools.product((1.0, -1.0), repeat=len(differences))))
    exact = (np.abs(patterns @ differences) >= abs(differences.sum()) - 1e-12).mean()
    found = p_value(sums(differences[:, None]))
    assert abs(found - exact) < 4 * np.sqrt(exact * (1 - exact) / RESAMPLES)
    assert p_value(sums(np.full((100, 1), 2.0))) == 1 / (1 + RESAMPLES)  # never 0


# ---- many at once


def plain_holm(p: list[float]) -> list[float]:
    """Step down by the definition: the k-th smallest of m is accepted at level α if all before it are ≤ α / (m - j)."""
    ordered = sorted(p)
    return [max(min(1.0, (len(p) - j) * ordered[j]) for j in range(ordered.index(each) + 1)) for each in p]


def test_holm_by_hand_and_by_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.4, 0.9]) == [0.8, 0.9]
    for seed in range(20):
        p = list(np.random.default_rng(seed).random(7) ** 3)
        assert holm(p) == pytest.approx(plain_holm(p))


# ---- what they promise


def simulate(rng: np.random.Generator, prompts: int, samples: int, skill: float) -> np.ndarray:
    """Images right or wrong `[prompts, samples]`; prompts are of different difficulty, by a beta distribution."""
    chances = rng.beta(2 * skill, 2 * (1 - skill), (prompts, 1))
    return (rng.random((prompts, samples)) < chances).astype(float)


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "skill"), [(40, 0.6), (80, 0.9), (200, 0.7)])
def test_intervals_cover_the_truth_as_often_as_they_say(prompts: int, skill: float):
    """95% within what 2,000 repetitions and some dozen prompts allow: 93% to 96.5%; tags are drawn apart."""
    rng, tags, covered, repetitions = np.random.default_rng(0), np.arange(prompts) % 2, 0, 2000
    for _ in range(repetitions):
        _, low, high = interval(sums(simulate(rng, prompts, 4, skill), tags))
        assert low is not None
        assert high is not None
        covered += low <= skill <= high
    assert 0.93 <= covered / repetitions <= 0.965


@pytest.mark.slow
@pytest.mark.parametrize("counted", [False, True])
def test_models_that_do_not_differ_are_told_apart_no_more_often_than_promised(counted: bool):
    """5% within four deviations of 2,000 repetitions. Counts of right images tie, which can only make it rarer."""
    rng, below, repetitions = np.random.default_rng(1), 0, 2000
    for _ in range(repetitions):
        chances = rng.beta(1, 1, (50, 1))
        drawn = rng.random((2, 50, 4))
        one, other = (drawn < chances[None]).astype(float) if counted else drawn + chances[None]
        below += p_value(sums(one - other)) <= 0.05
    assert below / repetitions <= 0.07
    assert counted or below / repetitions >= 0.03
