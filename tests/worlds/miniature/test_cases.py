"""The miniature's rewards order its cases."""

import numpy as np
import pytest

from fopd_jax.rewards.check import prove, verdict
from fopd_jax.worlds.miniature.cases import cases_of, pictures_of
from fopd_jax.worlds.miniature.rewards import make_rewards

REWARDS = make_rewards()


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_of_the_world_proves_itself(name: str):
    proof = prove(REWARDS[name], cases_of(name))
    assert verdict([proof]) == ""
    assert proof.findings[0].better == 1.0


def test_pictures_of_prompts_are_those_of_the_prompts():
    prompts = ['sign "K7B"', "three blue circles"]
    first, second = pictures_of(prompts)
    assert (first.prompt, second.prompt) == tuple(prompts)
    np.testing.assert_array_equal(first.better, second.worse)
    np.testing.assert_array_equal(first.worse, second.better)
    for name, case in (("text", first), ("composition_strict", second)):
        assert REWARDS[name].score(case.better[None], [case.prompt], [{}]).values[0] == 1
