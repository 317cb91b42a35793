"""Adapter trees ↔ single adapted modules under diffusers' names, which is what every published LoRA file holds.

Our tree stacks the layers of a scan and stores [in, out]; published files hold one pair of factors a module, [out, in].
Which modules can be adapted, and their features, come from the network itself.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fopd_jax.adapters.coordinates import WITHOUT, skills_of
from fopd_jax.adapters.lora import Adapter, target_kernels
from fopd_jax.interop.sd3.diffusers import module_names
from fopd_jax.interop.sd3.network import TARGETS, parameter_shapes
from fopd_jax.models.mmdit import MMDiTConfig


@dataclasses.dataclass(frozen=True)
class LoRAModule:
    """One adapted linear layer: ΔW = scale·b·a with a [R, D_in] and b [D_out, R], float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a module's kernel stands in our tree: `tree[path][index]`, of a leaf of `shape` [*L, D_in, D_out]."""

    path: tuple[str, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]

    def factor_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tree's leaves: a [*L, D_in, R] and b [*L, R, D_out]."""
        *layers, d_in, d_out = self.shape
        return {"a": (*layers, d_in, rank), "b": (*layers, rank, d_out)}


@functools.lru_cache(maxsize=8)
def places(config: MMDiTConfig) -> Mapping[str, Place]:
    """Every module that an adapter may have (`TARGETS`), by diffusers' name."""
    names, found = module_names(config), {}
    for path, kernel in target_kernels(parameter_shapes(config), tuple(TARGETS), TARGETS).items():
        for index in np.ndindex(kernel.shape[:-2]):
            ours = "/".join(("_".join([path[0], *map(str, index)]), *path[1:]))
            found[names[ours]] = Place(path, index, kernel.shape)
    return found


def find_place(name: str, config: MMDiTConfig) -> Place:
    """Look a module up by diffusers' name.

    Raises:
      ValueError: the network has no such module, or it has it but no adapter can be routed there.
    """
    if name in places(config):
        return places(config)[name]
    if name in module_names(config).values():
        groups = ", ".join(target for group in TARGETS.values() for target in group)
        raise ValueError(f"module {name!r}: found an adapter, but a bank can only route {groups} of the blocks")
    raise ValueError(
        f"module {name!r}: no such module in a network of {config.depth} blocks, {config.dual_layers} of them dual"
    )


def adapter_from_modules(modules: Mapping[str, LoRAModule], config: MMDiTConfig) -> Adapter:
    """Stack modules (names of `places`, at least one) into an adapter of one rank and one scale.

    The rank is the largest; smaller ones are padded with zeros. The scale is the most frequent one, of equally frequent
    ones the largest; another module's b is multiplied by the ratio of its scale to that, rounded once. Layers that are
    not adapted get zeros in stacks that are adapted elsewhere. So scale·b·a is exact where the ratio of scales is a
    power of two, 1 included, short of under- and overflow; elsewhere b has one more rounding to float32.
    """
    rank = max(module.a.shape[0] for module in modules.values())
    scales = collections.Counter(module.scale for module in modules.values())
    scale = max(scales, key=lambda value: (scales[value], value))
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for name, module in modules.items():
        place, own_rank = find_place(name, config), module.a.shape[0]
        for leaf, shape in place.factor_shapes(rank).items():
            leaves.setdefault((*place.path, leaf), np.zeros(shape, np.float32))
        leaves[*place.path, "a"][place.index][:, :own_rank] = module.a.T
        leaves[*place.path, "b"][place.index][:own_rank] = module.b.T * np.float64(module.scale / scale)
    return Adapter(unflatten_dict(leaves), scale)


def modules_from_adapter(adapter: Adapter, config: MMDiTConfig) -> dict[str, LoRAModule]:
    """The modules of an adapter, those that are zero included.

    Raises:
      ValueError: a leaf is missing, superfluous, misshapen or not finite; the ranks differ or are 0; or the scale is 0
        or not finite. Names the leaf, what was found and what would be right. Or there are coordinates.
    """
    if skills_of(adapter):
        raise ValueError(f"adapter: cannot be written for others: {WITHOUT}")
    leaves: dict[tuple[str, ...], np.ndarray] = {
        path: np.asarray(leaf).astype(np.float32)
        for path, leaf in flatten_dict(jax.device_get(adapter.weights)).items()
    }
    if not leaves:
        raise ValueError("adapter: found no weights, expected at least one module")
    if not np.isfinite(adapter.scale) or adapter.scale == 0:
        raise ValueError(f"adapter scale: found {adapter.scale}, expected a finite number other than 0")
    stacks = {place.path: place for place in places(config).values()}
    rank = next((leaf.shape[-1] for path, leaf in leaves.items() if path[-1] == "a" and leaf.ndim), 0)
    expected = {
        (*path, leaf): shape
        for path in {path[:-1] for path in leaves}
        for leaf, shape in (stacks[path].factor_shapes(rank) if path in stacks else {}).items()
    }
    _check_leaves(leaves, expected)
    if rank == 0:
        raise ValueError("adapter rank: found 0, expected at least 1")
    return {
        name: LoRAModule(
            a=leaves[*place.path, "a"][place.index].T,
            b=leaves[*place.path, "b"][place.index].T,
            scale=float(adapter.scale),
        )
        for name, place in places(config).items()
        if (*place.path, "a") in leaves
    }


def _check_leaves(
    leaves: Mapping[tuple[str, ...], np.ndarray], expected: Mapping[tuple[str, ...], tuple[int, ...]]
) -> None:
    for path in sorted(leaves.keys() | expected.keys()):
        found = leaves[path].shape if path in leaves else "nothing"
        if found != expected.get(path):
            raise ValueError(
                f"adapter leaf {'/'.join(path)!r}: found {found}, expected {expected.get(path, 'nothing')}"
            )
        if not np.isfinite(leaves[path]).all():
            raise ValueError(f"adapter leaf {'/'.join(path)!r}: found a number that is not finite")
