"""Blocks and networks with kernels against the same without: output, and gradients of an adapter.

Float32: MODULE_TOLERANCE, what other forms of one network are held to. bfloat16: against the plain network in float32
the kernels may be 1.25 times as far off as the plain one in bfloat16 is; they round less often, but elsewhere.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.models.mmdit import Block, MMDiT, MMDiTConfig
from tests.models.mmdit_oracle import MODULE_TOLERANCE, relative_error

SMALL = MMDiTConfig(
    depth=3, num_heads=4, head_dim=32, dual_layers=1, qk_norm=True, patch_size=2, channels=4, context_dim=24,
    pooled_dim=12, table_size=6, base_size=6,
)  # fmt: skip
ADAPTED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out")
BATCH, SIDE, TEXT, RANK, ADAPTERS = 2, 8, 11, 4, 2


def random(seed: int, shapes: Any, scale: float = 0.15) -> Any:
    """Random everywhere, norms' scales about 1: a network at its initialisation is the identity."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        one = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(one + rng.normal(0, scale, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def shaped(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("dual", [False, True], ids=["plain", "dual"])
def test_a_block_is_the_same(dual: bool):
    """In float32, with gradients of its streams and of its embedding."""
    inputs = random(1, ((shaped(BATCH, 20, 128), shaped(BATCH, TEXT, 128)), shaped(BATCH, 128)), 1.0)
    blocks = {name: Block(SMALL, "xla", dual=dual, kernels=name) for name in ("xla", "pallas")}
    variables = jax.eval_shape(lambda: nn.unbox(blocks["xla"].init(jax.random.key(0), *inputs, None)))
    params = random(0, variables["params"])

    def outcome(name: str) -> Any:
        def loss(*inputs: Any) -> Any:
            streams, _ = blocks[name].apply({"params": params}, *inputs, None)
            return sum(jnp.square(stream).sum() for stream in streams), streams

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*inputs)

    errors = jax.tree.map(relative_error, outcome("pallas"), outcome("xla"))
    assert max(jax.tree.leaves(errors)) <= MODULE_TOLERANCE, errors


@functools.cache
def _network() -> Any:
    """Inputs, variables, and an adapter bank."""
    inputs = random(1, (shaped(BATCH, SIDE, SIDE, 4), shaped(BATCH), shaped(BATCH, TEXT, 24), shaped(BATCH, 12)), 1.0)
    model = MMDiT(SMALL, scan_layers=False)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), *inputs))
    factors = {"a": shaped(ADAPTERS, 128, RANK), "b": shaped(ADAPTERS, RANK, 128)}
    shapes = {block: {"attn": dict.fromkeys(ADAPTED, factors)} for block in variables["params"] if "block" in block}
    params = random(0, variables["params"], 0.05)
    return inputs, {"params": params, "constants": variables["constants"]}, random(2, shapes)


def _outcome(impl: Any, kernels: Any, dtype: Any) -> Any:
    """Output and the adapter's gradient, attentions kept from the forward, each sample with its own adapter."""
    inputs, variables, adapter = _network()
    model = MMDiT(SMALL, impl, dtype, scan_layers=False, remat="attention", kernels=kernels)

    @jax.jit
    def outcome(adapter: Any, *inputs: Any) -> Any:
        def loss(adapter: Any) -> Any:
            out: Any = model.apply({**variables, "adapter": adapter}, *inputs, jnp.arange(BATCH))
            return jnp.square(out).sum(), out

        return jax.grad(loss, has_aux=True)(adapter)

    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention mixes dtypes while it is lowered
        return outcome(adapter, *inputs)


@pytest.mark.slow
def test_a_network_in_bfloat16_is_as_close_as_without_kernels():
    exact = _outcome("xla", "xla", jnp.float32)
    found, plain = (
        jax.tree.map(relative_error, _outcome(*choice, jnp.bfloat16), exact)
        for choice in (("merged", "pallas"), ("xla", "xla"))
    )
    means = [float(np.mean(jax.tree.leaves(tree))) for tree in (found, plain)]
    assert means[0] <= 1.25 * means[1], (found, plain)
