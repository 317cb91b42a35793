"""Kernels in float8: rounding within the format's bound, the same products, and velocities that are near.

e4m3 rounds to within ε = 2⁻⁴ of a number, uniformly within that: ε/√3 in the mean square at most. A layer's output sums
independent errors, so its relative error is that at most, and a residual network of few layers adds fewer than it has:
a velocity may be off by 2ε.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fopd_jax.backbones.float8 import DTYPE, LARGEST, float8_shapes, rounded, to_float8
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.schema import MeshShape
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import parameter_shardings
from fopd_jax.stages.trained import place

EPSILON = 2.0**-4
SHAPE = MMDiTConfig(
    depth=6, num_heads=4, head_dim=32, dual_layers=2, qk_norm=True, patch_size=2, channels=4,
    context_dim=64, pooled_dim=48, table_size=8, base_size=8,
)  # fmt: skip
LATENT = (8, 8, 4)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def weights(seed: int = 0) -> Any:
    """Variance 1/fan-in, gates open, everything else near what training leaves."""
    shapes: dict[str, Any] = flatten_dict(nn.unbox(boxed_variables(MMDiT(SHAPE), LATENT)), sep="/")
    drawn = {}
    for k, (path, leaf) in enumerate(shapes.items()):
        scale = leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.1
        drawn[path] = jnp.asarray(scale * normal(seed + k, *leaf.shape) + float(path.endswith("scale")))
    return unflatten_dict(drawn, sep="/")


def velocity(variables: Any, dtype: Any) -> np.ndarray:
    inputs = (
        normal(1, 4, *LATENT),
        np.array([900.0, 500.0, 300.0, 50.0], np.float32),
        normal(2, 4, 6, 64),
        normal(3, 4, 48),
    )
    apply: Any = jax.jit(MMDiT(SHAPE, dtype=dtype).apply)
    return np.float64(apply(variables, *map(jnp.asarray, inputs)))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_kernel_is_rounded_within_the_formats_bound() -> None:
    kernel = normal(0, 3, 64, 32) * np.exp(3 * normal(1, 3, 1, 32))
    kernel[1, :, 5] = 0
    eight, scales = rounded(jnp.asarray(kernel))
    assert (eight.dtype, eight.shape, scales.shape) == (DTYPE, kernel.shape, (3, 32))
    back = np.float32(eight) * np.asarray(scales)[:, None, :]
    smallest = np.asarray(scales)[:, None, :] * 2.0**-6  # below it numbers are a fixed step apart
    assert (np.abs(back - kernel) <= EPSILON * np.maximum(np.abs(kernel), smallest)).all()
    np.testing.assert_allclose(np.abs(np.float32(eight)).max(-2)[scales != 1.0], LARGEST)
    assert (np.asarray(scales)[1, 5], np.abs(back[1, :, 5]).max()) == (1.0, 0.0)


def test_scales_are_a_factor_of_each_channels_product() -> None:
    """A network of rounded kernels in float32 says what the one in float8 says, to rounding of float32."""
    variables = weights()
    eight = to_float8(variables)
    scales: dict[Any, Any] = flatten_dict(eight["scales"])
    params: dict[Any, Any] = flatten_dict(eight["params"])
    wide = {k: v.astype(jnp.float32) * scales[k][..., None, :] if k in scales else v for k, v in params.items()}
    plain = {"params": unflatten_dict(wide), "constants": variables["constants"]}
    assert error(velocity(eight, jnp.float32), velocity(plain, jnp.float32)) <= 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_velocity_is_near(dtype: Any) -> None:
    variables = weights()
    exact = velocity(variables, jnp.float32)
    half = {**variables, "params": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])}
    off, bf16 = error(velocity(to_float8(half), dtype), exact), error(velocity(half, dtype), exact)
    print(f"float8 {off:.4f}, bfloat16 weights {bf16:.4f}, computed in {jnp.dtype(dtype)}")
    assert bf16 < off <= 2 * EPSILON


def test_shapes_and_places_are_those_of_the_real_one() -> None:
    mesh, boxed = make_mesh(MeshShape(), jax.devices()[:1]), boxed_variables(MMDiT(SHAPE), LATENT)
    shapes = place(nn.unbox(boxed), parameter_shardings(mesh, boxed))
    placed = jax.device_put(weights(), parameter_shardings(mesh, boxed))
    found, expected = float8_shapes(shapes), to_float8(placed)
    describe = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.spec)  # noqa: E731
    assert jax.tree.map(describe, found) == jax.tree.map(describe, expected)
