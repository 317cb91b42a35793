"""Reinforcement on the forward process: losses on noised final latents, whatever solver has made them.

A rollout's final latent x0 is noised anew, x_t = (1 - t)·x0 + t·ε, and the velocities of the policy v, of the old one
v_old and of the base v_ref are compared there, with the target u = ε - x0. With l(v) = mean (v - u)² and the advantage
divided by its limit, a = clip(A/limit, ±1), one sample's loss is one of three, norms being means per dimension:

  nft  limit/b·[ r·|x̂⁺ - x0|²/w⁺ + (1 - r)·|x̂⁻ - x0|²/w⁻ ],   r = (1 + a)/2,   x̂^± = x_t - t·v^±,
       v⁺ = b·v + (1 - b)·v_old,   v⁻ = (1 + b)·v_old - b·v,   w^± = sg mean |x̂^± - x0|, at least 1e-5
       (DiffusionNFT, 2509.16117)
  awm  -min(ρ·a, clip(ρ, 1 - ε, 1 + ε)·a),   log ρ = W(l(v_old)) - W(l(v)),   W(l) = t/p·((l + δ)^p - δ^p), p = 1/4
       (advantage-weighted matching, 2509.25050)
  crd  limit/β·[ β·(q - mean q) - (r - mean r) ]²,   q = l(v_old)/w_old - l(v)/w,   w = sg mean |v - u|, at least 1e-5,
       means over the group (centred reward distillation, 2603.14128)

to which come β_old·|v - v_old|² and β_ref·s·|v - v_ref|²; s is 1, under `crd` what leads from 1e-4/β_ref at r = 0 to
1 at r = 1. At v = v_old the gradient of `nft` is that of limit·(2·r - 1)·|x̂ - x0|²/w, those of `awm` and `crd` are
that of a·W(l) and of -2·limit·(r - mean r)·q. In `crd` it is all the same whether a gradient is taken of mean q too:
the terms of a group add up to 0.

A group that is all equal has r = 1/2 throughout: it teaches nothing at v = v_old, and elsewhere it only holds the
policy back. Such groups count 0, as failures do, and are no part of any mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from fopd_jax.config.learning import ForwardObjective

Samples = Float[Array, " b"]
Totals = dict[str, Samples]
FLOOR = 1e-5  # of adaptive weights
POWER, OFFSET = 0.25, 1e-10  # of AWM's W
LEAST_KL = 1e-4  # CRD's weight of the distance to the base at the worst reward
stop = jax.lax.stop_gradient


@struct.dataclass
class Noised:
    """Final latents `x0 [B, h, w, c]` with `noise`, at levels `t [B]`, and others' velocities there.

    `reference` None: the base is not asked.
    """

    x0: Any  # float arrays; Any because tree operations put anything into a leaf
    noise: Any
    t: Any
    old: Any
    reference: Any = None

    @property
    def state(self) -> Array:
        """x_t."""
        t = over(self.t, self.x0)
        return (1 - t) * self.x0 + t * self.noise


def term_names(objective: ForwardObjective) -> tuple[str, ...]:
    """Of per-sample values; each but `weight` is a mean by it."""
    own = {"nft": ("positive", "negative"), "awm": ("ratio", "clipped"), "crd": ("implicit_reward",)}
    return ("loss", "policy_loss", "reference_gap", "old_gap", "preference", *own[objective.name], "weight")


def nft(v: Float[Array, "b *shape"], at: Noised, r: Samples, b: float) -> Totals:
    """DiffusionNFT's loss without limit/b, and both its errors."""
    t, old = over(at.t, v), stop(at.old)

    def error(velocity: Array) -> Samples:
        apart = at.state - t * velocity - at.x0
        return _mean(jnp.square(apart)) / jnp.maximum(stop(_mean(jnp.abs(apart))), FLOOR)

    positive, negative = error(b * v + (1 - b) * old), error((1 + b) * old - b * v)
    return {"policy_loss": r * positive + (1 - r) * negative, "positive": positive, "negative": negative}


