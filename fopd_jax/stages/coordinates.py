"""Capability coordinates in a config: what they go with, how they are drawn, and those that are chosen for use."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from fopd_jax.adapters.coordinates import coordinates_of, placed_at, with_coordinates
from fopd_jax.adapters.lora import Adapter
from fopd_jax.backbones.registry import family_of
from fopd_jax.config.schema import OPD, Config, Evaluation
from fopd_jax.config.stages import is_mixed, taught
from fopd_jax.models.coordinates import LAYER
from fopd_jax.policy.coordinates import DrawnCoordinates
from fopd_jax.policy.velocity import Tree

DIALS = "eval.coordinates"


def skills(config: Config) -> tuple[str, ...]:
    """The names of a student's coordinates: its tasks, in the bank's order; none where it has none."""
    return taught(config) if isinstance(config, OPD) and config.coordinates.rank else ()


def check_coordinates(config: Config) -> None:
    """Refuse coordinates with what they do not go with, and their choice where there are none.

    Raises:
      ValueError: names the field.
    """
    if not isinstance(config, OPD) or not skills(config):
        _refuse_choice(config.eval)
        return
    chosen(skills(config), config.eval)
    ours, least = config.coordinates, "coordinates.rank: found {}, expected 0: {}"
    if config.trained != "adapter":
        raise ValueError(least.format(ours.rank, "they belong to an adapter, and trained is 'params'"))
    if config.whole_teachers:
        raise ValueError(least.format(ours.rank, "whole_teachers hold no base to ask beside them"))
    if is_mixed(config):
        raise ValueError(least.format(ours.rank, "the rewards of objective 'mixed' know one way to be good"))
    if config.routing.method != "hard" or config.routing.wrong:
        raise ValueError(least.format(ours.rank, "coordinates say who teaches, not section routing"))
    for name, task in config.tasks.items():
        for field in ("extrapolation", "mix", "noisy_mix"):
            if found := getattr(task, field):
                instead = "coordinates say who teaches (coordinates.rank is not 0)"
                raise ValueError(f"tasks.{name}.{field}: found {found}, expected {type(found)()}: {instead}")
    if (shares := ours.alone + ours.joint + ours.base) > 1:
        raise ValueError(f"coordinates.alone, joint and base: found {shares:g} in all, expected shares of 1")


def _refuse_choice(evaluation: Evaluation) -> None:
    if evaluation.coordinates:
        raise ValueError(f"{DIALS}: found {dict(evaluation.coordinates)}, expected {{}}: what trains has none")


def drawn_coordinates(config: OPD) -> DrawnCoordinates | None:
    """Those of the training prompts; the base is the bank's last entry, behind teachers and anchor."""
    if not (names := skills(config)):
        return None
    return DrawnCoordinates(names, config.coordinates, config.seed, len(names) + 1)


def fitted(config: Config, adapter: Adapter, model: Any) -> Adapter:
    """A fresh or merged adapter with the coordinates that a config gives it.

    Raises:
      ValueError: the network reads none.
    """
    if not (names := skills(config)):
        return adapter
    assert isinstance(config, OPD)
    family = family_of(model)
    if family.coordinates is None:
        raise ValueError(f"coordinates.rank: found {config.coordinates.rank}, expected 0: {family.name} reads none")
    key, ours = jax.random.key(config.seed), config.coordinates
    return with_coordinates(key, adapter, len(names), ours.rank, model.config.width)


def chosen(names: Sequence[str], evaluation: Evaluation) -> Float[np.ndarray, " k"]:
    """What an evaluation is made at, by the names of an adapter's skills.

    Raises:
      ValueError: as `coordinates_of`.
    """
    return coordinates_of(names, evaluation.coordinates, DIALS)


def turned(names: Sequence[str], evaluation: Evaluation, adapter: Tree) -> Tree:
    """An effective adapter at those coordinates; one without any as it is."""
    return placed_at(adapter, chosen(names, evaluation)) if LAYER in adapter else adapter
