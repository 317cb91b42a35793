"""LoRA adapters as trees: initialise, scale, stack into a bank (Hu et al. 2021, arXiv 2106.09685).

An adapter's weights mirror the network's parameter tree: at each targeted dense layer stands `{"a": [*L, D_in, R],
"b": [*L, R, D_out]}`, with the leading layer axis L in scanned stacks. The update is ΔW = scale·a·b, scale = alpha/R.
A bank stacks K adapters on the axis before the matrices, `[*L, K, D_in, R]`; the network gathers from it by `route`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from jaxtyping import Array, PRNGKeyArray

from fopd_jax.config.schema import LoRAConfig
from fopd_jax.models.coordinates import LAYER

Tree = Any
Layer = Mapping[str, Array | np.ndarray]  # "a" and "b"; files give NumPy's arrays


@struct.dataclass
class Adapter:
    """Low-rank weights and their static scale."""

    weights: Tree
    scale: float = struct.field(pytree_node=False)


Groups = Mapping[str, tuple[str, ...]]
"""A family's target groups: the last two parts of their layers' paths, `attn/to_q`."""


def target_kernels(params: Tree, targets: Sequence[str], groups: Groups) -> dict[tuple[str, ...], Any]:
    """The kernels (arrays or shapes) of all layers in the target groups, by module path.

    Raises:
      ValueError: there is no such group, or no target at all.
    """
    if not targets or not set(targets) <= set(groups):
        raise ValueError(f"adapter.targets: found {tuple(targets)}, expected some of {tuple(groups)}")
    suffixes = [tuple(name.split("/")) for group in targets for name in groups[group]]
    return {
        path[:-1]: leaf
        for path, leaf in traverse_util.flatten_dict(params).items()
        if path[-1] == "kernel" and path[-3:-1] in suffixes
    }


def init_adapter(key: PRNGKeyArray, params: Tree, config: LoRAConfig, groups: Groups) -> Adapter:
    """PEFT's `init_lora_weights="gaussian"`: a ~ N(0, 1/R²), b = 0, so that the adapted network starts as the base.

    `params` may hold arrays or shapes, scanned or not; `groups`: the network's family's, see `Backbone.targets`.
    """
    kernels = target_kernels(params, config.targets, groups)
    keys = jax.random.split(key, len(kernels))
    weights = {}
    for layer_key, (path, kernel) in zip(keys, sorted(kernels.items()), strict=True):
        *layers, d_in, d_out = kernel.shape
        a = jax.random.normal(layer_key, (*layers, d_in, config.rank), jnp.float32) / config.rank
        weights[path] = {"a": a, "b": jnp.zeros((*layers, config.rank, d_out), jnp.float32)}
    return Adapter(traverse_util.unflatten_dict(weights), config.scale)


def adapter_shapes(config: LoRAConfig, params: Tree, groups: Groups) -> Any:
    """Shapes of a fresh adapter on a network's parameters (arrays or shapes)."""
    return jax.eval_shape(lambda: init_adapter(jax.random.key(0), params, config, groups))


def effective(adapter: Adapter) -> Tree:
    """The tree that the network reads: `b` multiplied by the scale."""
    return map_layers(lambda layer: {"a": layer["a"], "b": layer["b"] * adapter.scale}, adapter.weights)


def zeros_like(adapter: Adapter) -> Adapter:
    """The adapter of the same shape that leaves the base as it is."""
    return Adapter(jax.tree.map(jnp.zeros_like, adapter.weights), adapter.scale)


def stack_bank(adapters: Mapping[str, Adapter]) -> Tree:
    """Effective weights of K adapters in one tree, in the mapping's order, ready for `route`.

    Raises:
      ValueError: an adapter differs from the first in a layer or a shape (its rank, say); names adapter and layer.
    """
    first_name, first = next(iter(adapters.items()))
    for name, adapter in adapters.items():
        check_like(f"adapter {name!r}", adapter.weights, repr(first_name), first.weights)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=-3), *(effective(each) for each in adapters.values()))


