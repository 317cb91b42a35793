"""What a step is worth under the ratio ρ = π_θ(x'|x)/π_old(x'|x) of its drawn x', r being its reward or advantage.

  clipped  -min(ρ·r, clip(ρ, 1-ε, 1+ε)·r): PPO's
  masked   -m·ρ·r, m = 0 where D = ‖μ - μ_old‖²/(2·std²) ≥ τ and the step moves away: ρ > 1 with r > 0, or ρ < 1 with
           r < 0 (Flow-DPPO, arXiv 2606.11025). D is the exact divergence of the two Gaussians, mean per dimension

A reward that is attached keeps its gradient where the ratio is clipped; a step that is masked is left out altogether.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Samples = Float[Array, " b"]
stop = jax.lax.stop_gradient


def clipped(ratio: Samples, reward: Samples, clip: float) -> Samples:
    """PPO's loss."""
    return -jnp.minimum(ratio * reward, jnp.clip(ratio, 1 - clip, 1 + clip) * reward)


def beyond(ratio: Samples, clip: float) -> Samples:
    """1 where the ratio is further than that from 1, else 0."""
    return (jnp.abs(ratio - 1) > clip).astype(jnp.float32)


def masked(ratio: Samples, reward: Samples, divergence: Samples, threshold: float) -> tuple[Samples, Samples]:
    """Flow-DPPO's loss, and 1 where the step is left out; `divergence`: D."""
    away = jnp.where(reward > 0, ratio > 1, ratio < 1) & (reward != 0)
    left_out = away & (divergence >= threshold)
    return -jnp.where(stop(left_out), 0.0, ratio * reward), left_out.astype(jnp.float32)


def means_apart(c: Float[Array, ""], v: Float[Array, "b *shape"], v_old: Float[Array, "b *shape"]) -> Samples:
    """‖μ - μ_old‖², mean per dimension, of steps from the same state whose means are p·x + c·v."""
    return jnp.square(c * (v - stop(v_old))).mean(tuple(range(1, v.ndim)))
