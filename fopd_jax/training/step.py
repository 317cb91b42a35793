"""The jitted update of each stage: `step(state, batch) → (state, metrics)`, pure, state donated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fopd_jax.objectives.flow_matching import LogitNormal, flow_matching, interpolate
from fopd_jax.policy import Tree, Velocity
from fopd_jax.training.state import EMA, TrainState, advance, apply_gradients

Assemble = Callable[[Tree, Tree], tuple[Tree, Tree]]
"""`(frozen, trained) → (variables, adapter)`: what the network reads, whichever part of it trains."""


def make_flow_matching_step(
    velocity: Velocity,
    assemble: Assemble,
    levels: LogitNormal,
    optimizer: optax.GradientTransformation,
    ema: EMA,
    placed: jax.sharding.Sharding | None = None,
) -> Callable[[Tree, TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Flow matching of images `batch["x0"]` under `batch["conditioning"]`, by full fine-tuning or by adapter.

    `placed`: where the new state and the metrics live; as the state before them, or each step compiles anew.
    """

    def step(frozen: Tree, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        noise_key, level_key = jax.random.split(state.rng())
        x0 = batch["x0"]
        noise = jax.random.normal(noise_key, x0.shape)
        sigma = levels.sample(level_key, x0.shape[0])

        def loss_fn(trained: Tree) -> jax.Array:
            variables, adapter = assemble(frozen, trained)
            v = velocity(variables, adapter, interpolate(x0, noise, sigma), sigma, batch["conditioning"])
            return flow_matching(v, x0, noise).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(state.trained)
        state, norm = apply_gradients(state, gradients, optimizer)
        return advance(state, ema), {"loss": loss, "grad_norm": jnp.asarray(norm)}

    return jax.jit(step, donate_argnums=1, out_shardings=placed)
