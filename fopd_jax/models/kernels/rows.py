"""Kernels over samples: each device runs them on its own rows of the batch."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

Results = Any


def by_rows(kernel: Callable[[Any, Any], Results], rows: Any, shared: Any = ()) -> Results:
    """`kernel(rows, shared)` on each device's own rows of the ambient mesh, `shared` whole on every device; trees both.

    Axis 0 of all results and of `rows` is the batch. Which mesh axes hold it is what Linen's logical rules say of
    `batch`; where they do not divide it, or where there are no rules, every device has all rows. Differentiate around
    it, not through it: a transposed map would add up what every device of a `tensor` axis has whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(rows, shared)
    (wished,) = nn.spmd.logical_to_mesh_axes(("batch",)) or (None,)
    spec = P(dividing(mesh, wished, jax.tree.leaves(rows)[0].shape[0]))
    # Every axis is manual: Pallas kernels are opaque to the partitioner, whatever the specs leave unsaid.
    return jax.shard_map(kernel, mesh=mesh, in_specs=(spec, P()), out_specs=spec, check_vma=False)(rows, shared)


def dividing(mesh: Any, axes: Any, size: int) -> Any:
    """Mesh axes, one name or several, or None where they do not divide a dimension."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return axes if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None


def split_over(axis: str | None) -> bool:
    """Whether a logical axis is split over devices of the ambient mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or axis is None:
        return False
    (axes,) = nn.spmd.logical_to_mesh_axes((axis,)) or (None,)
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names) > 1
