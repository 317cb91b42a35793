"""Advantages against plain loops over samples and groups, with failures, lonely samples and equal values in between."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from fopd_jax.rewards.combine import combine, group_keys, merge_equal_prompts, weighted_sum
from fopd_jax.rewards.reward import Scores, collect

NAN = float("nan")


def scores(*values: float) -> Scores:
    array = np.array(values, float)
    failed = np.isnan(array)
    return Scores(array, failed, tuple({"error": "x"} if bad else {} for bad in failed))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(mean([(value - centre) ** 2 for value in values]))


def by_loops(found: dict[str, Scores], weights: dict[str, Any], groups: np.ndarray, normalise: str, clip: float) -> Any:
    """The definition, one sample at a time."""
    count = len(groups)
    weight = {name: [float(w[i]) if np.ndim(w) else float(w) for i in range(count)] for name, w in weights.items()}
    usable = [all(weight[k][i] == 0 or not math.isnan(found[k].values[i]) for k in weights) for i in range(count)]
    members = {g: [i for i in range(count) if groups[i] == g and usable[i]] for g in set(groups.tolist())}
    kept = {g: each for g, each in members.items() if len(each) >= 2}
    valid = [any(i in each for each in kept.values()) for i in range(count)]
    values = [0.0] * count

    def total(i: int) -> float:
        return math.fsum(weight[k][i] * found[k].values[i] for k in weights if weight[k][i] != 0)

    for each in kept.values():
        for i in each:
            if normalise == "each":
                for name in weights:
                    mine = [found[name].values[j] for j in each if weight[name][j] != 0]
                    if weight[name][i] != 0:
                        distance = found[name].values[i] - mean(mine)
                        values[i] += weight[name][i] * distance / (deviation(mine) + 1e-4)
            else:
                mine = [total(j) for j in each]
                values[i] = total(i) - mean(mine)
                if normalise == "group":
                    values[i] /= deviation(mine) + 1e-4
    if normalise == "each" and any(valid):
        batch = [values[i] for i in range(count) if valid[i]]
        values = [value / (deviation(batch) + 1e-4) for value in values]
    if normalise == "global":
        kinds = list(zip(*weight.values(), strict=True))
        batches = {kind: [total(i) for i in range(count) if valid[i] and kinds[i] == kind] for kind in kinds}
        values = [values[i] / (deviation(batches[kinds[i]]) + 1e-4) if valid[i] else 0.0 for i in range(count)]
    values = [min(max(value, -clip), clip) for value in values]
    return values, valid, len(members) - len(kept)


def random_problem(seed: int) -> tuple[dict[str, Scores], dict[str, Any], np.ndarray]:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    groups = rng.integers(0, rng.integers(1, 20), count) * 1_000_003 - 7
    found = {}
    for name in ("a", "b", "c")[: rng.integers(1, 4)]:
        values = (
            rng.normal(3, 10.0 ** rng.integers(-2, 3), count) if rng.random() < 0.6 else rng.integers(0, 2, count) * 1.0
        )
        values[rng.random(count) < rng.choice([0, 0.1, 0.6])] = NAN
        found[name] = scores(*values)
    weights: dict[str, Any] = {name: float(rng.choice([1.0, 0.3, -2.0, 5.0])) for name in found}
    if rng.random() < 0.4:  # a task of each half of the groups, with rewards of its own
        for name in found:
            weights[name] = np.where(groups % 2 == 0, rng.choice([1.0, 0.5]), rng.choice([0.0, 2.0])).astype(float)
    return found, weights, groups


@pytest.mark.parametrize("normalise", ["global", "group", "each"])
def test_advantages_are_those_of_plain_loops(normalise: Any):
    dropped = 0
    for seed in range(150):
        found, weights, groups = random_problem(seed)
        if not any(np.any(weight) for weight in weights.values()):
            continue
        clip = [5.0, 1.0][seed % 2]
        got = combine(found, weights, groups, normalise, clip)
        values, valid, lost = by_loops(found, weights, groups, normalise, clip)
        np.testing.assert_allclose(got.values, values, rtol=1e-9, atol=1e-9, err_msg=f"seed {seed}")
        assert got.valid.tolist() == valid
        assert got.dropped == lost
        assert np.isfinite(got.values).all()
        assert not got.values[~got.valid].any()
        assert not got.values[got.flat].any()
        dropped += lost
    assert dropped > 50


def test_flow_grpos_own_numbers():
    """Mean of the prompt, deviation of the epoch: (1 - 2)/(√5 + 1e-4), …; by the group's own: ±1/(1 + 1e-4)."""
    found, groups = {"r": scores(1, 3, 5, 7)}, np.array([0, 0, 1, 1])
    over_all = combine(found, {"r": 1.0}, groups)
    np.testing.assert_allclose(over_all.values, np.array([-1, 1, -1, 1]) / (math.sqrt(5) + 1e-4), rtol=1e-12)
    own = combine(found, {"r": 1.0}, groups, "group")
    np.testing.assert_allclose(own.values, np.array([-1, 1, -1, 1]) / 1.0001, rtol=1e-12)


