"""Targets beyond the teachers, Σ α_k·(v_k + λ_k·(v_k - v_base)), each teacher and its base under the teacher's scale.

In float64 at 1e-12 of ‖a - b‖/‖b‖, against velocities that are computed one by one and summed term by term.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import Adapter, effective, stack_bank
from fopd_jax.policy.panel import AdapterPanel, Answer, RoutingTable
from fopd_jax.worlds.prompt_stream import Mix
from tests.steps.opd.network import SHAPE, adapter, check, make_velocity, prompts, variables

BATCH, TEACHERS, TOLERANCE = 4, ("a", "b", "c"), 1e-12
NARROW = variables()  # before anything is in float64


def widened(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(np.float64(leaf)), tree)


class Wide:
    """Everything in float64: states, prompts, three teachers, an anchor and the base as the bank's last entry."""

    sigma = 0.35

    def __init__(self) -> None:
        self.x = jnp.asarray(np.random.default_rng(0).standard_normal((BATCH, *SHAPE)))
        self.text, self.null = widened(prompts(1, BATCH)), widened(prompts(7, 1))
        each = [widened(adapter(20 * k + 20)) for k in range(4)]
        self.adapters: list[Adapter] = [*each, jax.tree.map(jnp.zeros_like, each[0])]
        self.variables = widened(NARROW)

    @functools.cached_property
    def said(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of every entry the velocities under the prompts and under the empty one."""
        empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (BATCH, *leaf.shape[1:])), self.null)
        found = []
        for each in self.adapters:
            forward = functools.partial(make_velocity(jnp.float64), self.variables, effective(each), self.x, self.sigma)
            found.append(tuple(np.asarray(forward(conditioning)) for conditioning in (self.text, empty)))
        return found

    def guided(self, entry: int, scale: float) -> np.ndarray:
        text, null = self.said[entry]
        return null + scale * (text - null)

    def ask(self, table: RoutingTable, mix: Mix | None, *, branches: bool = False) -> tuple[Answer, ...]:
        bank = stack_bank(dict(zip("abcde", self.adapters, strict=True)))
        panel = AdapterPanel(make_velocity(jnp.float64), table.guidance, self.variables, bank, self.null)
        route, sigma = jnp.asarray([1, 0, 2, 0], jnp.int32), jnp.asarray(self.sigma)
        return panel.ask(self.x, sigma, self.text, table.questions(route, mix=mix, sigma=sigma, branches=branches))


def table_of(scales: tuple[float, ...], extrapolation: tuple[float, ...]) -> RoutingTable:
    return RoutingTable(TEACHERS, (*scales, 2.0, 1.0), 3, extrapolation, 4)


def mix_of(weights: np.ndarray) -> Mix:
    return Mix(jnp.broadcast_to(jnp.arange(3), (BATCH, 3)), jnp.asarray(weights))


@pytest.mark.parametrize("seed", range(6))
def test_random_shares_scales_and_lambdas(seed: int) -> None:
    """Shares that change with the noise level, λ of both signs: one question to the base is exact."""
    rng = np.random.default_rng(seed)
    scales = tuple(map(float, rng.choice([1.0, 1.5, 3.0, 4.5, 7.0], 3)))
    extrapolation = tuple(map(float, rng.uniform(-1, 3, 3) * rng.integers(0, 2, 3)))
    extrapolation = extrapolation if any(extrapolation) else (0.0, 1.25, 0.0)
    weights = rng.dirichlet(np.ones(3), (BATCH, 2))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = Wide()
        teacher, anchor = wide.ask(table_of(scales, extrapolation), mix_of(weights))
        apart, _ = wide.ask(table_of(scales, extrapolation), mix_of(weights), branches=True)
        shares = (1 - wide.sigma) * weights[:, 0] + wide.sigma * weights[:, 1]
        expected, conditional, difference = np.zeros((3, BATCH, *SHAPE))
        base_text, base_null = wide.said[4]
        for k, (scale, beyond) in enumerate(zip(scales, extrapolation, strict=True)):
            share, (text, null) = shares[:, k, None, None, None], wide.said[k]
            expected += share * ((1 + beyond) * wide.guided(k, scale) - beyond * wide.guided(4, scale))
            conditional += share * (text + beyond * (text - base_text))
            difference += share * ((1 + beyond) * (text - null) - beyond * (base_text - base_null))
        check(teacher.velocity, expected, TOLERANCE)
        check(anchor.velocity, wide.guided(3, 2.0), TOLERANCE)
        check(apart.velocity, conditional, TOLERANCE)
        check(apart.difference, difference, TOLERANCE)


def test_each_samples_own_teacher_is_extrapolated_by_its_own_lambda() -> None:
    scales, extrapolation = (4.5, 1.0, 3.0), (0.25, -1.0, 0.0)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = Wide()
        teacher, _ = wide.ask(table_of(scales, extrapolation), None)
        for i, k in enumerate((1, 0, 2, 0)):
            own, base = wide.guided(k, scales[k])[i], wide.guided(4, scales[k])[i]
            check(teacher.velocity[i], own + extrapolation[k] * (own - base), TOLERANCE)
        check(teacher.velocity[0], wide.guided(4, 1.0)[0], TOLERANCE)  # λ = -1 is the base
        check(teacher.velocity[2], wide.guided(2, 3.0)[2], TOLERANCE)  # λ = 0 is the teacher


def test_lambdas_that_cancel_keep_what_their_scales_differ_by() -> None:
    """α·λ of 1/2 and -1/2 under scales 4.5 and 1: the base's difference of the branches is left, 3.5/2 times."""
    scales, weights = (4.5, 1.0, 3.0), np.broadcast_to([0.5, 0.5, 0.0], (BATCH, 2, 3))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = Wide()
        teacher, _ = wide.ask(table_of(scales, (1.0, -1.0, 0.0)), mix_of(weights))
        text, null = wide.said[4]
        check(teacher.velocity, wide.guided(0, 4.5) - 0.5 * 3.5 * (text - null), 1e-5)
