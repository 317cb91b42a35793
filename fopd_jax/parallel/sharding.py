"""Logical axes of parameters → mesh axes, as data; and shardings of whole trees."""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = Any
AnyMesh = Mesh | AbstractMesh
RULES: tuple[tuple[str, str | None], ...] = (
    ("layers", None),  # scanned stacks: every device runs every layer
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
)
BATCH = P(("data", "fsdp"))


def parameter_shardings(mesh: AnyMesh, boxed: Tree) -> Tree:
    """Shardings of a tree whose leaves are boxed with logical axis names (arrays or shapes).

    A dimension that its mesh axes do not divide (a short vector, a small network) stays whole on every device.
    """
    specs = nn.spmd.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    return jax.tree.map(lambda leaf, spec: NamedSharding(mesh, _fit(mesh, leaf.shape, spec)), nn.unbox(boxed), specs)


def _fit(mesh: AnyMesh, shape: tuple[int, ...], spec: P) -> P:
    return P(*(axis if axis is None or size % _length(mesh, axis) == 0 else None for size, axis in zip(shape, spec)))  # noqa: B905 - trailing dimensions without an axis are whole


def _length(mesh: AnyMesh, axis: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """The leading axis over all devices that hold different samples."""
    return NamedSharding(mesh, BATCH)


def check_batch(field: str, size: int, mesh: AnyMesh) -> None:
    """Refuse a batch that cannot be split evenly; nothing is ever padded silently.

    Raises:
      ValueError: names the field, its value and what it must be a multiple of.
    """
    ways = _length(mesh, ("data", "fsdp"))
    if size < 1 or size % ways:
        raise ValueError(f"{field}: found {size}, expected a multiple of {ways} (mesh axes data x fsdp)")