def test_gdpo_hears_a_reward_of_small_spread():
    """In a sum, a reward with a thousandth of the other's spread is drowned; compared by itself it counts as much."""
    found = {"large": scores(0, 1000, 0, 1000), "small": scores(0, 0, 1, 1)}
    groups, weights = np.zeros(4, int), {"large": 1.0, "small": 1.0}
    drowned = combine(found, weights, groups, "group").values
    assert abs(drowned[2] - drowned[0]) < 0.01 * abs(drowned[1] - drowned[0])
    heard = combine(found, weights, groups, "each").values
    np.testing.assert_allclose(heard, np.array([-1, 0, 0, 1]) * math.sqrt(2), atol=1e-3)


# ---- several tasks in one batch

TASK = np.repeat([0, 1], 8)
GROUPS = np.repeat(np.arange(4), 4)  # two of each task


def mixed_batch(scale: float) -> dict[str, Scores]:
    """Task 0 is scored by `small` in [0, 1], task 1 by `large`, which is `scale` times that and far from 0."""
    rng = np.random.default_rng(3)
    small, large = rng.random(16), scale * (20 + rng.random(16))
    return {"small": scores(*np.where(TASK == 0, small, NAN)), "large": scores(*np.where(TASK == 1, large, NAN))}


WEIGHTS = {"small": np.where(TASK == 0, 1.0, 0.0), "large": np.where(TASK == 1, 1.0, 0.0)}


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("normalise", ["global", "group", "each"])
def test_a_task_of_a_large_scale_drowns_no_other(normalise: Any, scale: float):
    """Each task's advantages are those that it has alone, but for GDPO's deviation over the batch, a common factor."""
    found = mixed_batch(scale)
    whole = combine(found, WEIGHTS, GROUPS, normalise)
    assert whole.valid.all()
    ratios = []
    for task, name in enumerate(("small", "large")):
        mine = task == TASK
        alone = combine({name: scores(*found[name].values[mine])}, {name: 1.0}, GROUPS[mine], normalise)
        ratios.append(whole.values[mine] / alone.values)
        assert 0.5 < np.abs(whole.values[mine]).mean() < 1.5
    np.testing.assert_allclose(ratios, 1.0, rtol=0.03 if normalise == "each" else 1e-12)


def test_one_deviation_over_tasks_of_different_rewards_would_silence_them():
    """What is avoided: the spread of all totals is the distance between the tasks' levels, here 20 to within 0.3."""
    found = mixed_batch(1.0)
    totals = np.where(TASK == 0, found["small"].values, found["large"].values)
    distance = totals - totals.reshape(4, 4).mean(1).repeat(4)
    assert np.abs(distance / totals.std()).mean() < 0.05 < 0.5 < np.abs(combine(found, WEIGHTS, GROUPS).values).mean()


def test_tasks_that_share_their_rewards_share_the_deviation():
    """Flow-GRPO's own numbers, whatever the tasks: the batch's deviation, not each task's."""
    values = np.concatenate([np.arange(8) / 8, 10 * np.arange(8) / 8])
    found = combine({"r": scores(*values)}, {"r": np.ones(16)}, GROUPS).values
    centred = values - values.reshape(4, 4).mean(1).repeat(4)
    np.testing.assert_allclose(found, centred / (values.std() + 1e-4))


