"""The families that there are, found by a preset's name or by a module."""

from typing import Any

import flax.linen as nn

from fopd_jax.backbones.record import Backbone, Shape
from fopd_jax.backbones.sd3.record import SD3

_FAMILIES: dict[str, Backbone] = {SD3.name: SD3}


def register(backbone: Backbone) -> None:
    """Make a family known.

    Raises:
      ValueError: one of its name, or with one of its presets, is known already.
    """
    taken = {backbone.name} & _FAMILIES.keys() | set(backbone.presets) & set(preset_names())
    if taken:
        raise ValueError(f"backbone {backbone.name!r}: {sorted(taken)} known already, expected names of its own")
    _FAMILIES[backbone.name] = backbone


def preset_names() -> tuple[str, ...]:
    """Every family's presets."""
    return tuple(name for family in _FAMILIES.values() for name in family.presets)


def find_preset(name: str) -> tuple[Backbone, Shape]:
    """A preset's family and shape.

    Raises:
      ValueError: there is no such preset; names those there are.
    """
    for family in _FAMILIES.values():
        if name in family.presets:
            return family, family.presets[name]
    raise ValueError(f"model.preset: found {name!r}, expected one of {preset_names()}")


def family_of(module: nn.Module | type[Any]) -> Backbone:
    """The family that a network is of.

    Raises:
      ValueError: none of the known ones.
    """
    kind = module if isinstance(module, type) else type(module)
    for family in _FAMILIES.values():
        if issubclass(kind, family.module):
            return family
    raise ValueError(f"found a network {kind.__name__}, expected one of the families {', '.join(_FAMILIES)}")
