"""Name tables: which tensor of a published checkpoint becomes which of our parameters, and in which layout.

A `Component` describes one network of a pipeline as data. Everything that reads or writes such checkpoints (whole state
dicts, streams of tensors, the way back) goes through `Assembler` and `to_tensors`, so that each network needs a table
and nothing else. Arrays are numpy's, of any floating dtype; paths join the keys of the parameter tree by "/".
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

Shape = tuple[int, ...]
SAME = "... -> ..."
LINEAR = "o i -> i o"
CONVOLUTION = "o i h w -> h w i o"
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor that a parameter comes from, and the einops pattern that brings it into our layout.

    `sizes` holds the lengths of axes that the pattern joins, which the way back needs: `(("p", 2), ("q", 2))`.
    """

    name: str
    pattern: str = SAME
    sizes: tuple[tuple[str, int], ...] = ()

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter; a view wherever numpy can give one."""
        return rearrange(tensor, self.pattern)

    def to_theirs(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor, inverse of `to_ours`."""
        ours, theirs = reversed(self.pattern.split("->"))
        return rearrange(leaf, f"{ours} -> {theirs}", **dict(self.sizes))

    def shape(self, ours: Shape) -> Shape:
        """Shape of the tensor for a parameter's shape."""
        return self.to_theirs(np.broadcast_to(np.float32(0), ours)).shape


@dataclasses.dataclass(frozen=True)
class Component:
    """One network: its parameters, and the tensor that each of them comes from.

    `shapes`: parameter path → shape as the network reads it, scanned layers stacked on a leading axis.
    `sources`: parameter path in per-layer form (`layers_3/…` for the fourth layer of the stack `layers`) → its tensor.
    `stacks`: the top-level modules that are scanned. `kept`: tensors that a checkpoint must hold and that are no
    parameters (a fixed table). `unused`: regular expressions for tensors that it may hold besides and that nothing
    reads. `config`: the network's own configuration.
    """

    config: Any
    shapes: Mapping[str, Shape]
    sources: Mapping[str, Source]
    stacks: tuple[str, ...] = ()
    kept: Mapping[str, Shape] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def locate(self, path: str) -> tuple[str, int | None]:
        """As the function, for its own stacks."""
        return locate(path, self.stacks)

    def tensor_shapes(self) -> dict[str, Shape]:
        """Every tensor that a checkpoint must hold → its shape there."""
        parameters = {source.name: source.shape(self._layer_shape(path)) for path, source in self.sources.items()}
        return parameters | dict(self.kept)

    def is_unused(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.unused)

    def _layer_shape(self, path: str) -> Shape:
        stacked, layer = self.locate(path)
        return self.shapes[stacked] if layer is None else self.shapes[stacked][1:]


def locate(path: str, stacks: Sequence[str]) -> tuple[str, int | None]:
    """Per-layer path → (stacked path, layer), or (path, None) outside of stacks."""
    head, _, rest = path.partition("/")
    stack, _, layer = head.rpartition("_")
    return (f"{stack}/{rest}", int(layer)) if stack in stacks and layer.isdigit() else (path, None)


def parameter_shapes(init: Callable[..., Any], *inputs: Any) -> dict[str, Shape]:
    """Path → shape of the parameters that a Linen module's `init` makes, without computing anything."""
    variables = jax.eval_shape(init, jax.random.key(0), *inputs)
    leaves: dict[str, Any] = flatten_dict(nn.unbox(variables["params"]), sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def check_names(found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str = "tensor") -> None:
    """Refuse the first name that only one side has, or whose shapes differ.

    Raises:
      ValueError: names it, with the shape found and the one expected.
    """
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{what} {name!r}: missing, expected shape {shape}")
    for name, shape in found.items():
        if name not in expected:
            raise ValueError(f"{what} {name!r}: found shape {shape}, expected no such {what}")
        if shape != expected[name]:
            raise ValueError(f"{what} {name!r}: found shape {shape}, expected {expected[name]}")


class Assembler:
    """Collects tensors, in any order, into the parameter tree; holds one copy of the parameters and nothing else.

    The component's `kept` tensors are no parameters and are left to the caller.
    """

    def __init__(self, component: Component, dtype: Any = None) -> None:
        """`dtype`: of the parameters; by default each takes that of its (first) tensor."""
        self._component, self._dtype = component, dtype
        self._paths = {source.name: path for path, source in component.sources.items()}
        self._leaves: dict[str, np.ndarray] = {}

    def place(self, name: str, tensor: np.ndarray) -> None:
        """Copy one tensor into its parameter; the caller may reuse the tensor's memory."""
        component, path = self._component, self._paths[name]
        stacked, layer = component.locate(path)
        if stacked not in self._leaves:
            self._leaves[stacked] = aligned_empty(component.shapes[stacked], self._dtype or tensor.dtype)
        leaf = self._leaves[stacked]
        leaf[... if layer is None else layer] = component.sources[path].to_ours(tensor)

    def tree(self) -> dict[str, Any]:
        return unflatten_dict(self._leaves, sep="/")


def from_tensors(component: Component, tensors: Mapping[str, np.ndarray], dtype: Any = None) -> dict[str, Any]:
    """The parameter tree from a whole state dict; every tensor is used exactly once or known to be unused.

    Raises:
      ValueError: a tensor is missing, superfluous or misshapen.
    """
    used = {name: tensor for name, tensor in tensors.items() if not component.is_unused(name)}
    check_names({name: tensor.shape for name, tensor in used.items()}, component.tensor_shapes())
    assembler = Assembler(component, dtype)
    for name, tensor in used.items():
        if name not in component.kept:
            assembler.place(name, tensor)
    return assembler.tree()


def aligned_empty(shape: Shape, dtype: Any) -> np.ndarray:
    """`np.empty` at a multiple of 64 bytes, which JAX's CPU backend takes over without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def stream_tensors(component: Component, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The state dict of a parameter tree, boxed or not, one contiguous copy of a layer at a time.

    Raises:
      ValueError: a parameter is missing, superfluous or misshapen.
    """
    leaves: dict[str, Any] = flatten_dict(nn.unbox(params), sep="/")
    check_names({path: leaf.shape for path, leaf in leaves.items()}, component.shapes, "parameter")
    for path, source in component.sources.items():
        stacked, layer = component.locate(path)
        leaf = np.asarray(leaves[stacked] if layer is None else leaves[stacked][layer])
        yield source.name, np.ascontiguousarray(source.to_theirs(leaf))


def to_tensors(component: Component, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The whole state dict of a parameter tree; see `stream_tensors`."""
    return dict(stream_tensors(component, params))
