"""What the tests of the GRPO update share: OPD's two-layer network, and a host that drives the update's programs.

Gradients are read off the optimizer: `RECORD` keeps the last one and moves nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fopd_jax.config.learning import PolicyGradient
from fopd_jax.config.schema import EMA
from fopd_jax.flow.transition import SDE, Transition
from fopd_jax.steps.grpo.spec import Base, Credit, GRPOSpec, Rollout
from fopd_jax.steps.grpo.step import Metrics, Pieces, Programs, Seen, make_programs
from fopd_jax.steps.state import TrainState, init_state
from fopd_jax.steps.visits import Sums, make_passes
from tests.steps.opd.network import SHAPE, SIGMAS, STUDENT, make_velocity, prompts, variables

SIZE, GROUP = 6, 3
RECORD = optax.chain(optax.trace(0.0), optax.scale(0.0))
CLIP = PolicyGradient(clip=0.01, kl_beta=0.3)


def base() -> Base:
    return Base(variables(), jax.tree.map(jnp.asarray, prompts(7, 1)))


def make_spec(objective: PolicyGradient = CLIP, transition: Transition | None = None, **fields: Any) -> GRPOSpec:
    spec = GRPOSpec(objective, transition or SDE(0.7), SIGMAS, SHAPE, 4.5, GROUP, ("it",))
    spec = dataclasses.replace(spec, **fields)
    spec.check(SIZE)
    return spec


def make_credit(advantage: Any, valid: Any = True, flat: Any = False, values: Any = None) -> Credit:
    size = len(advantage)
    values = np.zeros((1, size)) if values is None else np.asarray(values)
    fields = np.float32(advantage), np.float32(values), np.ones(values.shape, bool)
    return jax.tree.map(
        jnp.asarray, Credit(*fields, np.broadcast_to(valid, size).copy(), np.broadcast_to(flat, size).copy())
    )


def grouped(size: int = SIZE) -> Any:
    """Conditioning of a batch: each prompt repeated over its group."""
    return jax.tree.map(lambda leaf: np.repeat(leaf, GROUP, axis=0), prompts(3, size // GROUP))


@dataclasses.dataclass
class Host:
    """The programs of a spec, driven as a stage does."""

    spec: GRPOSpec
    optimizer: Any = RECORD
    ema: EMA = dataclasses.field(default_factory=EMA)
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self.pieces = Pieces(self.spec, make_velocity(self.dtype))
        self.programs: Programs = make_programs(self.pieces, self.optimizer, self.ema)
        passes = make_passes(self.spec.updates_per_rollout, self.spec.minibatches, self.spec.micro_batches)
        whole = [jax.tree.map(lambda leaf, k=k: leaf[k], passes) for k in range(len(passes.part))]
        self.rolling, self.learning = whole[: self.spec.parts], whole[self.spec.parts :]

    def start(self, trained: Any = STUDENT, seed: int = 5) -> TrainState:
        return jax.device_put(init_state(trained, self.optimizer, seed), jax.devices()[0])

    def roll_out(self, state: TrainState, conditioning: Any) -> tuple[TrainState, tuple[Rollout, Sums]]:
        size = jax.tree.leaves(conditioning)[0].shape[0]
        progress = (state, *self.programs.begin(base(), state, conditioning))
        for each in self.rolling:
            progress, _ = self.programs.go(base(), progress, conditioning, Credit.none(1, size), each)
        return progress[0], progress[1:]

    def learn(
        self, state: TrainState, rolled: tuple[Rollout, Sums], conditioning: Any, credit: Credit
    ) -> tuple[TrainState, Metrics, list[Seen]]:
        progress, found = (state, *rolled), []
        for each in self.learning:
            progress, seen = self.programs.go(base(), progress, conditioning, credit, each)
            found.append(seen)
        return *self.programs.end(progress[0], credit, found), found


def copied(tree: Any) -> Any:
    """To keep what is about to be donated."""
    return jax.tree.map(jnp.copy, tree)


def recorded(state: TrainState) -> Any:
    """The gradient of the last update under `RECORD`."""
    return state.opt_state[0].trace


def moved(distance: float, trained: Any = STUDENT) -> Any:
    rng = np.random.default_rng(17)
    return jax.tree.map(lambda leaf: leaf + distance * rng.standard_normal(leaf.shape, np.float32), trained)
