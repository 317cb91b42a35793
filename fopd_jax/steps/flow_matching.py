"""The jitted update of each stage: `step(state, batch) → (state, metrics)`, pure, state donated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fopd_jax.config.schema import EMA, LogitNormal
from fopd_jax.objectives.flow_matching import flow_matching, interpolate, sample_levels
from fopd_jax.parallel.sharding import activation_rules
from fopd_jax.policy.velocity import Tree, Velocity
from fopd_jax.steps.state import TrainState, advance, apply_if_finite
from fopd_jax.steps.student import Student


def make_flow_matching_step(
    velocity: Velocity,
    student: Student,
    levels: LogitNormal,
    optimizer: optax.GradientTransformation,
    ema: EMA,
    mesh: Mesh,
    placed: Any = None,
) -> Callable[[Tree, TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Flow matching of images `batch["x0"]` under `batch["conditioning"]`, by full fine-tuning or by adapter.

    `placed`: where the new state and the metrics live; as the state before them, or each step compiles anew.
    """

    def step(frozen: Tree, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        noise_key, level_key = jax.random.split(state.rng())
        x0 = batch["x0"]
        noise = jax.random.normal(noise_key, x0.shape)
        sigma = sample_levels(levels, level_key, x0.shape[0])

        def loss_fn(trained: Tree) -> tuple[jax.Array, jax.Array]:
            variables, adapter = student.policy(frozen, trained)
            with activation_rules(mesh):
                v = velocity(variables, adapter, interpolate(x0, noise, sigma), sigma, batch["conditioning"])
            losses = flow_matching(v, x0, noise)
            return losses.mean(), losses

        (loss, losses), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
        state, norm, skipped = apply_if_finite(state, gradients, loss, optimizer)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped.astype(jnp.float32), "samples/loss": losses}
        return advance(state, ema, skipped), metrics

    return jax.jit(step, donate_argnums=1, out_shardings=placed)
