"""Coordinates in the update: the true network's gradient against PyTorch's, and who sees what.

Tolerances, float32 against float64: 1e-4 on the loss, and on ‖a - b‖/‖b‖ over all gradients and over the layer's own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from fopd_jax.adapters.lora import Adapter, stack_bank, zeros_like
from fopd_jax.config.schema import Objective
from fopd_jax.flow.transition import SDE
from fopd_jax.models.coordinates import LAYER
from fopd_jax.models.mmdit import MMDiT, convert_layers
from fopd_jax.policy.velocity import branches, make_velocity
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.replay import loss_and_gradient
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.visits import Stored
from fopd_jax.worlds.prompt_stream import Batch, Mix
from tests.steps.opd.test_torch import (
    BATCH,
    CONFIG,
    EVERYWHERE,
    GUIDANCE,
    LORA,
    ROUTE,
    SHAPE,
    SIGMAS,
    TEACHER_GUIDANCE,
    TEACHERS,
    TOLERANCE,
    A,
    adapted,
    adapter,
    distance,
    normal,
    oracle,
    our_variables,
    prompts,
    sde,
    to_torch,
    torch_factors,
    torch_velocity,
)

T, BASE = 1, 3  # the trained timestep; the base's place behind two teachers and the anchor
AT = np.asarray([[0.0, 1.0], [1.25, 0.5], [0.25, 0.0]], np.float32)
WEIGHTS = np.concatenate([AT, 1 - AT.sum(1, keepdims=True)], axis=1)
X = normal(77, 1, BATCH, *SHAPE)


@functools.cache
def student() -> Adapter:
    own = adapter(1)
    layer = {"a": jnp.asarray(normal(5, 2, 4)), "b": jnp.asarray(0.3 * normal(6, 4, CONFIG.width))}
    return Adapter({**own.weights, LAYER: layer}, own.scale)


def mix() -> Mix:
    bank = np.broadcast_to(np.asarray([0, 1, BASE], np.int32), WEIGHTS.shape)
    return jax.tree.map(jnp.asarray, Mix(bank, np.repeat(WEIGHTS[:, None], 2, axis=1)))


def frozen() -> Frozen:
    teachers = {"ocr": adapter(2), "counting": adapter(3), "anchor": adapter(4)}
    return Frozen(our_variables(), stack_bank({**teachers, "base": zeros_like(adapter(2))}), prompts(902, 1))


def ours() -> tuple[Any, Adapter, Any]:
    """Loss, gradient and sums at one given state."""
    objective = Objective("direct", mar_beta=0.0)
    spec = OPDSpec(objective, SDE(A), SIGMAS, EVERYWHERE, SHAPE, TEACHERS, GUIDANCE, TEACHER_GUIDANCE)
    spec = dataclasses.replace(spec, trained=(T, T + 1), asks_base=True)
    spec.check(BATCH)
    pieces = Pieces(spec, make_velocity(MMDiT(CONFIG)))
    batch = Batch(prompts(900, BATCH), jnp.asarray(ROUTE), mix(), coordinates=jnp.asarray(AT))
    stored = Stored(jnp.asarray(X), jnp.asarray(X), jnp.zeros((1, BATCH)))
    return jax.jit(functools.partial(loss_and_gradient, pieces))(frozen(), student(), batch, stored)


def pytorchs() -> tuple[float, dict[str, Any]]:
    """The same: the base's pooled embedding is added to by a hook; the base is under each sample's teacher's scale."""
    factors = torch_factors(student().weights, requires_grad=True)
    lora = {name: leaf for name, leaf in factors.items() if not name.startswith(LAYER)}
    x, sigma, text = to_torch(X[0]), float(SIGMAS[T]), prompts(900, BATCH)
    with torch.no_grad():
        scales = [TEACHER_GUIDANCE[k] for k in ROUTE]
        nothing: Any = dict(oracle().state_dict())
        asked = [
            torch_velocity(adapted(torch_factors(adapter(seed).weights)), x, sigma, text, scale)
            for seed, scale in zip((2, 3), TEACHER_GUIDANCE, strict=False)
        ]
        asked.append(torch.stack([torch_velocity(nothing, x, sigma, text, s)[i] for i, s in enumerate(scales)]))
        shares = to_torch(WEIGHTS.T)[..., None, None, None]
        target = (shares * torch.stack(asked)).sum(0)
    hidden = torch.nn.functional.silu(to_torch(AT) @ factors[f"{LAYER}/a"])
    added = LORA.alpha / LORA.rank * hidden @ factors[f"{LAYER}/b"]
    hook = oracle().time_text_embed.register_forward_hook(lambda *seen: seen[-1] + added)
    try:
        v = torch_velocity(adapted(lora), x, sigma, text, GUIDANCE)
    finally:
        hook.remove()
    _, c, std = sde(sigma, float(SIGMAS[T + 1]))
    loss = ((c * (v - target)) ** 2).mean((1, 2, 3)).mean() / (2 * std**2)
    gradients = torch.autograd.grad(loss, list(factors.values()), materialize_grads=True)
    return float(loss.detach()), dict(zip(factors, (g.numpy() for g in gradients), strict=True))


def test_loss_and_gradient_are_pytorchs():
    found, gradients, _ = ours()
    loss, expected = pytorchs()
    assert float(found) == pytest.approx(loss, rel=TOLERANCE)
    flat: dict[str, Any] = flatten_dict(convert_layers(gradients.weights, scan=False), sep="/")
    assert flat.keys() == expected.keys()
    for ending in ("", f"{LAYER}/a", f"{LAYER}/b"):
        names = [name for name in expected if name.startswith(ending)]
        each = [np.concatenate([np.float64(tree[name]).ravel() for name in names]) for tree in (flat, expected)]
        print(f"{ending or 'all'}: {distance(*each):.1e}")
        assert distance(*each) <= TOLERANCE


def test_both_branches_of_guidance_are_under_a_samples_own_coordinates():
    seen: list[Any] = []

    def velocity(*arguments: Any) -> jax.Array:
        seen.append(arguments[4])
        return arguments[2]

    text = dataclasses.replace(prompts(900, BATCH), coordinates=jnp.asarray(AT))
    branches(velocity, {}, {}, jnp.asarray(X[0]), jnp.float32(0.5), text, prompts(902, 1))
    np.testing.assert_array_equal(seen[0].coordinates, np.repeat(AT, 2, axis=0))


def test_the_student_alone_sees_them():
    batch = Batch(prompts(900, BATCH), jnp.asarray(ROUTE), mix(), coordinates=jnp.asarray(AT))
    assert batch.conditioning.coordinates is None
    np.testing.assert_array_equal(batch.student.coordinates, AT)
    plain = Batch(prompts(900, BATCH), jnp.asarray(ROUTE))
    assert plain.student is plain.conditioning


def test_an_adapter_without_them_cannot_be_turned():
    velocity, text = make_velocity(MMDiT(CONFIG)), dataclasses.replace(prompts(900, BATCH), coordinates=jnp.asarray(AT))
    with pytest.raises(ValueError, match="found some for an adapter that has none"):
        velocity(our_variables(), {}, jnp.asarray(X[0]), jnp.float32(0.5), text)