@pytest.mark.parametrize("normalise", ["global", "each"])
def test_a_shared_and_an_own_reward_by_hand(normalise: Any):
    """GRPO-Mix of two tasks with one reward in common, half a weight, and one failure of each kind."""
    rng = np.random.default_rng(5)
    own, common = rng.random((2, 16)), 5 + 3 * rng.random(16)
    found = {
        "a": scores(*np.where((TASK == 0) & (np.arange(16) != 2), own[0], NAN)),
        "b": scores(*np.where(TASK == 1, own[1], NAN)),
        "quality": scores(*np.where(np.arange(16) != 13, common, NAN)),
    }
    weights = {"a": 1.0 * (TASK == 0), "b": 1.0 * (TASK == 1), "quality": np.full(16, 0.5)}
    result = combine(found, weights, GROUPS, normalise)
    assert np.flatnonzero(~result.valid).tolist() == [2, 13]
    mine = np.where(TASK == 0, own[0], own[1])
    expected, sums = np.zeros(16), mine + 0.5 * common
    for group in range(4):
        rows = [i for i in range(16) if GROUPS[i] == group and i not in (2, 13)]
        if normalise == "each":
            for values, weight in ((mine, 1.0), (common, 0.5)):
                centred = values[rows] - values[rows].mean()
                expected[rows] += weight * centred / (values[rows].std() + 1e-4)
        else:
            expected[rows] = sums[rows] - sums[rows].mean()
    if normalise == "each":
        expected /= expected[result.valid].std() + 1e-4
    else:
        for task in (0, 1):
            expected[task == TASK] /= sums[result.valid & (task == TASK)].std() + 1e-4
    np.testing.assert_allclose(result.values, expected, rtol=1e-12, atol=1e-12)


def test_a_failure_is_no_low_score():
    """The same batch without the samples that failed gives the others the same advantages."""
    values, groups = [1.0, NAN, 4.0, 2.0, NAN, 9.0, 3.0], np.array([0, 0, 0, 1, 1, 1, 1])
    for normalise in ("global", "group", "each"):
        there = combine({"r": scores(*values)}, {"r": 1.0}, groups, normalise)
        kept = ~np.isnan(values)
        without = combine({"r": scores(*np.array(values)[kept])}, {"r": 1.0}, groups[kept], normalise)
        np.testing.assert_array_equal(there.values[kept], without.values)
        assert there.valid.tolist() == kept.tolist()


def test_a_group_with_one_valid_sample_is_dropped_and_moves_nobody():
    alone = combine({"r": scores(1, 3, 100, NAN)}, {"r": 1.0}, np.array([0, 0, 1, 1]))
    assert alone.valid.tolist() == [True, True, False, False]
    assert alone.dropped == 1
    np.testing.assert_array_equal(alone.values[:2], combine({"r": scores(1, 3)}, {"r": 1.0}, np.zeros(2, int)).values)


def test_a_reward_that_a_sample_does_not_need_may_fail():
    found = {"a": scores(1, 2, NAN, NAN), "b": scores(NAN, NAN, 3, 5)}
    weights = {"a": np.array([1.0, 1, 0, 0]), "b": np.array([0.0, 0, 1, 1])}
    assert combine(found, weights, np.array([0, 0, 1, 1])).valid.all()
    assert not combine(found, {"a": 1.0, "b": 1.0}, np.array([0, 0, 1, 1])).valid.any()
    assert combine(found, {"a": weights["a"], "b": 0.0}, np.array([0, 0, 1, 1])).valid.all()


@pytest.mark.parametrize("normalise", ["global", "group", "each"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9, -7.7e-12])
def test_groups_of_equal_values_are_marked_and_exactly_zero(normalise: Any, value: float):
    """Rounding of the mean must not become an advantage: 0.1 summed nine times over 9 is not 0.1."""
    found = {"r": scores(*[value] * 9, 1.0, 2.0), "s": scores(*[3 * value] * 9, 0.5, 0.5)}
    got = combine(found, {"r": 0.7, "s": 0.1}, np.array([4] * 9 + [2] * 2), normalise)
    assert got.flat.tolist() == [True] * 9 + [False] * 2
    assert not got.values[:9].any()
    assert got.values[9:].all()
    assert got.valid.all()
    assert got.flat_share == 0.5


