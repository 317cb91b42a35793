"""An update to be compiled or measured, whatever config it came from: its program, shapes and arithmetic."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from fopd_jax.performance.flops import Update
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.opd.spec import Batch, Frozen
from fopd_jax.steps.opd.step import OPDStep

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AbstractUpdate:
    """`step.lower(*arguments)` compiles it: `arguments` are `(frozen, state, batch)` as shapes with shardings.

    `model`: the network. `pieces`: what the step is made of.
    """

    step: Any
    arguments: tuple[Frozen, Tree, Batch]
    model: Any
    pieces: OPDStep


@dataclasses.dataclass(frozen=True)
class Problem:
    """An update as shapes on a mesh, its analytic FLOPs on all chips together, and `about`: what it computes."""

    mesh: Mesh
    update: AbstractUpdate
    flops: Update
    about: Fields

    @property
    def samples(self) -> int:
        """Of one update."""
        return self.update.arguments[2].route.shape[0]
