"""Samplers of a higher order than the transitions' single steps: the second-order multistep solver of the flow's ODE.

DPM-Solver++(2M) (Lu et al. 2022, 2211.01095) predicts x0 = x - sigma·v and extrapolates it in
λ = log((1 - sigma)/sigma). For a rectified flow its first-order step is Euler's, so that it is Euler's step and a
correction,

    x' = x + v·dt + ½·(1 - sigma'/sigma)·(h/h_before)·(x0 - x0_before),    h = λ' - λ,

which is left out in the first step, that has none before it, and in the one to sigma' = 0, where h is infinite. A step
before that came from sigma = 1 has infinite length itself, and hence a correction of 0. One network evaluation a step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from fopd_jax.flow.rollout import PolicyVelocity, Step, draw, sample_final, scan_steps
from fopd_jax.flow.schedule import Level
from fopd_jax.flow.transition import Transition, at_least_float32, make_transition


@struct.dataclass
class DPM2:
    """DPM-Solver++(2M)."""


Solver = Transition | DPM2


def make_solver(name: str, noise_level: float = 0.7) -> Solver:
    """'dpm2', or the transition of that name.

    Raises:
      ValueError: as `make_transition`.
    """
    return DPM2() if name == "dpm2" else make_transition(name, noise_level)


def solve(
    solver: Solver, policy_velocity: PolicyVelocity, schedule: Level, noise: Float[Array, "b *shape"], keys: Array
) -> Float[Array, "b *shape"]:
    """The final state of a sampler, from `noise` at the schedule's first level; `keys [T, B]` are the transitions'.

    Raises:
      ValueError: as `sample_final`.
    """
    if not isinstance(solver, DPM2):
        return sample_final(policy_velocity, solver, schedule, noise, keys)
    return _multistep(policy_velocity, schedule, noise, lambda x, v: None)[0]


def trace(
    solver: Solver, policy_velocity: PolicyVelocity, schedule: Level, noise: Float[Array, "b *shape"], keys: Array
) -> tuple[Float[Array, "b *shape"], tuple[Float[Array, "t b *shape"], Float[Array, "t b *shape"]]]:
    """The same with what was met on the way: the state at each of the schedule's levels, and the velocity there."""
    if isinstance(solver, DPM2):
        return _multistep(policy_velocity, schedule, noise, lambda x, v: (x, v))

    def visit(x: Array, step: Step) -> tuple[Array, tuple[Array, Array]]:
        v = policy_velocity(x, step.level.sigma).astype(x.dtype)
        x_next, _ = draw(solver, step.level, x, v, step.keys)
        return x_next, (x, v)

    return scan_steps(visit, at_least_float32(noise), schedule, keys)


def _multistep(
    policy_velocity: PolicyVelocity,
    schedule: Level,
    noise: Float[Array, "b *shape"],
    keep: Callable[[Array, Array], Any],
) -> tuple[Float[Array, "b *shape"], Any]:
    def visit(carry: tuple[Array, Array, Array], step: Step) -> tuple[tuple[Array, Array, Array], Any]:
        (x, before, sigma_before), level = carry, step.level
        v = policy_velocity(x, level.sigma).astype(x.dtype)
        clean = x - level.sigma * v
        weight = _correction(sigma_before, level.sigma, level.sigma_next)
        x_next = x + v * (level.sigma_next - level.sigma) + weight * (clean - before)
        return (jax.lax.stop_gradient(x_next), clean, level.sigma), keep(x, v)

    start = at_least_float32(noise)
    first = schedule.sigma[0]
    (x, _, _), kept = scan_steps(visit, (start, jnp.zeros_like(start), first), schedule)
    return x, kept


def _correction(before: Float[Array, ""], sigma: Float[Array, ""], after: Float[Array, ""]) -> Float[Array, ""]:
    """What the difference of two predictions counts in the step from `sigma` to `after`."""
    corrected = (before > sigma) & (before < 1) & (after > 0)
    safe = [jnp.where(corrected, each, fill) for each, fill in ((before, 0.75), (sigma, 0.5), (after, 0.25))]
    earlier, here, later = (jnp.log1p(-each) - jnp.log(each) for each in safe)
    ratio = (later - here) / (here - earlier)
    return jnp.where(corrected, 0.5 * (1 - safe[2] / safe[1]) * ratio, 0.0)
