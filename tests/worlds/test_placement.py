"""No device and part is ever dealt more of a network's samples than there are slots: counted, over random settings."""

import numpy as np
import pytest

from fopd_jax.config.schema import RoutedTask
from fopd_jax.tasks.sampling import Curriculum, Shares
from fopd_jax.worlds.placement import Split, most_a_block, placement_of

SPLITS = [  # batch, rows a draw, devices, parts
    (64, 1, 4, 1), (64, 1, 8, 2), (60, 1, 4, 3), (64, 4, 4, 1), (64, 4, 4, 2), (64, 4, 4, 4), (64, 16, 8, 1),
    (24, 3, 2, 2), (24, 6, 4, 1), (48, 2, 3, 4), (7, 1, 1, 1),
]  # fmt: skip


def counts_of(split: Split, tasks: np.ndarray, asks: np.ndarray) -> np.ndarray:
    """`[blocks, groups]`: questions about the samples of each device and part."""
    found = np.zeros((split.ways * split.parts, asks.shape[1]), np.int64)
    for task, blocks in zip(tasks, split.blocks(), strict=True):
        for block in blocks:
            found[block] += asks[task]
    return found


@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_slots_suffice_at_every_step(case: tuple[int, int, int, int]) -> None:
    split, rng = Split(*case), np.random.default_rng(case)
    draws = split.batch_size // split.repeats
    for _ in range(12):
        count, groups = rng.integers(1, 6), rng.integers(1, 4)
        asks = rng.integers(0, 3, (count, groups))
        weights = rng.choice([0.0, 0.5, 1.0, 3.0, rng.random()], count) + 1e-3
        tasks_of = [RoutedTask(weight=float(weight)) for weight in weights]
        curriculum = Curriculum.of(tasks_of, int(rng.choice([0, 0, 1, 2])))
        most = most_a_block(split, asks, curriculum.most(draws).tolist())
        place = placement_of(split, asks)
        for step in range(8):
            drawn = curriculum.counts(step + 1, draws) - curriculum.counts(step, draws)
            tasks = rng.permutation(np.repeat(np.arange(count), drawn))
            order = place(tasks, np.random.default_rng(step))
            np.testing.assert_array_equal(np.sort(order), np.arange(draws))
            found = counts_of(split, tasks[order], asks)
            assert (found <= most).all(), (asks, found, most)


def test_slots_are_a_devices_share_and_no_more() -> None:
    """Of 64 samples of 3 : 1 on 4 devices 12 and 4 a device, exactly."""
    asks = np.array([[1, 0], [0, 1]])
    most = Shares((3.0, 1.0)).most(64).tolist()
    assert most == [48, 16]
    assert most_a_block(Split(64, 1, 4, 1), asks, most) == (12, 4)
    assert most_a_block(Split(64, 1, 4, 2), asks, most) == (6, 2)
    assert most_a_block(Split(64, 16, 8, 1), asks, most) == (8, 8)  # a device holds half of one draw's rows
    assert most_a_block(Split(64, 1, 4, 1), np.array([[2, 1], [0, 1]]), most) == (24, 16)


def test_slots_of_turns_hold_a_whole_batch_of_any_task() -> None:
    asks, turns = np.array([[1, 0], [0, 1]]), Curriculum.of([RoutedTask(weight=3.0), RoutedTask()], 1)
    assert turns.most(64).tolist() == [64, 64]
    assert most_a_block(Split(64, 1, 4, 1), asks, [64, 64]) == (16, 16)
    assert most_a_block(Split(64, 1, 4, 1), np.array([[2, 1], [0, 1]]), [64, 64]) == (32, 16)


def test_the_most_of_a_task_in_a_step_is_never_passed() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        shares = Shares(
            tuple(float(each) for each in rng.choice([1.0, 2.0, 3.0, 0.3, rng.random()], rng.integers(1, 6)))
        )
        draws = int(rng.integers(1, 40))
        steps = np.stack([shares.counts(draws * (k + 1)) - shares.counts(draws * k) for k in range(60)])
        most = shares.most(draws)
        assert (steps.max(0) <= most).all()
        assert most.sum() <= draws + 2 * len(most)


def test_draws_are_dealt_by_the_step_alone_and_not_always_to_the_same_devices() -> None:
    split, asks = Split(12, 1, 3, 1), np.array([[1, 0], [0, 1]])
    place, tasks = placement_of(split, asks), np.array([0] * 10 + [1] * 2)
    orders = [place(tasks, np.random.default_rng((5, step))) for step in range(20)]
    np.testing.assert_array_equal(orders[3], place(tasks, np.random.default_rng((5, 3))))
    owners = {int(place) // 4 for order in orders for place in np.flatnonzero(tasks[order] == 1)}
    assert owners == {0, 1, 2}


def test_a_batch_that_is_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch_size: found 10, expected a multiple of its parts$"):
        Split(10, 1, 4, 1)
