"""One jitted update of flow matching: `step(frozen, state, batch) → (state, metrics)`, pure, state donated."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import EMA, LogitNormal
from fopd_jax.objectives.flow_matching import flow_matching, interpolate, sample_levels, velocity_matching
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.parallel.sharding import activation_rules
from fopd_jax.policy.velocity import Tree, Velocity
from fopd_jax.steps.state import TrainState, advance, apply_if_finite
from fopd_jax.steps.student import Student

METRICS = ("loss", "grad_norm", "skipped")
"""Names of the scalars that an update returns."""


def matching_gradient(
    velocity: Velocity,
    student: Student,
    groups: GradientGroups,
    frozen: Tree,
    parameters: Tree,
    rows: tuple[Array, Array, Array, Conditioning],
) -> tuple[Tree, Array]:
    """Gradient sum over samples, by group, and each sample's loss `[B]`; `rows`: latents, noise, levels, captions."""

    def loss(parameters: Tree, rows: Any) -> tuple[Array, Array]:
        x0, noise, sigma, conditioning = rows
        variables, adapter = student.read(frozen, parameters)
        v = velocity(variables, adapter, interpolate(x0, noise, sigma), sigma, conditioning)
        losses = flow_matching(v, x0, noise)
        return losses.sum(), losses

    return groups.gradient(jax.grad(loss, has_aux=True), parameters, rows)


def make_flow_matching_step(
    velocity: Velocity,
    student: Student,
    groups: GradientGroups,
    levels: LogitNormal,
    optimizer: optax.GradientTransformation,
    ema: EMA,
    placed: Any = None,
    target: str = "data",
) -> Callable[[Tree, TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Flow matching of latents `batch["x0"]` under `batch["conditioning"]`, by full fine-tuning or by adapter.

    With target 'velocity' nothing is drawn: the batch holds states `x` at levels `sigma [B]`, and a teacher's
    velocities `v` there, which the network's are regressed on.

    `groups`: over which devices gradients are summed when. `placed`: shardings of the new state and of the metrics; as
    the state before them, or each step compiles anew.
    """

    def gradient(frozen: Tree, state: TrainState, batch: Any) -> tuple[Tree, Array]:
        """Gradient sum over samples, by group, and each sample's loss `[B]`; noise and level are the step's alone."""
        if target == "velocity":
            rows = batch["x"], batch["v"], batch["sigma"], batch["conditioning"]
            return groups.gradient(
                jax.grad(partial(matched, frozen), has_aux=True), student.compute(state.trained), rows
            )
        noise_key, level_key = jax.random.split(state.rng())
        x0 = batch["x0"]
        noise = jax.random.normal(noise_key, x0.shape)
        sigma = sample_levels(levels, level_key, x0.shape[0])
        rows = x0, noise, sigma, batch["conditioning"]
        return matching_gradient(velocity, student, groups, frozen, student.compute(state.trained), rows)

    def matched(frozen: Tree, parameters: Tree, rows: Any) -> tuple[Array, Array]:
        x, expected, sigma, conditioning = rows
        variables, adapter = student.read(frozen, parameters)
        losses = velocity_matching(velocity(variables, adapter, x, sigma, conditioning), expected)
        return losses.sum(), losses

    def step(frozen: Tree, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        with activation_rules(groups.mesh), jax.named_scope("flow_matching"):
            sums, losses = gradient(frozen, state, batch)
        loss, gradients = losses.mean(), jax.tree.map(lambda g: g / losses.size, groups.total(sums))
        state, norm, skipped = apply_if_finite(state, gradients, loss, optimizer)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped.astype(jnp.float32), "samples/loss": losses}
        return advance(state, ema, skipped), metrics

    return jax.jit(step, donate_argnums=1, out_shardings=placed)
