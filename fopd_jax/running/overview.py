"""What trains and what is frozen: a few lines to read at the start, and every array in a file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from fopd_jax.console import say
from fopd_jax.files import write_text
from fopd_jax.policy.velocity import Tree

FILE = "parameters.txt"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclasses.dataclass(frozen=True)
class Part:
    """Arrays that belong together: jax's, sharded or not, numpy's, or shapes. `stacks`: show its stacks of layers."""

    name: str
    tree: Tree
    stacks: bool = False


def write_overview(workdir: Path, title: str, parts: Sequence[Part]) -> None:
    """Print the overview, and write every array of every part to `parameters.txt` unless that is there."""
    say(overview(title, parts))
    path = workdir / FILE
    if path.exists():
        return
    write_text(path, "\n\n".join(f"{part.name}\n{_table(part.tree)}" for part in parts) + "\n")


def overview(title: str, parts: Sequence[Part]) -> str:
    """A line a part and a stack of layers: parameters, bytes in all and on one device, dtypes; then their sum."""
    rows = [(title, "parameters", "bytes", "a device", "")]
    for part in parts:
        rows.append(_row(part.name, part.tree))
        rows += [_row(f"  {name}", tree) for name, tree in (_entries(part.tree) if part.stacks else {}).items()]
    rows.append(_row("in all", [part.tree for part in parts]))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        f"{name:<{widths[0]}}  {count:>{widths[1]}}  {size:>{widths[2]}}  {here:>{widths[3]}}  {dtypes}".rstrip()
        for name, count, size, here, dtypes in rows
    )


def _row(name: str, tree: Tree) -> tuple[str, str, str, str, str]:
    leaves = jax.tree.leaves(tree)
    size = sum(_bytes(leaf, leaf.shape) for leaf in leaves)
    here = sum(_bytes(leaf, _shard(leaf)) for leaf in leaves)
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    return name, f"{sum(_size(leaf.shape) for leaf in leaves):,}", _human(size), _human(here), ", ".join(dtypes)


def _entries(tree: Mapping[str, Tree]) -> dict[str, Tree]:
    """Stacks of layers by `name ×length`, then all else together."""
    stacks = {f"{name} ×{length}": tree[name] for name in tree if (length := _length(tree[name])) > 1}
    rest = {name: tree[name] for name in tree if _length(tree[name]) <= 1}
    if not stacks or not rest:
        return stacks
    name = next(iter(rest)) if len(rest) == 1 else f"{len(rest)} more"
    return stacks | {name: rest}


def _length(tree: Tree) -> int:
    """Of the leading axis, where all arrays share one that is no feature's: a bias would have but that; else 1."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
    lengths = {shape[0] if len(shape) > 1 else 1 for shape in shapes}
    return lengths.pop() if len(lengths) == 1 and len(shapes) > 1 else 1


def _bytes(leaf: Any, shape: tuple[int, ...]) -> int:
    return _size(shape) * leaf.dtype.itemsize


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _shard(leaf: Any) -> tuple[int, ...]:
    """Shape of what one device holds."""
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def _human(size: int) -> str:
    unit = min(max(size.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{size / 1024**unit:.{0 if unit == 0 else 2}f} {_UNITS[unit]}"


def _table(tree: Tree) -> str:
    shapes: dict[str, Any] = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return parameter_overview.get_parameter_overview(shapes, include_stats=False)
