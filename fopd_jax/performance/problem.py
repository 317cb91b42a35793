"""An update to be compiled or measured, whatever config it came from: its program, shapes and arithmetic."""

import dataclasses
from typing import Any

import optax
from jax.sharding import Mesh

from fopd_jax.config.schema import EMA
from fopd_jax.performance.flops import Update
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.worlds.prompt_stream import Batch

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AbstractUpdate:
    """`step.lower(*arguments)` compiles it: `arguments` are `(frozen, state, batch)` as shapes with shardings.

    `model`: the network. `pieces`, `optimizer`, `ema`: what the step is made of.
    """

    step: Any
    arguments: tuple[Frozen, Tree, Batch]
    model: Any
    pieces: Pieces
    optimizer: optax.GradientTransformation
    ema: EMA


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
