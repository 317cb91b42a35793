"""The second family's arithmetic against XLA's own count, its layers unrolled; nothing is compiled.

XLA counts norms, softmax, rotations and the like as well, below a percent at this width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from fopd_jax.adapters.lora import adapter_shapes
from fopd_jax.backbones.record import Tokens
from fopd_jax.config.schema import LoRAConfig
from tests.backbones.rope_family import TARGETS, RopeDiT, RopeShape, attentions, flops

SHAPE = RopeShape(depth=3, num_heads=8, head_dim=128, patch_size=2, channels=16, text_dim=512)
LATENT, TOKENS = (32, 32, 16), Tokens(256, 64)
TOLERANCE = 0.01
SELF_AND_CROSS, ALL, ONE = (
    LoRAConfig(rank=64, targets=targets) for targets in (("self", "cross"), tuple(TARGETS), ("self",))
)


def _counted(remat: str, lora: LoRAConfig | None, wrap: Callable[[Callable[..., jax.Array]], Any]) -> float:
    """XLA's count for one sample of what `wrap` makes of `(params, adapter, …) → sum of v`."""
    model = RopeDiT(SHAPE, remat=remat, scan_layers=False)
    inputs = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in (LATENT, (), (TOKENS.text, SHAPE.text_dim))]
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    adapter = {} if lora is None else adapter_shapes(lora, params, TARGETS).weights

    def total(params: Any, adapter: Any, *inputs: jax.Array) -> jax.Array:
        v: Any = model.apply({"params": params, "adapter": adapter}, *inputs)
        return v.sum()

    cost: Any = jax.jit(wrap(total)).lower(params, adapter, *inputs).cost_analysis()
    return cost["flops"]


@pytest.mark.parametrize("lora", [None, ALL], ids=["base", "adapter"])
def test_a_forward(lora: LoRAConfig | None):
    found = _counted("none", lora, lambda f: f)
    assert flops(SHAPE, TOKENS, lora, "none").forward == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("lora", "remat"),
    [
        (None, "full"),
        (SELF_AND_CROSS, "full"),
        (SELF_AND_CROSS, "none"),
        (SELF_AND_CROSS, "attention"),
        (ALL, "full"),
        (ONE, "none"),
    ],
    ids=["network", "attentions", "attentions, all kept", "attentions kept", "all layers", "self-attention"],
)
def test_a_gradient_and_what_is_recomputed_for_it(lora: LoRAConfig | None, remat: str):
    """XLA's attention makes its scores again where outputs are kept, half of its products; a flash kernel does not."""
    found = _counted(remat, lora, lambda f: jax.value_and_grad(f, argnums=0 if lora is None else 1))
    scores = SHAPE.depth * sum(attentions(SHAPE, TOKENS).values()) / 2 if remat == "attention" else 0.0
    each = dataclasses.astuple(flops(SHAPE, TOKENS, lora, remat))
    assert sum(each) == pytest.approx(found - scores, rel=TOLERANCE)
