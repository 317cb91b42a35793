"""The gradient on the way: with one update per rollout the rollout's velocity *is* the training velocity.

Each timestep samples, asks the teachers, differentiates and moves on; gradients are summed in the scan's carry.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fopd_jax.flow.rollout import Step, draw, scan_steps
from fopd_jax.objectives.opd import Totals, timestep_terms
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.opd.gaps import parted, term_names
from fopd_jax.steps.opd.pieces import Pieces, add, approach, mean_gradient, student_says, zero_totals
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.opd.targets import anchor_picks, ask
from fopd_jax.steps.state import TrainState
from fopd_jax.worlds.prompt_stream import Batch


def fused_gradients(pieces: Pieces, frozen: Frozen, state: TrainState, batch: Batch) -> tuple[Tree, Totals]:
    """Gradient of the mean loss over samples and trained timesteps, sampling on the way; sums per sample."""
    spec, groups = pieces.spec, pieces.groups
    parameters = pieces.student.compute(state.trained)
    x, keys = approach(pieces, frozen, state, parameters, batch)

    def visit(carry: Any, step: Step) -> tuple[Any, None]:
        x, gradients, totals = carry
        level, (pick, slot) = step.level, step.inputs
        targets = ask(pieces, frozen, batch, x, level, pick)

        def loss(parameters: Tree, rows: Any) -> tuple[Array, tuple[Array, Totals]]:
            conditioning, x, targets, keys = rows
            v, own = student_says(pieces, frozen, parameters, conditioning, x, level.sigma)
            x_next, log_prob = draw(spec.transition, level, x, v, keys)
            old = jax.lax.stop_gradient(log_prob)
            terms = timestep_terms(
                spec.objective, spec.transition, level, own, targets, x, x_next, log_prob, old, beta=state.beta
            )
            return terms["loss"].sum(), (x_next, terms)

        rows = batch.student, x, targets, step.keys
        grads, (x_next, terms) = groups.gradient(jax.grad(loss, has_aux=True), parameters, rows)
        terms = terms if slot is None else parted(spec, terms, slot)
        return (x_next, add(gradients, grads), add(totals, terms)), None

    init = (x, groups.zeros(parameters), zero_totals(x.shape[0], term_names(spec)))
    picks = anchor_picks(spec, state, x.shape[0])
    slots = jnp.arange(spec.window[1] - spec.window[0]) if spec.gaps else None
    with jax.named_scope("opd_fused"):
        (_, gradients, totals), _ = scan_steps(visit, init, spec.levels(*spec.window), keys, (picks, slots))
    return mean_gradient(groups, gradients, totals), totals
