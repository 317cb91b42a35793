"""A penalty's weight that learns, so that what it penalises stays at a bound: dual ascent in the logarithm."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def dual_ascent(
    beta: Float[Array, ""], gap: Float[Array, ""], bound: float, rate: float, limits: tuple[float, float]
) -> Float[Array, ""]:
    """β ← β·exp(rate·(gap/bound - 1)), within `limits`.

    A step up in ln β of the constraint `gap/bound <= 1` in the Lagrangian `loss + β·gap`: β grows while the gap is
    above the bound, falls below it, and rests where they are equal. `limits[0] > 0`: a β of 0 would never come back.
    """
    return jnp.clip(beta * jnp.exp(rate * (gap / bound - 1)), *limits)
