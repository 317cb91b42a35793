"""Where prompts stand among skills: a function of seed, step and place, with the shares and targets that are said."""

import dataclasses

import numpy as np
import pytest

from fopd_jax.config.teaching import Coordinates
from fopd_jax.policy.coordinates import DrawnCoordinates

SKILLS = ("counting", "ocr", "taste")
SETTINGS = Coordinates(rank=8, alone=0.4, joint=0.3, base=0.1, joint_target="sum", high=1.25)
COUNT = 20_000
TASKS = [SKILLS[k % 3] for k in range(COUNT)]


def draws(**changes: object) -> DrawnCoordinates:
    return DrawnCoordinates(SKILLS, dataclasses.replace(SETTINGS, **changes), 7, 4)


def drawn(count: int = COUNT, step: int = 3, **changes: object) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates, and weights of the teachers and of the base."""
    coordinates, mix = draws(**changes)(step, np.arange(count), TASKS[:count])
    np.testing.assert_array_equal(mix.weights[:, 0], mix.weights[:, 1])
    np.testing.assert_array_equal(mix.bank, np.broadcast_to([0, 1, 2, 4], (count, 4)))
    return coordinates, mix.weights[:, 0]


def test_a_draw_depends_on_seed_step_and_number_alone():
    whole, weights = drawn(64)
    numbers = np.asarray([5, 17, 40])
    some, mix = draws()(3, numbers, [TASKS[k] for k in numbers])
    np.testing.assert_array_equal(some, whole[numbers])
    np.testing.assert_array_equal(mix.weights[:, 1], weights[numbers])
    assert not np.array_equal(whole, drawn(64, step=4)[0])
    other = dataclasses.replace(draws(), seed=8)
    assert not np.array_equal(whole, other(3, np.arange(64), TASKS[:64])[0])


def test_the_target_is_the_base_and_what_teachers_gain_over_it():
    coordinates, weights = drawn()
    np.testing.assert_array_equal(weights[:, :3], coordinates)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert coordinates.min() >= 0
    assert 1.2 < coordinates.max() <= 1.25
    assert weights[:, 3].min() < -1  # several skills together ask for less than no base


def test_shares_are_those_of_the_settings():
    """Within four standard errors; a number between 0.75 and 1.25 multiplies whatever is drawn."""
    coordinates, _ = drawn()
    own = np.asarray([SKILLS.index(task) for task in TASKS])
    turned = (coordinates > 0).sum(1)
    alone = turned == 1
    largest = coordinates.max(1, keepdims=True)
    joint = (turned > 1) & ((coordinates == 0) | (coordinates == largest)).all(1)
    error = 4 * 0.5 / COUNT**0.5
    assert alone.mean() == pytest.approx(0.4, abs=error)
    assert joint.mean() == pytest.approx(0.3, abs=error)
    assert (turned == 0).mean() == pytest.approx(0.1, abs=error)
    assert (coordinates[alone | joint, own[alone | joint]] > 0).all()  # one's own is always among them
    assert (turned[joint] == 2).mean() == pytest.approx(0.5, abs=2 * error)
    assert largest[alone | joint].mean() == pytest.approx(1, abs=0.01)
    between = coordinates[~(alone | joint | (turned == 0))]
    np.testing.assert_allclose(between.mean(0), 0.25, atol=0.02)  # uniform on the simplex of three skills and base


def test_at_the_joint_anchor_a_prompt_may_have_its_own_teacher():
    coordinates, weights = drawn(joint_target="routed", alone=0.0, joint=1.0)
    own = np.eye(3)[[SKILLS.index(task) for task in TASKS]]
    np.testing.assert_allclose(weights[:, :3], own * coordinates.max(1, keepdims=True), atol=1e-6)
    assert ((coordinates > 0).sum(1) >= 2).all()


def test_a_single_skill_has_nothing_beside_it():
    one = DrawnCoordinates(("ocr",), dataclasses.replace(SETTINGS, alone=0.0, joint=1.0, high=1.0), 7, 2)
    coordinates, mix = one(0, np.arange(8), ["ocr"] * 8)
    np.testing.assert_array_equal(coordinates, np.ones((8, 1)))
    np.testing.assert_array_equal(mix.weights[:, 0], np.broadcast_to([1, 0], (8, 2)))
