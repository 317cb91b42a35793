"""What an OPD update refuses to be made of."""

import dataclasses
import re
from typing import Any

import pytest

from fopd_jax.flow.rollout import noise_window
from fopd_jax.flow.transition import ODE
from tests.steps.opd.network import CLIPPED, DIRECT, GUIDED, PLAIN, SIGMAS, STEPS, make_spec

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "num_steps": ({"sigmas": SIGMAS[-2:]}, "sampler.num_steps: found 1, expected at least 2: the last is not trained"),
    "updates_per_rollout": ({"updates_per_rollout": 0}, "updates_per_rollout: found 0, expected at least 1"),
    "minibatches": ({"minibatches": 4}, "minibatches: found 4, expected a divisor of batch_size 6"),
    "no minibatch": ({"minibatches": 0}, "minibatches: found 0, expected a divisor of batch_size 6"),
    "untrained minibatches": ({"minibatches": 2}, "minibatches: found 2, expected at most updates_per_rollout (1)"),
    "guidance": ({"teacher_guidance": (4.5, 1.0)}, "teacher_guidance: found 2 scales, expected 3"),
    "window": ({"noisy": noise_window(STEPS, 4, 5)}, "sampler.window: holds no trained step"),
    "direct in the window": (
        {"noisy": noise_window(STEPS, 4, 5), "objective": dataclasses.replace(DIRECT, window_only=True)},
        "sampler.window: holds no trained step",
    ),
    "timesteps": (
        {"trained": (2, 5)},
        "sampler.trained: found (2, 5), expected (start, stop) with 0 <=",
    ),
    "no timestep": ({"trained": (2, 2)}, "sampler.trained: found (2, 2)"),
    "anchor": ({"anchor_every": 0}, "anchor.every: found 0, expected at least 1"),
    "one timestep": (
        {"one_timestep": True},
        "one_timestep: found True, which needs objective.name 'direct'",
    ),
    "one timestep twice": (
        {"one_timestep": True, "objective": DIRECT, "updates_per_rollout": 2},
        "one_timestep: found True, expected False with several updates",
    ),
    "twice guided": (
        {"objective": dataclasses.replace(CLIPPED, match="conditional")},
        "guidance: found 4.5, expected 1, or less than the teachers' 4.5: objective.match 'conditional' folds theirs",
    ),
    "transition": (
        {"transition": ODE()},
        "objective.weighting: found 'kl', expected one of ode, uniform, x0, x_next: the ODE",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dataclasses.replace(make_spec(CLIPPED), **fields).check(6)


def test_accepted() -> None:
    make_spec(CLIPPED, updates_per_rollout=4, minibatches=3).check(6)
    make_spec(DIRECT, noisy=noise_window(STEPS, 4, 5)).check(6)  # trains the noiseless steps too
    folded = dataclasses.replace(CLIPPED, match="conditional")
    for student, teachers in ((1.0, GUIDED[1]), (2.0, GUIDED[1]), PLAIN):
        make_spec(folded, guidance=(student, teachers)).check(6)
