"""What the tests of the OPD update share: a two-layer network that reads adapters, routes and prompts as the real one.

Tolerances on ‖a - b‖/‖b‖, float32: 1e-5 between two programs that compute the same gradient. `test_torch.py` has the
true network.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from fopd_jax.adapters.lora import Adapter, stack_bank
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import Objective
from fopd_jax.flow.rollout import noise_window
from fopd_jax.flow.schedule import Level, flow_match_sigmas
from fopd_jax.flow.transition import SDE, Transition
from fopd_jax.models.dense import Dense
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.state import TrainState, init_state
from fopd_jax.worlds.prompt_stream import Batch

TOLERANCE = 1e-5
STEPS, BATCH, SHAPE, WIDTH, RANK, CONTEXT, POOLED = 5, 3, (4, 4, 3), 16, 2, 6, 5  # 4 trained steps, unlike the batch
SIGMAS = flow_match_sigmas(STEPS)
TEACHERS = ("ocr", "counting")
GUIDED, PLAIN = (4.5, (4.5, 1.0, 2.0)), (1.0, (1.0, 1.0, 1.0))
ALWAYS, WINDOW = np.ones(STEPS, bool), noise_window(STEPS, 1, 3)
SGD = optax.sgd(0.1)
DIRECT, CLIPPED = Objective("direct", mar_beta=0.3), Objective(mar_beta=0.3)


class Network(nn.Module):
    """A velocity of state, noise level and prompt; `up` and `down` may carry adapters."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, sigma: Any, conditioning: Conditioning, route: Any) -> Any:
        tokens = rearrange(x, "B h w c -> B (h w) c")
        prompt = Dense(WIDTH, dtype=self.dtype, name="pooled")(conditioning.pooled)
        prompt = prompt + Dense(WIDTH, dtype=self.dtype, name="context")(conditioning.context.mean(1))
        hidden = Dense(WIDTH, dtype=self.dtype, name="up")(tokens, route) + (prompt + sigma[:, None])[:, None]
        v = Dense(SHAPE[-1], dtype=self.dtype, name="down")(jnp.tanh(hidden), route)
        return rearrange(v, "B (h w) c -> B h w c", h=x.shape[1])


def make_velocity(dtype: Any = jnp.float32, rows: list[int] | None = None) -> Callable[..., Any]:
    """The package's contract for a velocity; appends the rows of every traced call to `rows`."""

    def velocity(variables: Any, adapter: Any, x: Any, sigma: Any, conditioning: Any, route: Any = None) -> Any:
        if rows is not None:
            rows.append(x.shape[0])
        sigma = jnp.broadcast_to(sigma, x.shape[:1])
        return Network(dtype).apply({**variables, "adapter": adapter}, x, sigma, conditioning, route)

    return velocity


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def prompts(seed: int, batch: int) -> Conditioning:
    return Conditioning(normal(seed, batch, 4, CONTEXT), normal(seed + 100, batch, POOLED))


def adapter(seed: int) -> Adapter:
    """Both factors non-zero; of an effect on the velocity comparable to the base's."""
    sizes = {"up": (SHAPE[-1], WIDTH), "down": (WIDTH, SHAPE[-1])}
    weights = {
        name: {"a": 0.5 * normal(seed + k, d_in, RANK), "b": 0.5 * normal(seed + k + 10, RANK, d_out)}
        for k, (name, (d_in, d_out)) in enumerate(sizes.items())
    }
    return jax.tree.map(jnp.asarray, Adapter(weights, 0.5))


STUDENT, BANK = adapter(0), {"ocr": adapter(20), "counting": adapter(40), "anchor": adapter(60)}


@functools.cache
def variables() -> Any:
    x, conditioning = jnp.zeros((1, *SHAPE)), jax.tree.map(jnp.asarray, prompts(0, 1))
    return nn.unbox(Network().init(jax.random.key(0), x, jnp.zeros(1), conditioning, None))


def frozen_of(bank: dict[str, Adapter]) -> Frozen:
    return Frozen(variables(), stack_bank(bank), jax.tree.map(jnp.asarray, prompts(7, 1)))


def make_batch(size: int = BATCH, seed: int = 1) -> Batch:
    """Numpy leaves, as the prompt stream's; both teachers occur."""
    return Batch(prompts(seed, size), np.arange(seed, seed + size) % len(TEACHERS))


def make_spec(
    objective: Objective,
    transition: Transition | None = None,
    guidance: tuple[float, tuple[float, ...]] = GUIDED,
    **fields: Any,
) -> OPDSpec:
    spec = OPDSpec(objective, transition or SDE(0.7), SIGMAS, ALWAYS, SHAPE, TEACHERS, *guidance)
    return dataclasses.replace(spec, **fields)


def make_pieces(spec: OPDSpec, rows: list[int] | None = None) -> Pieces:
    return Pieces(spec, make_velocity(rows=rows))


def make_state(student: Adapter = STUDENT, seed: int = 5) -> TrainState:
    return init_state(student, SGD, seed)


def quick(function: Any, *bound: Any) -> Any:
    """Jitted, its first arguments given."""
    return jax.jit(partial(function, *bound))


@functools.cache
def fused(objective: str) -> Any:
    """The jitted gradients of `DIRECT` or `CLIPPED`, by name, compiled once for the tests of a file."""
    return quick(fused_gradients, make_pieces(make_spec({"direct": DIRECT, "clipped": CLIPPED}[objective])))


def level(noisy: bool) -> Level:
    return Level(jnp.float32(0.7), jnp.float32(0.55), jnp.asarray(noisy))


def relative_error(found: Any, expected: Any) -> float:
    a, b = (np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)]) for tree in (found, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    error = relative_error(found, expected)
    print(f"relative error {error:.1e}")
    assert error <= tolerance


def scaled_sum(trees: list[Any], weights: Any) -> Any:
    return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *trees)
