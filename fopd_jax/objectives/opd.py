"""On-policy distillation: dense, trajectory-level supervision of the student's velocity by its teachers (Flow-OPD).

At every state x_t of the student's own trajectory the teacher's velocity v_k and the anchor's v_a are targets:

    L = E_t[ w(t)·‖v_θ - sg(v_k)‖² ] + β·E_t[ w(t)·‖v_θ - sg(v_a)‖² ],

norms being means per dimension. `direct` is that loss. `clipped` wraps its first term into PPO's surrogate
`-min(ρ·r, clip(ρ, 1-ε, 1+ε)·r)`, ρ = π_θ(x'|x)/π_old(x'|x), with one of three rewards:

  kl           r = -w·‖v_θ - sg(v_k)‖², attached: at ρ = 1 its mean gradient is the direct one (default)
  log_ratio    r = log π_k(x') - log π_θ(x') at the drawn x', detached: the policy-gradient form; with log-densities
               averaged over D dimensions its mean gradient is 1/D of the direct one under weighting `kl`
  kl_detached  the first one detached: it does not depend on the action, so its mean gradient is zero. The paper's first
               text; kept to show that it does not learn

`mixed` adds the advantage A of the sample by its task's rewards, the same at all its steps, to that reward:
r = w_T·r_T + λ·A under one ratio. With the attached r_T its gradient at ρ = 1 is

    w_T·w·∇‖v_θ - v_k‖² - λ·A·∇log π_θ(x') + w_T·w·‖v_θ - v_k‖²·∇log π_θ(x'),

whose last term has mean zero over the action. A sample without an advantage, because its rewards failed or its group is
all equal, has A = 0: it is distilled as ever. The clip is decided by the sum's sign, as in the released code.

By `surrogate` `dppo` no ratio is clipped; a step is left out that moves away from the policy that drew it when their
divergence has reached `divergence` (Flow-DPPO, arXiv 2606.11025; `objectives.surrogate`). With it goes its reward where
that is attached, but not its anchor.

What is compared (`match`): guided velocities of both; the student's conditional velocity with the targets' guided one,
so that their guidance is folded into it (GFD-OPD, arXiv 2609.39692); or the branches apart, v_c under the prompt and
d = v_c - v_n against the empty one (PDM, arXiv 2607.24731):

    ‖v_c - v_c,k‖² + a·‖d - d_k‖²,    a = `branch_weight`.

Guided velocities alone hide errors of the two branches that cancel. At the student's scale g its guided velocity is
v_c + (g - 1)·d, so that branches that are matched to δ_c and δ_d match it to |δ_c| + |g - 1|·|δ_d|.

By `normalise` each sample's squared distance S counts divided by its own root, detached (Flow-Factory's
`self_normalize`, whose divisor is the mean |v - v_k|):

    √w·S/(sg(√S) + ε),    S = ‖v - v_k‖², or with branches the whole sum above;    ε = 1e-6.

Then a sample's gradient by v has the length 2·√(w/D), D being the dimensions, whatever its gap: tasks far from their
teacher do not outweigh those close to it. The root mean square makes that exact; by the mean |v - v_k| a gap in few
pixels would pull more than an even one. √w, not w, since √w·(v - v_k) is what is divided: of `x0` σ, of `x_next` |c|.
Where S = 0 loss and gradient are 0; below ε, which is float32's rounding of velocities, they fall off to it. A gap that
is left by coarser rounding, as of bfloat16 networks, pulls like any other.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from fopd_jax.config.schema import Objective
from fopd_jax.flow.rollout import log_density
from fopd_jax.flow.schedule import Level
from fopd_jax.flow.transition import SDE, Transition
from fopd_jax.flow.weighting import check_weighting, weight
from fopd_jax.objectives.surrogate import beyond, clipped, masked, means_apart

Samples = Float[Array, " b"]
Totals = dict[str, Samples]
TERMS = ("loss", "teacher_gap", "anchor_gap", "velocity_mse", "ratio", "clipped", "weight")
"""Per-sample sums: the mean loss is `loss` by `weight`, each summed over samples; the rest are metrics, alike."""
LEAST_GAP = 1e-6
"""ε of `normalise`, a root mean square of velocities."""
stop = jax.lax.stop_gradient


@struct.dataclass
class Targets:
    """Velocities `[B, h, w, c]` to match at one state: the teachers', and the anchor's where β > 0.

    `anchored [B]`: how often the anchor's count, where that is not once. Where branches are matched, the velocities are
    conditional ones and `teacher_difference`, `anchor_difference` what these differ by from those of the empty prompt.
    `trust [B]`: what the teachers' part of the loss counts, where that is not 1; metrics do not know of it.
    """

    teacher: Any  # float arrays; Any because tree operations put anything into a leaf
    anchor: Any = None
    anchored: Any = None
    teacher_difference: Any = None
    anchor_difference: Any = None
    trust: Any = None


@struct.dataclass
class Compared:
    """What of the student is held to the targets `[B, h, w, c]`; `difference`: where branches are matched.

    `acting`: the guided velocity that its next state is drawn by, where the loss compares that to the old policy's.
    """

    velocity: Any
    difference: Any = None
    acting: Any = None


def compared(match: str, text: Array, null: Array) -> Compared:
    """Of the student's branches, where not its guided velocity is."""
    return Compared(text, text - null) if match == "branches" else Compared(text)


