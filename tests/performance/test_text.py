"""Text encoders: the formula against XLA's own count of unrolled layers, and the published encoders' program as shapes.

XLA counts norms, softmax and the rest as well: at a width of 512 that is below 3%.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.config.schema import MeshShape
from fopd_jax.models import clip, t5
from fopd_jax.models.clip import CLIPTextConfig
from fopd_jax.models.t5 import T5Config
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.performance.text import clip_flops, encode_flops, encode_program, t5_flops

TOLERANCE = 0.03
T5 = T5Config(
    vocab_size=100, width=512, depth=3, num_heads=6, head_dim=64, mlp_dim=1280, num_buckets=32, max_distance=128,
    rms_norm_eps=1e-6,
)  # fmt: skip
CLIP = CLIPTextConfig(
    vocab_size=100, width=512, depth=3, num_heads=8, mlp_dim=1536, max_length=77, projection_dim=256,
    activation="gelu", layer_norm_eps=1e-5, eos_token_id=2,
)  # fmt: skip


class UnrolledT5(nn.Module):
    """T5's layers one after the other; its embedding multiplies nothing."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bias = t5.RelativePositionBias(T5)(x.shape[1])
        for _ in range(T5.depth):
            x, _ = t5.Layer(T5)(x, bias)
        return x


class UnrolledCLIP(nn.Module):
    """The tower's layers one after the other, and its projection."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = x
        for _ in range(CLIP.depth):
            (x, hidden), _ = clip.Layer(CLIP)((x, hidden))
        return hidden, nn.Dense(CLIP.projection_dim, use_bias=False)(x[:, 0])


def _counted(network: nn.Module, length: int) -> float:
    """XLA's count for one text; nothing is compiled."""
    x = jax.ShapeDtypeStruct((1, length, 512), jnp.float32)
    variables = nn.unbox(jax.eval_shape(network.init, jax.random.key(0), x))
    cost: Any = jax.jit(network.apply).lower(variables, x).cost_analysis()
    return cost["flops"]


@pytest.mark.parametrize("length", [40, 256])
def test_t5(length: int):
    assert t5_flops(T5, length) == pytest.approx(_counted(UnrolledT5(), length), rel=TOLERANCE)


@pytest.mark.parametrize("length", [20, 77])
def test_a_tower_of_clip(length: int):
    assert clip_flops(CLIP, length) == pytest.approx(_counted(UnrolledCLIP(), length), rel=TOLERANCE)


def test_layers_count_alike():
    deeper = dataclasses.replace(T5, depth=12)
    assert t5_flops(deeper, 40) == 4 * t5_flops(T5, 40)


def test_the_published_encoders_have_their_published_sizes():
    """0.124, 0.695 and 4.76 billion parameters; two FLOPs a token and parameter that is no embedding, and attention."""
    program = encode_program(make_mesh(MeshShape()), 8, 128, 4096)
    params, tokens = program.arguments
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in params]
    np.testing.assert_allclose(counts, [0.1237e9, 0.6947e9, 4.762e9], rtol=1e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert [leaf.shape for leaf in tokens.ids] == [(8, 77), (8, 77), (8, 128)]
    assert program.flops.model == 8 * encode_flops(128)
    embeddings = 77 * (768 + 1280) + 49408 * (768 + 1280) + 32128 * 4096
    towers = 2 * 77 * (sum(counts[:2]) - 49408 * (768 + 1280) - 77 * (768 + 1280))
    assert encode_flops(128) == pytest.approx(towers + 2 * 128 * (counts[2] - 32128 * 4096), rel=0.03)
    assert embeddings < 0.05 * sum(counts)


_COMPILED = """
import json, sys
from fopd_jax.parallel.mesh import MeshShape, make_mesh
from fopd_jax.performance.compilation import memory_of
from fopd_jax.performance.text import encode_program
from fopd_jax.performance.topology import configure, parse_topology, topology_devices
topology = parse_topology("v5e:4x4")
configure(topology)
program = encode_program(make_mesh(MeshShape(), topology_devices(topology)), 64, 128, 4096)
memory = memory_of(program.step.lower(*program.arguments).compile().memory_analysis())
print(json.dumps([memory.arguments, memory.total]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu-aot")
def test_the_tpus_compiler_splits_them_over_all_chips():
    """11.2 GB of parameters on 16 chips under pure data parallelism: 0.65 GiB each, and little besides."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arguments, total = json.loads(done.stdout.splitlines()[-1])
    whole = 2 * (0.1237e9 + 0.6947e9 + 4.762e9) / 16
    assert whole < arguments < 1.05 * whole
    assert total < 1.5 * whole
