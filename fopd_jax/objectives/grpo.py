"""Policy gradients on a rollout's own steps: Flow-GRPO (2505.05470) and its stabilised forms.

At every noisy step of a sample with advantage A the drawn x' ~ N(μ, std²) is credited, and the policy is held to the
base, from which it may not stray:

    L = E[ u(t)·l(ρ, A) ] + β·E[ w(t)·‖v_θ - v_ref‖² ],        log ρ = log π_θ(x'|x) - log π_old(x'|x),

log-densities being means per dimension, hence the small ε. The surrogates l:

  clip   -min(ρ·A, clip(ρ, 1-ε, 1+ε)·A): PPO's (`objectives.surrogate`)
  guard  the same of log ρ·s + ‖μ - μ_old‖²/(2·s), s = std (GRPO-Guard, 2510.22319): its mean is 0 where that of log ρ
         is not, and its spread does not depend on the timestep
  dppo   -m·ρ·A, m = 0 where ‖μ - μ_old‖²/(2·std²) ≥ τ and the step moves away: ρ > 1 with A > 0, or ρ < 1 with A < 0
         (Flow-DPPO, 2606.11025)

At ρ = 1 all three have the gradient of -A·log π_θ, guard's times s. u is 1, or the step's share of the noise
(TempFlow-GRPO, 2508.04324); w is the divergence of the transitions with dt left out, as in the released code, unless
told otherwise. The means are over all trained steps of all samples that take part.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from fopd_jax.config.learning import PolicyGradient
from fopd_jax.flow.schedule import Level
from fopd_jax.flow.transition import CPS, SDE, Transition
from fopd_jax.flow.weighting import LEAST_NOISE, check_weighting, weight
from fopd_jax.objectives.surrogate import beyond, clipped, masked, means_apart

Samples = Float[Array, " b"]
Totals = dict[str, Samples]
TERMS = ("loss", "policy_loss", "reference_gap", "ratio", "off_policy", "clipped", "weight")
"""Per-sample sums over timesteps; each but `weight` is a mean by it."""
stop = jax.lax.stop_gradient


@struct.dataclass
class Acted:
    """A step of the old policy: from `x` to `x_next`, by `velocity` with `log_prob [B]`; `reference`: the base's there.

    `velocity` None: not needed; `reference` None: β is 0.
    """

    x: Any  # float arrays; Any because tree operations put anything into a leaf
    x_next: Any
    log_prob: Any
    velocity: Any = None
    reference: Any = None


def check_objective(objective: PolicyGradient, transition: Transition) -> None:
    """Refuse fields that do not go together.

    Raises:
      ValueError: the transition draws nothing, a divergence is asked of one that has none of Gaussians with a variance
        worth dividing by, or the weighting does not fit; names field, found and right.
    """
    if not isinstance(transition, SDE | CPS):
        raise ValueError("rollouts.transition: found 'ode', expected 'sde' or 'cps': without noise nothing is chosen")
    if transition.noise_level < LEAST_NOISE:
        raise ValueError(
            f"rollouts.noise_level: found {transition.noise_level:g}, expected at least {LEAST_NOISE:g}: without noise "
            "nothing is chosen"
        )
    if objective.kl_beta > 0:
        check_weighting(objective.kl_weighting, transition, "objective.kl_weighting")
    if objective.name != "clip" and not isinstance(transition, SDE):
        raise ValueError(f"objective.name: found {objective.name!r}, expected 'clip' where rollouts are not of an SDE")


def needs_old_velocity(objective: PolicyGradient) -> bool:
    """Whether the loss compares means, for which the old policy's velocities have to be kept."""
    return objective.name != "clip"


def step_weights(objective: PolicyGradient, transition: Transition, sigmas: np.ndarray) -> Float[np.ndarray, " t"]:
    """u of each step but the schedule's last: 1, or its std by the mean of all these, whichever of them are trained."""
    count = len(sigmas) - 2
    if objective.step_weighting == "uniform":
        return np.ones(count, np.float32)
    with jax.ensure_compile_time_eval():
        pairs = zip(map(jnp.asarray, sigmas[:count]), map(jnp.asarray, sigmas[1 : count + 1]), strict=True)
        std = np.array([float(transition.coefficients(*pair).std) for pair in pairs], np.float32)
    return std / std.mean()


def surrogate(
    objective: PolicyGradient, log_ratio: Samples, apart: Samples, std: Float[Array, ""], advantage: Samples
) -> tuple[Samples, Samples, Samples]:
    """The loss l, the ratio it is of, and 1 where the step is clipped or masked.

    `apart`: ‖μ - μ_old‖², mean per dimension; 0 where it is not used.
    """
    if objective.name == "guard":
        log_ratio = log_ratio * std + apart / (2 * std)
    ratio = jnp.exp(log_ratio)
    if objective.name == "dppo":
        loss, limited = masked(ratio, advantage, apart / (2 * std**2), objective.divergence)
    else:
        loss, limited = clipped(ratio, advantage, objective.clip), beyond(ratio, objective.clip)
    return loss, ratio, limited


def timestep_terms(
    objective: PolicyGradient,
    transition: Transition,
    level: Level,
    v: Float[Array, "b *shape"],
    acted: Acted,
    log_prob: Samples,
    advantage: Samples,
    counts: Samples,
    share: Float[Array, ""],
) -> Totals:
    """`TERMS` of one timestep, one value a sample, for the policy's velocity v at the state that was acted in.

    `counts`: 1, or 0 for samples that take no part; `share`: u(t).
    """
    _, c, std = transition.coefficients(level.sigma, level.sigma_next)
    apart = jnp.zeros_like(log_prob)
    if acted.velocity is not None:
        apart = means_apart(c, v, acted.velocity)
    loss, ratio, limited = surrogate(objective, log_prob - stop(acted.log_prob), apart, std, stop(advantage))
    gap = jnp.zeros_like(log_prob)
    if acted.reference is not None:
        w = weight(objective.kl_weighting, transition, level.sigma, level.sigma_next)
        gap = w * _mean_square(v - stop(acted.reference))
    terms = {
        "loss": share * loss + objective.kl_beta * gap,
        "policy_loss": share * loss,
        "reference_gap": gap,
        "ratio": ratio,
        "off_policy": (ratio != 1).astype(jnp.float32),
        "clipped": limited,
        "weight": jnp.ones_like(log_prob),
    }
    return {name: jnp.where(counts > 0, value * counts, 0.0) for name, value in terms.items()}


def _mean_square(difference: Float[Array, "b *shape"]) -> Samples:
    return jnp.square(difference).mean(tuple(range(1, difference.ndim)))