def check_objective(objective: Objective, transition: Transition) -> None:
    """Refuse fields that do not go together.

    Raises:
      ValueError: a weighting or an objective that needs a density on a transition without one, or a weighting other
        than `kl` with `log_ratio`; names field, found and right.
    """
    check_weighting(objective.weighting, transition)
    if objective.name == "direct":
        return
    if not transition.has_density:
        raise ValueError(
            f"objective.name: {objective.name!r} needs a transition with a density ('sde' or 'cps'), found 'ode'"
        )
    if objective.surrogate == "dppo" and not isinstance(transition, SDE):
        raise ValueError("objective.surrogate: found 'dppo', expected 'clip' where rollouts are not of an SDE")
    if objective.reward == "log_ratio" and objective.weighting != "kl":
        raise ValueError(
            f"objective.weighting: found {objective.weighting!r}, but reward 'log_ratio' has no weighting but 'kl'"
        )
    if objective.reward == "log_ratio" and objective.match != "guided":
        raise ValueError(
            f"objective.match: found {objective.match!r}, expected 'guided': reward 'log_ratio' compares densities"
        )
    if objective.reward == "log_ratio" and objective.normalise:
        raise ValueError("objective.normalise: found True, expected False: reward 'log_ratio' compares densities")


def needs_old_velocity(objective: Objective) -> bool:
    """Whether the loss compares means, for which the old policy's velocities have to be kept."""
    return objective.name != "direct" and objective.surrogate == "dppo"


def divergence(v: Float[Array, "b *shape"], target: Float[Array, "b *shape"], weight: Float[Array, "*k"]) -> Samples:
    """w·‖v - sg(target)‖², mean per dimension, one value per sample; w is one number or one per sample."""
    return weight * distance(v, target)


def distance(v: Float[Array, "b *shape"], target: Float[Array, "b *shape"]) -> Samples:
    """‖v - sg(target)‖², mean per dimension, one value per sample."""
    return jnp.square(v - stop(target)).mean(tuple(range(1, v.ndim)))


def counted(
    objective: Objective, transition: Transition, sigma: Float[Array, ""], sigma_next: Float[Array, ""]
) -> Float[Array, ""]:
    """What a timestep's distances count: the weighting's w of squared ones, √w of normalised ones."""
    w = weight(objective.weighting, transition, sigma, sigma_next)
    return jnp.sqrt(w) if objective.normalise else w


def surrogate(log_prob: Samples, log_prob_old: Samples, reward: Samples, clip: float) -> Samples:
    """PPO's clipped loss, one value per sample."""
    return clipped(jnp.exp(log_prob - stop(log_prob_old)), reward, clip)


def distillation_loss(
    objective: Objective,
    gap: Samples,
    log_prob: Samples,
    log_prob_old: Samples,
    log_prob_teacher: Samples,
    advantage: Samples | None = None,
    trust: Samples | None = None,
    moved: Samples | None = None,
) -> tuple[Samples, Samples | None]:
    """The teacher's term for one step, and 1 where a mask leaves it out (None: there is no mask); `gap` is
    `divergence(v_θ, v_k, w)`, log-densities are those of the drawn x'.

    `advantage`: of 'mixed', which needs one. A detached reward is clamped to ±`reward_limit`; an attached one is not,
    which would silence the worst samples. `trust`: what the teacher's reward counts, None: 1. `moved`: the divergence
    from the old policy, None: 0, as on policy.
    """
    if objective.name == "direct":
        return gap if trust is None else trust * gap, None
    rewards = {"kl": -gap, "log_ratio": stop(log_prob_teacher - log_prob), "kl_detached": stop(-gap)}
    reward = rewards[objective.reward]
    if objective.reward != "kl":
        reward = jnp.clip(reward, -objective.reward_limit, objective.reward_limit)
    if trust is not None:
        reward = trust * reward
    if objective.name == "mixed":
        if advantage is None:
            raise ValueError("objective.name: found 'mixed', expected another where nothing scores the samples")
        reward = objective.teacher_weight * reward + objective.task_weight * stop(advantage)
    if objective.surrogate == "dppo":
        ratio = jnp.exp(log_prob - stop(log_prob_old))
        return masked(ratio, reward, jnp.zeros_like(ratio) if moved is None else moved, objective.divergence)
    return surrogate(log_prob, log_prob_old, reward, objective.clip), None


