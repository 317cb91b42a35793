"""Logical axes of parameters and activations → mesh axes, as data; and shardings of whole trees."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fopd_jax.parallel.mesh import AXES

Tree = Any
AnyMesh = Mesh | AbstractMesh
Rules = Sequence[tuple[str, str | None]]
RULES: Rules = (
    ("layers", None),  # scanned stacks: every device runs every layer
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("channels_in", None),  # the autoencoder is small: every device holds all of it
    ("channels_out", None),
)
_known: dict[str, str | None] = dict(RULES)
BATCH_AXES = ("data", "fsdp")
BATCH = P(BATCH_AXES)


def add_rules(rules: Rules) -> None:
    """Let parameters have further axes beside those of `RULES`: what a family of networks brings along.

    Raises:
      ValueError: there is no such mesh axis, or the name means another one already; then none is added.
    """
    for name, axis in rules:
        if axis not in (*AXES, None):
            raise ValueError(f"logical axis {name!r}: found mesh axis {axis!r}, expected None or one of {AXES}")
        if _known.get(name, axis) != axis:
            raise ValueError(f"logical axis {name!r}: found mesh axis {axis!r}, but it is {_known[name]!r} already")
    _known.update(rules)


@contextlib.contextmanager
def activation_rules(mesh: AnyMesh, batch: tuple[str, ...] = BATCH_AXES) -> Iterator[None]:
    """While tracing: activations are split over the mesh axes `batch` along their leading axis, kernels by the rules.

    Propagation alone may prefer to split activations as parameters are and to repeat whole matrix products instead.
    An axis of the batch's that is not in `batch` belongs to a mapped axis outside (see `gradients`): nothing is split
    over it, so that within a layer its kernel is whole along it.
    """
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    taken = set(BATCH_AXES) - set(batch)
    rules = [(name, None if axis in taken else axis) for name, axis in _known.items()]
    with jax.sharding.use_abstract_mesh(abstract), nn.logical_axis_rules((*rules, ("batch", batch))):
        yield


def parameter_shardings(mesh: AnyMesh, boxed: Tree) -> Tree:
    """Shardings of a tree whose leaves are boxed with logical axis names (arrays or shapes).

    A dimension that its mesh axes do not divide (a short vector, a small network) stays whole on every device.

    Raises:
      ValueError: an axis has a name without a rule.
    """
    logical = nn.get_partition_spec(boxed)
    unknown = {name for spec in jax.tree.leaves(logical) for name in spec} - {*_known, None}
    if unknown:
        raise ValueError(f"parameters' logical axes: found {sorted(unknown)}, expected some of {tuple(_known)}")
    specs = nn.spmd.logical_to_mesh(logical, tuple(_known.items()))
    return jax.tree.map(lambda leaf, spec: NamedSharding(mesh, _fit(mesh, leaf.shape, spec)), nn.unbox(boxed), specs)


def bank_shardings(mesh: AnyMesh, boxed_params: Tree, bank: Tree) -> Tree:
    """Shardings of an adapter bank `[*L, K, D_in, R]`, `[*L, K, R, D_out]`: each factor split as its kernel is there.

    `boxed_params`: the network's parameters, boxed with logical axis names; `bank`: arrays or shapes.
    """
    kernels: dict[tuple[str, ...], Any] = flatten_dict(parameter_shardings(mesh, boxed_params))
    factors: dict[tuple[str, ...], Any] = flatten_dict(bank)

    def place(path: tuple[str, ...], leaf: Any) -> NamedSharding:
        kernel = kernels[*path[:-1], "kernel"].spec
        d_in, d_out = (*kernel, None, None)[leaf.ndim - 3 : leaf.ndim - 1]
        lead = (None,) * (leaf.ndim - 2)
        return NamedSharding(mesh, P(*lead, d_in, None) if path[-1] == "a" else P(*lead, None, d_out))

    return unflatten_dict({path: place(path, leaf) for path, leaf in factors.items()})


def stacked_shardings(mesh: AnyMesh, boxed: Tree) -> Tree:
    """As `parameter_shardings`, for trees stacked along a new leading axis that no device splits."""
    return jax.tree.map(lambda each: NamedSharding(mesh, P(None, *each.spec)), parameter_shardings(mesh, boxed))


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


def check_width(width: int, mesh: AnyMesh) -> None:
    """Refuse a mesh that a network's kernels cannot be split over evenly.

    Raises:
      ValueError: names the field, its value and what it must divide.
    """
    for axis in ("fsdp", "tensor"):
        if width % mesh.shape[axis]:
            raise ValueError(
                f"run.mesh.{axis}: found {mesh.shape[axis]}, expected a divisor of the network's width {width}"
            )


def batch_ways(mesh: AnyMesh) -> int:
    """Into how many parts a batch is split."""
    return _length(mesh, BATCH_AXES)


def filled(size: int, ways: int) -> int:
    """The size of a batch that is filled up to go into `ways` equal parts, where surplus rows can be dropped."""
    return -(-size // ways) * ways


def check_batch(field: str, size: int, mesh: AnyMesh) -> None:
    """Refuse a training batch that cannot be split evenly: filled up, it would be another experiment.

    Raises:
      ValueError: names the field, its value and what it must be a multiple of.
    """
    ways = batch_ways(mesh)
    if size < 1 or size % ways:
        raise ValueError(f"{field}: found {size}, expected a multiple of {ways} (mesh axes data x fsdp)")


def check_parted(batch_size: int, parts: int, micro_batches: int, mesh: AnyMesh) -> None:
    """Refuse parts of a batch that cannot be split evenly, either.

    Raises:
      ValueError: names `run.micro_batches`, the parts' size and what has to divide it.
    """
    ways = batch_ways(mesh)
    if (batch_size // parts) % ways:
        raise ValueError(
            f"run.micro_batches: found {micro_batches}: parts of {batch_size // parts} samples, "
            f"which the mesh's {ways} batch ways do not divide"
        )
