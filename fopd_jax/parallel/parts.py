"""Functions of many rows, computed in parts of one size by this process's own devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from fopd_jax.parallel.mesh import AXES
from fopd_jax.parallel.sharding import batch_sharding, batch_ways, filled

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
