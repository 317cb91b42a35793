"""Noise levels of the sampler: the shifted rectified-flow schedule of Stable Diffusion 3.

`sigma` is the time of the flow, `x_sigma = (1 - sigma)·x0 + sigma·noise`: 1 is noise, 0 is data.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

TRAINING_TIMESTEPS = 1000


@struct.dataclass
class Level:
    """Where a sampler step goes from and to, 0-d each; of a schedule's steps stacked `[T]`, as a scan takes them.

    `noisy`: whether the step draws noise; None where every step draws what its transition has. `between [m - 1]`:
    levels within the step, where somebody goes down it by m steps.
    """

    sigma: Any  # float arrays; Any because tree operations put anything into a leaf
    sigma_next: Any
    noisy: Any = None
    between: Any = None


def make_levels(
    sigmas: Float[Array | np.ndarray, "t_plus_1"],
    noisy: Bool[Array | np.ndarray, "t"] | None = None,
    steps: tuple[int, int] | None = None,
    between: Float[Array | np.ndarray, "t m_minus_1"] | None = None,
) -> Level:
    """The steps `start <= t < stop` of a schedule (all by default), stacked.

    `noisy` limits the noise to some steps of the schedule (see `flow.rollout.noise_window`), the others being ODE
    steps; `between`: see `sublevels`. Raises ValueError where one of them has not one entry a step.
    """
    count = sigmas.shape[0] - 1
    for name, each in (("noisy", noisy), ("between", between)):
        if each is not None and each.shape[0] != count:
            raise ValueError(f"{name}: found {each.shape[0]} steps, expected {count}, one fewer than sigmas")
    start, stop = steps or (0, count)
    limited, finer = (None if each is None else jnp.asarray(each[start:stop]) for each in (noisy, between))
    return Level(jnp.asarray(sigmas[start:stop]), jnp.asarray(sigmas[start + 1 : stop + 1]), limited, finer)


def flow_match_sigmas(num_steps: int, shift: float = 3.0) -> Float[np.ndarray, "steps_plus_1"]:
    """Noise levels visited by a sampler of `num_steps` steps: from 1 down to 0, float32, `[num_steps + 1]`.

    Equal to diffusers' `FlowMatchEulerDiscreteScheduler(shift=shift)` after `set_timesteps(num_steps)`. That scheduler
    shifts twice: the levels are evenly spaced between 1 and the *shifted* 1/1000, then shifted themselves, so the last
    level before 0 lies far closer to 0 than the textbook formula puts it (.0089, not .25, for 10 steps and shift 3).

    Raises ValueError where `num_steps < 1` or `shift` is not a positive finite number.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: found {num_steps}, expected an integer >= 1")
    if not (shift > 0 and np.isfinite(shift)):
        raise ValueError(f"shift: found {shift}, expected a finite number > 0")
    lowest = _shifted(np.float64(1 / TRAINING_TIMESTEPS), shift)
    levels = _shifted(np.linspace(1.0, lowest, num_steps, dtype=np.float64), shift)
    return np.append(levels, 0.0).astype(np.float32)


def sublevels(
    sigmas: Float[np.ndarray, "t_plus_1"], count: int, shift: float = 3.0
) -> Float[np.ndarray, "t m_minus_1"]:
    """Levels that part each step of a schedule into `count` steps, evenly in the time before the shift, float32.

    Those of `flow_match_sigmas(n, shift)` are, but for the last step, the levels of that schedule of count·(n - 1) + 1
    steps: who goes down them samples as with so many.
    """
    times = _shifted(sigmas.astype(np.float64), 1 / shift)  # the shift's inverse
    within = times[:-1, None] + np.diff(times)[:, None] * (np.arange(1, count) / count)[None]
    return _shifted(within, shift).astype(np.float32)


def _shifted(sigma, shift: float):
    """`shift·sigma / (1 + (shift - 1)·sigma)`: pushes levels towards noise for shift > 1, keeps 0 and 1 in place."""
    return shift * sigma / (1 + (shift - 1) * sigma)
