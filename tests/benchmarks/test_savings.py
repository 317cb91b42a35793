"""The cheaper updates that `benchmarks/savings.py` runs: the miniature can be set to each, and each costs less."""

from collections.abc import Callable
from types import ModuleType

import pytest

# Forward-equivalents a sample: T = 6 has five trained steps, each a student's forward, a teacher's and an anchor's, and
# a backward; the backward of a network whose base is frozen costs a little more than a forward. The last step, from
# the smallest sigma, needs no forward at all.
EXPECTED = {
    "plain": (1.0, 0.0),
    "anchor asked of one sample in three": (1 - 5 * (2 / 3) / 20, 0.03),
    "last three of five timesteps": (14 / 20, 0.03),
    "one timestep a rollout": (8 / 20, 0.06),
    "guided": (2.0, 0.01),
    "sixteen images a prompt": (1.0, 0.0),
}


@pytest.fixture(scope="module")
def savings(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/savings.py")


@pytest.mark.parametrize("name", list(EXPECTED))
def test_arithmetic_of_each_form(name: str, savings: ModuleType) -> None:
    expected, tolerance = EXPECTED[name]
    assert savings.flops_a_sample(name) / savings.flops_a_sample("plain") == pytest.approx(expected, abs=tolerance)


def test_a_student_without_guidance_is_cheaper_than_one_with_it(savings: ModuleType) -> None:
    assert savings.flops_a_sample("guided teachers, student without guidance") < savings.flops_a_sample("guided")
