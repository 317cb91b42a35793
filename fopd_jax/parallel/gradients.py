"""Where in an update gradients are summed over devices: at every timestep, or once.

The gradient of a batch is a sum over samples, so with the batch split over devices each backward pass ends in a
reduction, and a sum over timesteps in as many of them. Groups put it off: the samples of each device (or of each row
of devices) form a group with a gradient sum of its own, and the sums are added up once, after the last timestep.
Nothing but `jax.vmap` is needed: the group is a leading axis that lives where its samples live, so no matrix product
contracts over devices.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fopd_jax.config.schema import REDUCTIONS, MeshShape
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import BATCH_AXES, AnyMesh, activation_rules

Tree = Any
Differentiate = Callable[[Tree, Tree], tuple[Tree, Tree]]
"""`(parameters, rows) → (gradient of the sum over rows, what else came out per row)`."""


@dataclasses.dataclass(frozen=True)
class GradientGroups:
    """Gradient sums are kept apart over the mesh axes `once` and added up by `total`, once per update.

    A sum of its own costs a device as much memory as its share of the float32 parameters not split over `once`:
    little for an adapter; for a network split over `fsdp`, `once = ("data",)` is free, while `("data", "fsdp")`
    keeps a whole float32 copy a device and saves one reduce-scatter per timestep. `specs`: PartitionSpecs of what
    trains, or of whole subtrees of it.

    Raises:
      ValueError: `once` is not of the batch's axes, in their order; names the field.
    """

    mesh: AnyMesh
    once: tuple[str, ...]
    specs: Tree

    def __post_init__(self) -> None:
        if self.once not in REDUCTIONS:
            raise ValueError(f"run.reduce_once: found {self.once}, expected one of {REDUCTIONS}")

    @property
    def count(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.once)

    def zeros(self, like: Tree) -> Tree:
        """Float32 sums to start from, one a group, each where its samples are."""
        return self._placed(jax.tree.map(lambda leaf: jnp.zeros((self.count, *leaf.shape), jnp.float32), like))

    def gradient(self, differentiate: Differentiate, parameters: Tree, rows: Tree) -> tuple[Tree, Tree]:
        """Gradient sums by group `[G, …]` and the rows' other results, `rows` having a leading batch axis."""
        inner = tuple(axis for axis in BATCH_AXES if axis not in self.once)

        def group(members: Tree) -> tuple[Tree, Tree]:
            with activation_rules(self.mesh, inner):
                return differentiate(parameters, members)

        split = jax.tree.map(lambda leaf: leaf.reshape(self.count, -1, *leaf.shape[1:]), rows)
        split = jax.tree.map(lambda leaf: self._constrain(leaf, P(self.once, inner)), split)
        gradients, results = jax.vmap(group, spmd_axis_name=self.once or None)(split)
        joined = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)
        gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
        return self._placed(gradients), jax.tree.map(lambda leaf: self._constrain(leaf, P(BATCH_AXES)), joined)

    def rows(self, tree: Tree, axis: int = 0) -> Tree:
        """A tree whose leaves hold samples along `axis`, each on the devices of its samples."""
        spec = P(*(None,) * axis, BATCH_AXES)
        return jax.tree.map(lambda leaf: self._constrain(leaf, spec), tree)

    def total(self, sums: Tree) -> Tree:
        """The one reduction of the update, into the shards of what trains."""
        specs = jax.tree.broadcast(self.specs, sums)
        return jax.tree.map(lambda leaf, spec: self._constrain(leaf.sum(0), spec), sums, specs)

    def _placed(self, sums: Tree) -> Tree:
        specs = jax.tree.broadcast(self.specs, sums)
        return jax.tree.map(lambda leaf, spec: self._constrain(leaf, self._spec(spec)), sums, specs)

    def places(self, sums: Tree) -> Tree:
        """Where such sums are."""
        specs = jax.tree.broadcast(self.specs, sums)
        return jax.tree.map(lambda _, spec: NamedSharding(self.mesh, self._spec(spec)), sums, specs)

    def _spec(self, spec: P) -> P:
        """A group's own sum, split over those axes alone that its members share."""
        return P(self.once, *(None if axis in self.once else axis for axis in spec))

    def _constrain(self, leaf: jax.Array, spec: P) -> jax.Array:
        if self.mesh.size == 1:  # nothing to say, and states without a mesh stay without one
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))


def on_one_device() -> GradientGroups:
    """One group, on this process's first device."""
    return GradientGroups(make_mesh(MeshShape(), jax.devices()[:1]), (), P())