def trains(objective: Objective, noisy: Array) -> Array:
    """1 where a step counts, else 0: all for the direct objective unless asked, noisy ones for those with a ratio."""
    only_noisy = objective.name != "direct" or objective.window_only
    return noisy.astype(jnp.float32) if only_noisy else jnp.ones((), jnp.float32)


def timestep_terms(
    objective: Objective,
    transition: Transition,
    level: Level,
    v: Float[Array, "b *shape"] | Compared,
    targets: Targets,
    x: Float[Array, "b *shape"],
    x_next: Float[Array, "b *shape"],
    log_prob: Samples,
    log_prob_old: Samples,
    advantage: Samples | None = None,
    beta: Float[Array, ""] | None = None,
    v_old: Float[Array, "b *shape"] | None = None,
) -> Totals:
    """`TERMS` of one timestep, one value per sample, for what is compared of the student at x and the step drawn there.

    `log_prob` is the drawn step's under v, `log_prob_old` under the policy that drew it; `advantage`: of 'mixed';
    `beta`: the anchor's weight, where it is not the objective's; `v_old`: the velocity of the policy that drew it,
    where that is compared (`needs_old_velocity`) and another.
    """
    w = counted(objective, transition, level.sigma, level.sigma_next)
    counts = jnp.broadcast_to(trains(objective, level.noisy), log_prob.shape)
    direct = direct_terms(objective, v, targets, jnp.broadcast_to(w, log_prob.shape))
    log_prob_teacher = log_density(transition, level, x, targets.teacher, x_next)
    moved = None
    if v_old is not None and isinstance(v, Compared):
        _, c, std = transition.coefficients(level.sigma, level.sigma_next)
        moved = means_apart(c, v.acting, v_old) / (2 * std**2)
    loss, left_out = distillation_loss(
        objective, direct["teacher_gap"], log_prob, log_prob_old, log_prob_teacher, advantage, targets.trust, moved
    )
    ratio = jnp.exp(log_prob - log_prob_old)
    terms = direct | {
        "loss": loss + (objective.mar_beta if beta is None else beta) * direct["anchor_gap"],
        "ratio": ratio,
        "clipped": beyond(ratio, objective.clip) if left_out is None else left_out,
    }
    return {name: value * counts for name, value in terms.items()}


def direct_terms(
    objective: Objective,
    v: Float[Array, "b *shape"] | Compared,
    targets: Targets,
    w: Samples,
    beta: Float[Array, ""] | None = None,
) -> Totals:
    """`TERMS` of the direct objective at one state a sample, each counting w (`counted`); `beta`: the anchor's."""
    own = v if isinstance(v, Compared) else Compared(v)
    gap = _gap(objective, own, targets.teacher, targets.teacher_difference, w)
    drift = jnp.zeros_like(gap)
    if targets.anchor is not None:
        often = w if targets.anchored is None else w * targets.anchored
        drift = _gap(objective, own, targets.anchor, targets.anchor_difference, often)
    taught = gap if targets.trust is None else targets.trust * gap
    return {
        "loss": taught + (objective.mar_beta if beta is None else beta) * drift,
        "teacher_gap": gap,
        "anchor_gap": drift,
        "velocity_mse": divergence(own.velocity, targets.teacher, jnp.ones_like(w)),
        "ratio": jnp.ones_like(gap),
        "clipped": jnp.zeros_like(gap),
        "weight": jnp.ones_like(gap),
    }


def _gap(objective: Objective, own: Compared, target: Array, difference: Array | None, w: Samples) -> Samples:
    square = distance(own.velocity, target)
    if own.difference is not None and difference is not None:
        square = square + objective.branch_weight * distance(own.difference, difference)
    if objective.normalise:
        square = square / (jnp.sqrt(stop(square)) + LEAST_GAP)
    return w * square
