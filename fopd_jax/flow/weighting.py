"""What one timestep's squared velocity difference counts for in the loss, `w(t)·mean(‖v - v_target‖²)`.

With teacher and student sharing the transition's std, their divergence is exact:

    KL(N(mean1, std²) ‖ N(mean2, std²)) = ‖mean1 - mean2‖²/(2·std²) = c²/(2·std²)·‖v1 - v2‖².

Weightings, for the step from sigma to sigma_next:
  kl        c²/(2·std²): the divergence of the SDE's transitions (Flow-OPD, the paper)
  kl_no_dt  |dt|·kl: the same with |dt| left out of the variance (Flow-OPD, the released code)
  ode       ½·dt²: squared distance of the Euler steps' end points (DiffusionOPD)
  uniform   1: plain mean squared error of velocities
  x0        sigma²: squared distance of the predicted clean latents, x0 = x - sigma·v
  x_next    c²: squared distance of the next states' means; no std, so that every transition has one

The last three say in what a target is matched: in v, x0 or the next state (Flow-Factory's v, x0 and xt). What share of
the whole each of the trained steps has, of 10 of shift 3 under an SDE of noise level .7:

  kl        .001 .002 .005 .010 .020 .040 .083 .197 .641
  kl_no_dt  .000 .000 .001 .003 .007 .018 .050 .162 .757
  ode       .010 .014 .020 .029 .044 .071 .121 .224 .466
  uniform   .111 …
  x0        .190 .175 .158 .140 .118 .095 .069 .041 .015
  x_next    .007 .014 .020 .029 .045 .071 .122 .225 .467; CPS .005 .015 .031 .055 .089 .134 .188 .238 .246; ODE as `ode`
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fopd_jax.config.teaching import WEIGHTINGS
from fopd_jax.flow.transition import ODE, SDE, Transition, at_least_float32

DIVERGENCES = ("kl", "kl_no_dt")
"""Weightings that are a Gaussian divergence; the others are `DISTANCES`, which need no noise."""
DISTANCES = tuple(name for name in WEIGHTINGS if name not in DIVERGENCES)
LEAST_NOISE = 1e-6
"""Of an SDE that has a divergence: below it, 1/std² leaves float32."""


def weight(
    name: str, transition: Transition, sigma: Float[Array, ""] | float, sigma_next: Float[Array, ""] | float
) -> Float[Array, ""]:
    """The 0-d weight of the step from `sigma` to `sigma_next`, in float32 or in a wider dtype of theirs.

    `transition` is the one the policy is defined with, *before* any noise window is applied: a window turns noise off
    for sampling, and a divergence of noiseless steps would be infinite. Raises as `check_weighting` does.
    """
    check_weighting(name, transition)
    sigma, sigma_next = at_least_float32(sigma), at_least_float32(sigma_next)
    step = sigma - sigma_next
    if name == "uniform":
        return jnp.ones_like(step)
    if name == "ode":
        return step**2 / 2
    if name == "x0":
        return sigma**2
    if name == "x_next":
        return transition.velocity_coefficient(sigma, sigma_next) ** 2
    divergence = _gaussian_divergence(transition, sigma, sigma_next)
    return divergence if name == "kl" else step * divergence


def check_weighting(name: str, transition: Transition, field: str = "objective.weighting") -> None:
    """Raises ValueError, which names the field, for an unknown weighting and one that the transition cannot carry."""
    if name not in WEIGHTINGS:
        raise ValueError(f"{field}: found {name!r}, expected one of {', '.join(WEIGHTINGS)}")
    if name not in DIVERGENCES:
        return
    reason = _why_no_divergence(transition)
    if reason:
        raise ValueError(f"{field}: found {name!r}, expected one of {', '.join(DISTANCES)}: {reason}")


def _why_no_divergence(transition: Transition) -> str | None:
    """Why the weightings that are a Gaussian divergence do not fit this transition; None where they do."""
    if isinstance(transition, ODE):
        return "the ODE step has no noise, so its divergence is infinite"
    if not isinstance(transition, SDE):
        return (
            "CPS has a std proportional to sigma_next, .008 at .278 -> .0089 of the 10-step schedule, "
            "so that one step would be 99.8% of the loss"
        )
    if isinstance(transition.noise_level, int | float) and transition.noise_level < LEAST_NOISE:
        level = f"an SDE of noise level {transition.noise_level:g} has no noise"
        return f"{level} (below {LEAST_NOISE:g}), so its divergence is infinite"
    return None


def _gaussian_divergence(transition: Transition, sigma: Float[Array, ""], sigma_next: Float[Array, ""]):
    """`c²/(2·std²)`; for the SDE `|dt|/2·(s·(1 - sigma)/(2·sigma) + 1/s)²`."""
    _, velocity, std = transition.coefficients(sigma, sigma_next)
    return velocity**2 / (2 * std**2)
