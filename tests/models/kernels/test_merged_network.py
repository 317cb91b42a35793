"""A whole network with merged attention against the same with plain attention: output, and gradients of an adapter.

Both compute in float32, in another order; MODULE_TOLERANCE is what other forms of one network are held to.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from tests.models.mmdit_oracle import MODULE_TOLERANCE, relative_error

SMALL = MMDiTConfig(
    depth=3, num_heads=3, head_dim=32, dual_layers=1, qk_norm=True, patch_size=2, channels=4, context_dim=24,
    pooled_dim=12, table_size=6, base_size=6,
)  # fmt: skip
ADAPTED = ("to_q", "to_k", "add_q_proj", "add_v_proj", "to_out")
BATCH, SIDE, TEXT, RANK, ADAPTERS = 2, 8, 11, 4, 2


@functools.cache
def _variables() -> Any:
    """Random everywhere: a network at its initialisation is the identity. An adapter bank on attentions' inputs."""
    rng = np.random.default_rng(0)

    def random(path: Any, leaf: Any) -> Any:
        one = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(one + rng.normal(0, 0.15, leaf.shape), jnp.float32)

    model = MMDiT(SMALL, scan_layers=False)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *_inputs()))
    params = jax.tree_util.tree_map_with_path(random, nn.unbox(variables["params"]))
    constants = jax.jit(model.init)(jax.random.key(0), *_inputs())["constants"]
    width = SMALL.width
    factors = {"a": jax.ShapeDtypeStruct((ADAPTERS, width, RANK), jnp.float32)}
    factors["b"] = jax.ShapeDtypeStruct((ADAPTERS, RANK, width), jnp.float32)
    shapes = {block: {"attn": dict.fromkeys(ADAPTED, factors)} for block in params if "block" in block}
    return {"params": params, "constants": constants}, jax.tree_util.tree_map_with_path(random, shapes)


def _inputs() -> tuple[Any, ...]:
    rng = np.random.default_rng(1)
    shapes = (
        (BATCH, SIDE, SIDE, SMALL.channels),
        (BATCH,),
        (BATCH, TEXT, SMALL.context_dim),
        (BATCH, SMALL.pooled_dim),
    )
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def _outcome(impl: Any) -> Any:
    """Output and the adapter's gradient, attentions kept from the forward, each sample with its own adapter."""
    variables, adapter = _variables()
    model = MMDiT(SMALL, impl, scan_layers=False, remat="attention")

    @jax.jit
    def outcome(adapter: Any, *inputs: Any) -> Any:
        def loss(adapter: Any) -> Any:
            out: Any = model.apply({**variables, "adapter": adapter}, *inputs, jnp.arange(BATCH))
            return jnp.square(out).sum(), out

        return jax.grad(loss, has_aux=True)(adapter)

    return outcome(adapter, *_inputs())


@pytest.mark.slow
def test_a_network_is_the_same():
    found, expected = map(_outcome, ("merged", "xla"))
    errors = jax.tree_util.tree_leaves_with_path(jax.tree.map(relative_error, found, expected))
    assert {jax.tree_util.keystr(path): error for path, error in errors if error > MODULE_TOLERANCE} == {}
