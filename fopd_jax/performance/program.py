"""A jitted program as it can be compiled for machines that are not there."""

import dataclasses
from typing import Any

from fopd_jax.performance.flops import Update


@dataclasses.dataclass(frozen=True)
class Program:
    """`step.lower(*arguments)` compiles it.

    `step`: the jitted callable. `arguments`: its arguments as shapes with dtypes and shardings. `flops`: of one call,
    all devices together.
    """

    name: str
    step: Any
    arguments: tuple[Any, ...]
    flops: Update
