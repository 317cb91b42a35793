"""Sampler steps in one `lax.scan`, with all random keys made up front: rollouts, and whatever else goes along them.

`scan_steps` is the only loop over sampler steps; `sample` is what it does for everyone who samples, `watch` seeing each
step. Gradients are never taken through the loop: who needs one takes it inside, in a `visit` of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Key

from fopd_jax.flow.schedule import Level
from fopd_jax.flow.transition import Transition, at_least_float32, transition_step

PolicyVelocity = Callable[[Array, Array], Array]
"""`(x [B, ...], sigma 0-d) -> v [B, ...]`, guidance included."""


@struct.dataclass
class Trajectory:
    """The states a rollout passed through and what it did there.

    `latents [T+1, B, ...]`: from pure noise to the final state; `log_probs [T, B]`: of the step from `latents[t]` to
    `latents[t+1]`, mean over latent dimensions, 0 for a step without noise.
    """

    latents: Any  # float arrays; Any because tree operations put anything into a leaf
    log_probs: Any


@struct.dataclass
class Step:
    """One turn of the loop: its level, its keys `[B]`, and its part of whatever else was stacked over steps."""

    level: Level
    keys: Any
    inputs: Any


@struct.dataclass
class Seen:
    """A step that was sampled: from `x` to `x_next [B, ...]`, with log-density `log_prob [B]`."""

    level: Level
    x: Any
    x_next: Any
    log_prob: Any
    inputs: Any


Watch = Callable[[Any, Seen], tuple[Any, Any]]
"""`(memory, seen) -> (memory, what is kept of the step)`."""


def scan_steps(
    visit: Callable[[Any, Step], tuple[Any, Any]], carry: Any, levels: Level, keys: Any = None, inputs: Any = None
) -> tuple[Any, Any]:
    """The one loop over sampler steps: `visit(carry, step) -> (carry, kept)`; the last carry, and all kept, stacked.

    `levels`, `keys [T, B]` and `inputs` are stacked over steps.
    """
    return jax.lax.scan(visit, carry, Step(levels, keys, inputs))


def forget(memory: Any, seen: Seen) -> tuple[Any, None]:
    """Watches without keeping anything."""
    return memory, None


def sample(
    policy_velocity: PolicyVelocity,
    transition: Transition,
    levels: Level,
    x: Float[Array, "b *shape"],
    keys: Key[Array, "t b"],
    watch: Watch = forget,
    memory: Any = None,
    inputs: Any = None,
) -> tuple[Float[Array, "b *shape"], Any, Any]:
    """Goes down `levels` from the state x: the last state, the last memory, and what `watch` kept, stacked over steps.

    Raises ValueError where the numbers of steps disagree.
    """
    count = levels.sigma.shape[0]
    if keys.shape[0] != count:
        raise ValueError(f"keys: found {keys.shape[0]} steps, expected {count}, one fewer than sigmas")

    def visit(carry: tuple[Array, Any], step: Step) -> tuple[tuple[Array, Any], Any]:
        x, memory = carry
        v = policy_velocity(x, step.level.sigma)
        x_next, log_prob = draw(transition, step.level, x, v, step.keys)
        memory, kept = watch(memory, Seen(step.level, x, x_next, log_prob, step.inputs))
        return (x_next, memory), kept

    (x, memory), kept = scan_steps(visit, (at_least_float32(x), memory), levels, keys, inputs)
    return x, memory, kept


def rollout(
    policy_velocity: PolicyVelocity,
    transition: Transition,
    schedule: Level,
    noise: Float[Array, "b *shape"],
    keys: Key[Array, "t b"],
) -> Trajectory:
    """Samples with `transition` from `noise`, the state at the schedule's first level, down to its last.

    `schedule` comes from `make_levels`, `keys` from `sample_keys`. Raises ValueError where the numbers of steps
    disagree.
    """
    start = at_least_float32(noise)
    _, _, (latents, log_probs) = sample(
        policy_velocity, transition, schedule, start, keys, lambda _, seen: (None, (seen.x_next, seen.log_prob))
    )
    return Trajectory(latents=jnp.concatenate([start[None], latents]), log_probs=log_probs)


def sample_final(
    policy_velocity: PolicyVelocity,
    transition: Transition,
    schedule: Level,
    noise: Float[Array, "b *shape"],
    keys: Key[Array, "t b"],
) -> Float[Array, "b *shape"]:
    """The final state of a sampler; no state on the way is kept. The ODE does not use its keys.

    Raises ValueError where the numbers of steps disagree.
    """
    return sample(policy_velocity, transition, schedule, noise, keys)[0]


def draw(
    transition: Transition,
    level: Level,
    x: Float[Array, "b *shape"],
    v: Float[Array, "b *shape"],
    keys: Key[Array, " b"],
) -> tuple[Float[Array, "b *shape"], Float[Array, " b"]]:
    """The next state, and its log-density (0 where there is none); noise only where the level has it."""
    return transition_step(_at(transition, level), x, v, level.sigma, level.sigma_next, keys)


def log_density(
    transition: Transition,
    level: Level,
    x: Float[Array, "b *shape"],
    v: Float[Array, "b *shape"],
    x_next: Float[Array, "b *shape"],
) -> Float[Array, " b"]:
    """Log-density of a given next state under velocity v, mean over dimensions; zeros for a transition without one."""
    transition = _at(transition, level)
    if not transition.has_density:
        return jnp.zeros(x.shape[0])
    return transition.log_prob(x_next, *transition.moments(x, v, level.sigma, level.sigma_next))


def _at(transition: Transition, level: Level) -> Transition:
    return transition if level.noisy is None else transition.windowed(level.noisy)


def sample_keys(rng: Key[Array, ""], num_steps: int, batch: int) -> Key[Array, "t b"]:
    """Keys `[num_steps, batch]`; the one of sample i at step t depends on `(rng, i, t)` alone, on neither size."""

    def key(i, t):
        return jax.random.fold_in(jax.random.fold_in(rng, i), t)

    of_sample = jax.vmap(key, in_axes=(0, None))
    return jax.vmap(of_sample, in_axes=(None, 0))(jnp.arange(batch), jnp.arange(num_steps))


def starting_keys(keys: Key[Array, "t b"], group: int) -> Key[Array, " b"]:
    """Of `sample_keys` those of the noises that samples start from: `group` neighbours have the first one's."""
    return keys[0] if group == 1 else keys[0, np.arange(keys.shape[1]) // group * group]


def noise_window(num_steps: int, start: int, stop: int) -> Bool[np.ndarray, "t"]:
    """True for the steps `start <= t < stop` that are sampled with noise (Flow-GRPO-Fast: 2-3 in the first half).

    Raises ValueError unless `0 <= start < stop <= num_steps`.
    """
    if not 0 <= start < stop <= num_steps:
        raise ValueError(f"window: found {(start, stop)}, expected (start, stop) with 0 <= start < stop <= {num_steps}")
    steps = np.arange(num_steps)
    return (start <= steps) & (steps < stop)
