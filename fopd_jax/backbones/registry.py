"""The families that there are, found by a preset's name, by a module, or by what others call it."""

from typing import Any

import flax.linen as nn

from fopd_jax.backbones.record import Backbone, Shape
from fopd_jax.backbones.sd3.record import SD3
from fopd_jax.parallel.sharding import add_rules

_FAMILIES: dict[str, Backbone] = {SD3.name: SD3}


def register(backbone: Backbone) -> None:
    """Make a family known.

    Raises:
      ValueError: one of its name, or with one of its presets, is known already; or one of its rules is wrong.
    """
    taken = {backbone.name} & _FAMILIES.keys() | set(backbone.presets) & set(preset_names())
    if taken:
        raise ValueError(f"backbone {backbone.name!r}: {sorted(taken)} known already, expected names of its own")
    add_rules(backbone.rules)
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


def family_of_class(name: str) -> Backbone:
    """The family whose published networks are of a class, as a converted folder's manifest names it.

    Raises:
      ValueError: none is; names those there are.
    """
    classes = {family.files.class_name: family for family in _FAMILIES.values() if family.files is not None}
    if name not in classes:
        raise ValueError(f"found a transformer {name!r}, expected one of {', '.join(classes)}")
    return classes[name]