def conform(name: str, adapter: Adapter, layers: Tree, rank: int) -> Adapter:
    """The same update on all of `layers` (shapes of an adapter's weights) and at `rank`: what is missing becomes zeros.

    Raises:
      ValueError: the adapter's rank is larger, or it adapts a layer that is not in `layers` or has another shape.
    """
    there: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(adapter.weights)
    wanted: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(layers)
    for path, leaf in there.items():
        axis, spelled = _rank_axis(path), "/".join(path)
        found = tuple(size for i, size in enumerate(leaf.shape) if i != leaf.ndim + axis)
        if path not in wanted:
            raise ValueError(f"adapter {name!r} adapts {spelled}, but adapter.targets leaves that layer out")
        expected = tuple(size for i, size in enumerate(wanted[path].shape) if i != leaf.ndim + axis)
        if found != expected or leaf.shape[axis] > rank:
            raise ValueError(
                f"adapter {name!r} at {spelled}: found shape {leaf.shape}, expected {expected} and a rank up to {rank}"
            )

    def pad(path: tuple[str, ...], shape: tuple[int, ...]) -> Array:
        axis = _rank_axis(path)
        full = tuple(rank if i == len(shape) + axis else size for i, size in enumerate(shape))
        if path not in there:
            return jnp.zeros(full, jnp.float32)
        leaf = jnp.asarray(there[path])
        return jnp.pad(leaf, [(0, want - have) for want, have in zip(full, leaf.shape, strict=True)])

    weights = {path: pad(path, leaf.shape) for path, leaf in wanted.items()}
    return Adapter(traverse_util.unflatten_dict(weights), adapter.scale)


def revive(key: PRNGKeyArray, adapter: Adapter) -> Adapter:
    """The same update, but trainable everywhere: a component that is zero in both factors gets a fresh `a`.

    Neither factor of such a component would ever see a gradient; merges leave them in layers that no teacher adapts.
    """
    weights: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(adapter.weights)
    layers = sorted(path[:-1] for path in weights if path[-1] == "a")
    for layer_key, path in zip(jax.random.split(key, len(layers)), layers, strict=True):
        a, b = weights[*path, "a"], weights[*path, "b"]
        dead = ~(a.any(axis=-2) | b.any(axis=-1))  # [*L, R]
        fresh = jax.random.normal(layer_key, a.shape, a.dtype) / a.shape[-1]
        weights[*path, "a"] = jnp.where(jnp.expand_dims(dead, -2), fresh, a)
    return Adapter(traverse_util.unflatten_dict(weights), adapter.scale)


def is_zero(adapter: Adapter) -> bool:
    """Whether every layer has a factor that is zero, so that the base stays as it is."""
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(adapter.weights)
    live = {path: bool(np.any(leaf)) for path, leaf in leaves.items()}
    return not any(live[*path[:-1], "a"] and live[*path[:-1], "b"] for path in live)


def rank_of(adapter: Adapter) -> int:
    """The largest rank of an adapter's layers, coordinates apart, which are no update of a matrix."""
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(adapter.weights)
    return max(leaf.shape[_rank_axis(path)] for path, leaf in leaves.items() if path[0] != LAYER)


def _rank_axis(path: tuple[str, ...]) -> int:
    return -1 if path[-1] == "a" else -2


def check_like(name: str, found: Tree, reference_name: str, reference: Tree) -> None:
    """Refuse a tree whose leaves or shapes differ from a reference (arrays or shapes).

    Raises:
      ValueError: names the first leaf that is missing, extra or of another shape.
    """
    shapes, expected = _shapes(found), _shapes(reference)
    for path in sorted(shapes.keys() | expected.keys()):
        if shapes.get(path) != expected.get(path):
            raise ValueError(
                f"{name} does not match {reference_name} at {path}: "
                f"found {shapes.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
            )


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    leaves: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def delta(adapter: Adapter) -> Tree:
    """Dense updates ΔW = scale·a·b by module path; for small networks and tests."""
    return map_layers(lambda layer: product(adapter.scale * layer["a"], layer["b"]), adapter.weights)


def product(left: Array | np.ndarray, right: Array | np.ndarray) -> Array:
    """A product of matrices in float32 as it is meant: at the default precision accelerators round its inputs."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def map_layers(function: Any, *trees: Tree) -> Tree:
    """Map over `{"a", "b"}` pairs instead of single leaves."""
    return jax.tree.map(function, *trees, is_leaf=lambda node: isinstance(node, dict) and "a" in node)
