"""What trains of a config, on a mesh: where it lives, how it is read, over which devices its gradients are summed."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fopd_jax.adapters.lora import adapter_shapes
from fopd_jax.backbones.registry import family_of
from fopd_jax.config.learning import ForwardRL
from fopd_jax.config.schema import OPD, Config
from fopd_jax.parallel.distributed import put_replicated
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.parallel.sharding import AnyMesh, check_width, parameter_shardings, replicated
from fopd_jax.policy.velocity import Tree
from fopd_jax.stages.coordinates import fitted
from fopd_jax.steps.state import TrainState, init_state, state_shardings
from fopd_jax.steps.student import ADAPTER, Student, network


@dataclasses.dataclass(frozen=True)
class Trained:
    """`state`: shapes, dtypes and shardings of the state. A whole network is split like a base, an adapter nowhere.

    `beta`: what the anchor's weight starts from, where it learns.
    """

    state: TrainState
    student: Student
    groups: GradientGroups
    beta: float | None = None

    @property
    def places(self) -> TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)

    def sized(self, start: Tree, optimizer: optax.GradientTransformation, seed: int) -> "Trained":
        """The same for a start of other ranks than the config's; `start`: arrays or shapes."""
        shapes = jax.eval_shape(self._init(optimizer, seed), start)
        return dataclasses.replace(self, state=place(shapes, self.places))

    def born(self, start: Tree, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
        """The state of step 0, made in its shards; `start`: of what trains, numpy or wherever it is."""
        places = self.places
        placed = put_replicated(start, places.trained)
        return jax.jit(self._init(optimizer, seed), out_shardings=places)(placed)

    def _init(self, optimizer: optax.GradientTransformation, seed: int) -> Callable[[Tree], TrainState]:
        keeps_old = self.state.old is not None
        return partial(init_state, optimizer=optimizer, seed=seed, keeps_old=keeps_old, beta=self.beta)


def make_trained(
    config: Config, model: Any, boxed: Tree, optimizer: optax.GradientTransformation, mesh: AnyMesh
) -> Trained:
    """From the fields `trained`, `adapter`, `model.dtype` and `run.reduce_once`, and whether a stage keeps an old copy
    or learns the anchor's weight; needs no weights and no devices.

    `boxed`: the network's variables as shapes with logical axes.

    Raises:
      ValueError: the mesh does not divide the network; names the field.
    """
    check_width(model.config.width, mesh)
    params = nn.unbox(boxed)["params"]
    if config.trained == "params":
        trained, places = float32(params), parameter_shardings(mesh, boxed)["params"]
        student = network(jnp.dtype(config.model.dtype))
    else:
        plain, student = adapter_shapes(config.adapter, params, family_of(model).targets), ADAPTER
        trained = jax.eval_shape(partial(fitted, config, model=model), plain)
        places = jax.tree.map(lambda _: replicated(mesh), trained)
    groups = GradientGroups(mesh, config.run.reduce_once, jax.tree.map(lambda place: place.spec, places))
    keeps_old, beta = _beside(config)
    init = partial(init_state, optimizer=optimizer, seed=config.seed, keeps_old=keeps_old, beta=beta)
    state = jax.eval_shape(init, trained)
    return Trained(place(state, state_shardings(state, optimizer, places)), student, groups, beta)


def _beside(config: Config) -> tuple[bool, float | None]:
    """Whether a state has an old copy, and what its β starts from, if it has one."""
    if isinstance(config, OPD):
        anchor, beta = config.anchor, config.objective.mar_beta
        return anchor.moves == "slow" and beta > 0, beta if anchor.bound and beta else None
    return isinstance(config, ForwardRL) and config.keeps_old, None


def float32(shapes: Tree) -> Tree:
    """The same shapes in float32, in which everything trains."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shapes)


def place(shapes: Tree, shardings: Tree) -> Tree:
    """Shapes with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