def matching(v: Float[Array, "b *shape"], at: Noised) -> Samples:
    """AWM's W(l(v)), in place of a negative log-likelihood."""
    loss = _mean(jnp.square(v - (at.noise - at.x0)))
    return at.t / POWER * ((loss + OFFSET) ** POWER - OFFSET**POWER)


def awm(v: Float[Array, "b *shape"], at: Noised, a: Samples, clip: float) -> Totals:
    """PPO's surrogate of the ratio that `matching` gives."""
    ratio = jnp.exp(stop(matching(at.old, at)) - matching(v, at))
    limited = jnp.clip(ratio, 1 - clip, 1 + clip)
    clipped = (jnp.abs(ratio - 1) > clip).astype(jnp.float32)
    return {"policy_loss": -jnp.minimum(ratio * a, limited * a), "ratio": ratio, "clipped": clipped}


def implicit_reward(v: Float[Array, "b *shape"], at: Noised) -> Samples:
    """CRD's q: by how much the policy matches better than the old one, errors by their own size."""
    target = at.noise - at.x0

    def error(velocity: Array) -> Samples:
        apart = velocity - target
        return _mean(jnp.square(apart)) / jnp.maximum(stop(_mean(jnp.abs(apart))), FLOOR)

    return stop(error(at.old)) - error(v)


def crd(v: Float[Array, "b *shape"], at: Noised, r: Samples, beta: float, group: int, counts: Samples) -> Totals:
    """CRD's loss without limit/β; `group`: so many neighbours were drawn of one prompt, and share t."""
    q = implicit_reward(v, at)
    apart = beta * centred(q, counts, group) - centred(r, counts, group)
    return {"policy_loss": jnp.square(apart), "implicit_reward": q}


def centred(values: Samples, counts: Samples, group: int) -> Samples:
    """Less the mean over those of the group that count."""
    grouped, mask = values.reshape(-1, group), counts.reshape(-1, group)
    means = jnp.where(mask > 0, grouped, 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)
    return (grouped - means[:, None]).reshape(-1)


def forward_terms(
    objective: ForwardObjective,
    v: Float[Array, "b *shape"],
    at: Noised,
    advantage: Samples,
    counts: Samples,
    limit: float,
    group: int,
) -> Totals:
    """`term_names` of one level a sample. `limit`: of advantages; `counts`: 1, or 0 for samples that take no part."""
    a = jnp.clip(stop(advantage) / limit, -1, 1)
    r = (1 + a) / 2
    if objective.name == "nft":
        own, scale = nft(v, at, r, objective.beta), limit / objective.beta
    elif objective.name == "crd":
        own, scale = crd(v, at, r, objective.beta, group, counts), limit / objective.beta
    else:
        own, scale = awm(v, at, a, objective.clip), 1.0
    own["policy_loss"] *= scale
    old_gap, gap = _mean(jnp.square(v - stop(at.old))), jnp.zeros_like(r)
    if at.reference is not None:
        gap = _mean(jnp.square(v - stop(at.reference)))
    held = objective.kl_beta * gap
    if objective.name == "crd":
        held = (LEAST_KL + r * (objective.kl_beta - LEAST_KL)) * gap
    terms = own | {
        "loss": own["policy_loss"] + objective.old_beta * old_gap + held,
        "reference_gap": gap,
        "old_gap": old_gap,
        "preference": r,
        "weight": jnp.ones_like(r),
    }
    return {name: jnp.where(counts > 0, value, 0.0) for name, value in terms.items()}


def over(values: Samples, like: Float[Array, "b *shape"]) -> Array:
    """One value a sample, to go with arrays of all its dimensions."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def _mean(values: Float[Array, "b *shape"]) -> Samples:
    return values.mean(tuple(range(1, values.ndim)))
