"""Flow matching of captioned latents beside distillation: an anchor in data, against drift (LIFT has such a loss).

    L ← L + w·E‖v_θ(x_t, c) - (ε - x0)‖²,  v_θ the student's velocity under the caption, without guidance.

Its gradient is taken once an update, at the weights of that update, and added to the one of distillation, each divided
by its own number of samples. Noise and level of a row are functions of the seed, the step and the row alone: updates of
one step see the same ones, as they see the same rollout.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fopd_jax.flow.rollout import sample_keys
from fopd_jax.flow.transition import standard_normal
from fopd_jax.objectives.flow_matching import sample_levels
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.flow_matching import matching_gradient
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.state import TrainState
from fopd_jax.worlds.prompt_stream import Batch

NOISE = 2**32 - 7  # what the step's key is folded with for noise and levels of captioned latents


def apart(batch: Batch) -> tuple[Batch, Any]:
    """The prompts, and the captioned latents, which are not split as prompts are."""
    return dataclasses.replace(batch, offline=None), batch.offline


def noise_and_levels(spec: OPDSpec, state: TrainState, size: int) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
    """Of so many rows in this step."""
    assert spec.offline is not None
    levels = spec.offline.levels
    noise, level = sample_keys(jax.random.fold_in(state.rng(), NOISE), 2, size)
    return standard_normal(noise, spec.latent_shape), jax.vmap(lambda key: sample_levels(levels, key, 1)[0])(level)


def offline_gradient(pieces: Pieces, frozen: Frozen, state: TrainState, rows: Any) -> tuple[Tree, Float[Array, ""]]:
    """Gradient of w times the mean loss, shaped and split as what trains, and the mean loss without w.

    Raises:
      ValueError: the batch has no captioned latents.
    """
    spec, groups = pieces.spec, pieces.groups
    assert spec.offline is not None
    if rows is None:
        raise ValueError("offline.weight: found a batch without captioned latents, expected some in `Batch.offline`")
    size = rows["x0"].shape[0]
    noise, sigma = noise_and_levels(spec, state, size)
    parameters = pieces.student.compute(state.trained)
    whole = rows["x0"], groups.rows(noise), sigma, rows["conditioning"]
    with jax.named_scope("offline"):
        sums, losses = matching_gradient(pieces.velocity, pieces.student, groups, frozen.variables, parameters, whole)
    share = spec.offline.weight / size
    return jax.tree.map(lambda g: share * g, groups.total(sums)), losses.mean()


def offline_if(
    lands: Any, pieces: Pieces, frozen: Frozen, state: TrainState, rows: Any
) -> tuple[Tree, Float[Array, ""]] | None:
    """The same where an update `lands`, else zeros; None where nothing is matched."""
    if pieces.spec.offline is None:
        return None
    nothing = jax.tree.map(jnp.zeros_like, state.trained), jnp.zeros(())
    return jax.lax.cond(lands, lambda: offline_gradient(pieces, frozen, state, rows), lambda: nothing)
