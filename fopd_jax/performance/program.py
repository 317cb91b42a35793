"""A jitted program as it can be compiled for machines that are not there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fopd_jax.performance.bounds import Attention
from fopd_jax.performance.flops import NOTHING, Update


@dataclasses.dataclass(frozen=True)
class Calls:
    """How often a program is called in one step with input of one kind; `flops`: of one such call, all devices."""

    count: int
    flops: Update


def whole(calls: Mapping[str, Calls]) -> Update:
    """Of all calls together."""
    return sum((each.flops * each.count for each in calls.values()), NOTHING)


@dataclasses.dataclass(frozen=True)
class Program:
    """`step.lower(*arguments)` compiles it.

    `step`: the jitted callable. `arguments`: its arguments as shapes with dtypes and shardings. `flops`: of one step of
    training, all devices together. `calls`: by kind, where a step calls it more than once. `networks`: where several
    are asked, of each the FLOPs of one step, all devices together, and the bytes that one device holds of it.
    `attention`: of a forward of its network, where the family says so.
    """

    name: str
    step: Any
    arguments: tuple[Any, ...]
    flops: Update
    calls: Mapping[str, Calls] = dataclasses.field(default_factory=dict)
    networks: Mapping[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    attention: Attention | None = None
