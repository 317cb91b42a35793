"""Trajectories: a sampler's steps in one `lax.scan`, with all random keys made up front."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Key

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


def rollout(
    policy_velocity: PolicyVelocity,
    transition: Transition,
    sigmas: Float[Array | np.ndarray, "t_plus_1"],
    noise: Float[Array, "b *shape"],
    keys: Key[Array, "t b"],
    noisy: Bool[Array | np.ndarray, "t"] | None = None,
) -> Trajectory:
    """Samples with `transition` from `noise` (the state at `sigmas[0]`) down to `sigmas[-1]`.

    `keys` come from `sample_keys`; `noisy` limits the noise to a window of steps (see `noise_window`), the others being
    ODE steps. Raises ValueError where the numbers of steps disagree.
    """
    num_steps = _check_steps(sigmas, keys, noisy)
    sigmas = jnp.asarray(sigmas)
    noisy = jnp.ones(num_steps, bool) if noisy is None else jnp.asarray(noisy)

    def step(x, inputs):
        sigma, sigma_next, step_keys, step_noisy = inputs
        v = policy_velocity(x, sigma)
        x_next, log_prob = transition_step(transition.windowed(step_noisy), x, v, sigma, sigma_next, step_keys)
        return x_next, (x_next, log_prob)

    start = at_least_float32(noise)
    _, (latents, log_probs) = jax.lax.scan(step, start, (sigmas[:-1], sigmas[1:], keys, noisy))
    return Trajectory(latents=jnp.concatenate([start[None], latents]), log_probs=log_probs)


def sample_final(
    policy_velocity: PolicyVelocity,
    transition: Transition,
    sigmas: Float[Array | np.ndarray, "t_plus_1"],
    noise: Float[Array, "b *shape"],
    keys: Key[Array, "t b"],
) -> Float[Array, "b *shape"]:
    """The final state of a sampler, for evaluation; no state on the way is kept. The ODE does not use its keys.

    Raises ValueError where the numbers of steps disagree.
    """
    _check_steps(sigmas, keys, None)
    sigmas = jnp.asarray(sigmas)

    def step(x, inputs):
        sigma, sigma_next, step_keys = inputs
        return transition_step(transition, x, policy_velocity(x, sigma), sigma, sigma_next, step_keys)[0], None

    final, _ = jax.lax.scan(step, at_least_float32(noise), (sigmas[:-1], sigmas[1:], keys))
    return final


def sample_keys(rng: Key[Array, ""], num_steps: int, batch: int) -> Key[Array, "t b"]:
    """Keys `[num_steps, batch]`; the one of sample i at step t depends on `(rng, i, t)` alone, on neither size."""

    def key(i, t):
        return jax.random.fold_in(jax.random.fold_in(rng, i), t)

    of_sample = jax.vmap(key, in_axes=(0, None))
    return jax.vmap(of_sample, in_axes=(None, 0))(jnp.arange(batch), jnp.arange(num_steps))


def noise_window(num_steps: int, start: int, stop: int) -> Bool[np.ndarray, "t"]:
    """True for the steps `start <= t < stop` that are sampled with noise (Flow-GRPO-Fast: 2-3 in the first half).

    Raises ValueError unless `0 <= start < stop <= num_steps`.
    """
    if not 0 <= start < stop <= num_steps:
        raise ValueError(f"noise window: found [{start}, {stop}), expected 0 <= start < stop <= {num_steps}")
    steps = np.arange(num_steps)
    return (start <= steps) & (steps < stop)


def _check_steps(sigmas, keys, noisy) -> int:
    """The number of steps; ValueError where sigmas, keys and window do not agree on it."""
    num_steps = sigmas.shape[0] - 1
    if keys.shape[0] != num_steps:
        raise ValueError(f"keys: found {keys.shape[0]} steps, expected {num_steps}, one fewer than sigmas")
    if noisy is not None and noisy.shape[0] != num_steps:
        raise ValueError(f"noisy: found {noisy.shape[0]} steps, expected {num_steps}, one fewer than sigmas")
    return num_steps
