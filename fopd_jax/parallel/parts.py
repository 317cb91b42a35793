"""Functions of many rows, computed in parts of one size: from the host, or within a program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fopd_jax.parallel.mesh import AXES
from fopd_jax.parallel.sharding import BATCH_AXES, AnyMesh, batch_sharding, batch_ways, filled

Tree = Any


def own_mesh() -> Mesh:
    """A mesh of this process's devices, over which rows are spread and parameters are whole."""
    return Mesh(np.array(jax.local_devices()).reshape(-1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def at_once(mesh: Mesh, rows: int) -> int:
    """So many rows a device; on a CPU, which gains nothing by several and would compute what fills them up, one."""
    return batch_ways(mesh) * (1 if jax.default_backend() == "cpu" else rows)


def in_parts(function: Callable[..., Tree], arrays: Tree, mesh: Mesh, rows: int = 1) -> Tree:
    """`function(arrays)` as numpy, a tree of arrays `[n, …]` to one of arrays `[n, …]`, so many rows at once.

    `rows` are filled up to what `mesh` divides; the last part is filled up with zeros, its surplus dropped: a jitted
    function is compiled once, whatever n is.

    Raises:
      ValueError: there are no rows.
    """
    count, size = len(jax.tree.leaves(arrays)[0]), filled(rows, batch_ways(mesh))
    if count == 0:
        raise ValueError("in_parts: found no rows, expected at least one")
    results = []
    for start in range(0, count, size):
        kept = min(size, count - start)

        def part(leaf: np.ndarray, start: int = start, kept: int = kept) -> np.ndarray:
            return np.pad(leaf[start : start + kept], ((0, size - kept), *((0, 0),) * (leaf.ndim - 1)))

        made = function(jax.device_put(jax.tree.map(part, arrays), batch_sharding(mesh)))
        results.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[:kept], made))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)


def in_chunks(function: Callable[[Tree], Tree], arrays: Tree, mesh: AnyMesh, rows: int = 1) -> Tree:
    """`function(arrays)` within a program, some `rows` a device at a time: memory is one chunk's, not the batch's.

    From a tree of arrays `[n, …]`, split over `mesh` as batches are, to one of arrays `[n, …]`; each device computes
    its own rows. Chunks are made equal, and the last one is filled up with zeros.

    Raises:
      ValueError: the mesh does not divide n.
    """
    count, ways = len(jax.tree.leaves(arrays)[0]), batch_ways(mesh)
    if count % ways:
        raise ValueError(f"in_chunks: found {count} rows, expected a multiple of {ways}, the mesh's parts of a batch")
    held = count // ways
    chunks = -(-held // rows)
    size = -(-held // chunks)
    if chunks == 1:
        return function(arrays)

    def split(leaf: jax.Array) -> jax.Array:
        leaf = _placed(leaf.reshape(ways, held, *leaf.shape[1:]), mesh, P(BATCH_AXES))
        leaf = jnp.pad(leaf, ((0, 0), (0, chunks * size - held), *((0, 0),) * (leaf.ndim - 2)))
        leaf = jnp.moveaxis(leaf.reshape(ways, chunks, size, *leaf.shape[2:]), 1, 0)
        return _placed(leaf.reshape(chunks, ways * size, *leaf.shape[3:]), mesh, P(None, BATCH_AXES))

    def join(leaf: jax.Array) -> jax.Array:
        leaf = jnp.moveaxis(leaf.reshape(chunks, ways, size, *leaf.shape[2:]), 0, 1)
        leaf = leaf.reshape(ways, chunks * size, *leaf.shape[3:])[:, :held]
        return _placed(leaf.reshape(count, *leaf.shape[2:]), mesh, P(BATCH_AXES))

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, arrays)))


def _placed(leaf: jax.Array, mesh: AnyMesh, spec: P) -> jax.Array:
    return leaf if mesh.size == 1 else jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))
