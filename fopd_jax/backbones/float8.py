"""Frozen networks in float8: kernels of dense layers with a float32 scale per output channel.

`e4m3` has 3 bits of mantissa and no infinities: a number between 2⁻⁶ and 448 is rounded by at most 2⁻⁴ of itself.
Every output channel is scaled so that its largest weight is 448. The product of a layer is multiplied by the scales, so
that no scaled kernel is ever made (`models.dense.Dense`); biases, norms and what is no parameter stay as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

Tree = Any
Path = tuple[str, ...]
FLOAT8 = "float8_e4m3"
DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0


def rounded(kernel: Float[Array, "*l i o"]) -> tuple[Array, Float[Array, "*l o"]]:
    """A kernel's float8 numbers and their scales; a channel of zeros has the scale 1."""
    wide = kernel.astype(jnp.float32)
    most = jnp.abs(wide).max(-2)
    scales = jnp.where(most == 0, 1.0, most / LARGEST)
    return (wide / scales[..., None, :]).astype(DTYPE), scales


def to_float8(variables: Tree) -> Tree:
    """A network's variables with their kernels in float8 and the collection `scales`; everything stays in its shards.

    One kernel at a time, whose wider form is given up.
    """
    params: dict[Path, Any] = flatten_dict(variables["params"])
    scales: dict[Path, Any] = {}
    for path in [path for path in params if path[-1] == "kernel"]:
        place = getattr(params[path], "sharding", None)
        if isinstance(place, NamedSharding):
            round_one = jax.jit(rounded, out_shardings=(place, scale_sharding(place, params[path].ndim)))
        else:
            round_one = jax.jit(rounded)
        params[path], scales[path] = round_one(params.pop(path))
    return {**variables, "params": unflatten_dict(params), "scales": unflatten_dict(scales)}


def float8_shapes(variables: Tree) -> Tree:
    """The same of shapes with shardings."""
    params: dict[Path, Any] = flatten_dict(variables["params"])
    scales: dict[Path, Any] = {}
    for path, leaf in list(params.items()):
        if path[-1] == "kernel":
            place, shape = scale_sharding(leaf.sharding, len(leaf.shape)), (*leaf.shape[:-2], leaf.shape[-1])
            params[path] = jax.ShapeDtypeStruct(leaf.shape, DTYPE, sharding=leaf.sharding)
            scales[path] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    return {**variables, "params": unflatten_dict(params), "scales": unflatten_dict(scales)}


def scale_sharding(kernel: NamedSharding, ndim: int) -> NamedSharding:
    """Where a kernel's scales are: with its output channels."""
    *lead, _, d_out = (*kernel.spec, *(None,) * (ndim - len(kernel.spec)))
    return NamedSharding(kernel.mesh, P(*lead, d_out))