def test_nothing_valid_is_nothing_at_all():
    got = combine({"r": scores(NAN, NAN, 1)}, {"r": 1.0}, np.array([0, 0, 1]))
    assert (got.dropped, got.flat_share) == (2, 0.0)
    assert not any(each.any() for each in (got.valid, got.values, got.flat))
    empty = combine({"r": scores()}, {"r": 1.0}, np.zeros(0, int))
    assert (len(empty.values), empty.dropped, empty.flat_share) == (0, 0, 0.0)


def test_the_order_of_samples_does_not_matter():
    found, weights, groups = random_problem(3)
    order = np.random.default_rng(0).permutation(len(groups))
    shuffled = {name: scores(*each.values[order]) for name, each in found.items()}
    mixed = {name: weight[order] if np.ndim(weight) else weight for name, weight in weights.items()}
    there, here = combine(found, weights, groups), combine(shuffled, mixed, groups[order])
    np.testing.assert_allclose(here.values, there.values[order], rtol=1e-9, atol=1e-12)
    assert here.valid.tolist() == there.valid[order].tolist()


def test_groups_are_those_of_prompt_and_slot_whatever_the_texts():
    ids, slots = np.array([7, 7, 7, 3, 3, 7]), np.array([0, 0, 1, 0, 0, 1])
    keys = group_keys(ids, slots)
    pairs = list(zip(ids.tolist(), slots.tolist(), strict=True))
    for i, j in itertools.combinations(range(6), 2):
        assert (keys[i] == keys[j]) == (pairs[i] == pairs[j])
    assert sorted(set(keys.tolist())) == [0, 1, 2]


def test_equal_prompts_can_be_merged_as_flow_grpo_does():
    """Two draws of one prompt, two samples each: apart two groups, merged one group of four."""
    ids, prompts = np.array([1, 1, 2, 2]), ["a cat"] * 4
    found = {"r": scores(0, 1, 10, 11)}
    apart = combine(found, {"r": 1.0}, group_keys(ids)).values
    assert np.sign(apart).tolist() == [-1, 1, -1, 1]
    merged = combine(found, {"r": 1.0}, merge_equal_prompts(prompts)).values
    assert np.sign(merged).tolist() == [-1, -1, 1, 1]
    assert merge_equal_prompts(["b", "a", "b", "a "]).tolist() == [2, 0, 2, 1]  # by the letter


@pytest.mark.parametrize(
    ("found", "weights", "problem"),
    [
        ({"a": scores(1, 2)}, {"b": 1.0}, "weights: found the reward 'b', expected some of a"),
        ({"a": scores(1)}, {"a": 1.0}, "rewards.a: found 1 scores of 2 samples"),
        ({"a": scores(1, 2)}, {"a": NAN}, "weights.a: found nan, expected finite numbers"),
        ({"a": scores(1, 2)}, {"a": 0.0}, "weights: found none but 0"),
        ({"a": scores(1, 2)}, {}, "weights: found none but 0"),
    ],
)
def test_what_does_not_fit_is_refused(found: dict[str, Scores], weights: dict[str, float], problem: str):
    with pytest.raises(ValueError, match=problem):
        combine(found, weights, np.zeros(2, int))


def test_a_weighted_sum_says_which_of_its_rewards_failed():
    results: list[Any] = [(2.0, {}), (3.0, {}), OSError("z")]
    found = {"a": collect([(1.0, {}), ValueError("x"), ValueError("y")]), "b": collect(results)}
    total = weighted_sum(found, {"a": 0.5, "b": 2.0})
    np.testing.assert_array_equal(total.values, [4.5, np.nan, np.nan])
    assert total.details == ({}, {"error": "a: ValueError: x"}, {"error": "a: ValueError: y"})
    assert weighted_sum(found, {"b": 1.0}).details[2] == {"error": "b: OSError: z"}
