"""What a Flow-GRPO update is made of: its static description, and the trees that flow through it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.learning import NoiseWindow, PolicyGradient
from fopd_jax.flow.schedule import Level, make_levels
from fopd_jax.flow.transition import Transition
from fopd_jax.objectives.grpo import check_objective
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.state import TrainState
from fopd_jax.steps.visits import Stored, check_parts

PLACE = 2**32 - 4  # what a step's key is folded with for the window's place


@struct.dataclass
class Base:
    """What does not train: the base network, which is also the reference, and the empty prompt (one row)."""

    variables: Tree
    null: Conditioning


@struct.dataclass
class Credit:
    """What rewards say of a rollout: `advantage [B]`, and what metrics are made of.

    `values [R, B]`: of each reward, NaN where it failed or was not asked; `asked [R, B]`: whether it was; `valid [B]`:
    whether the sample takes part, `flat [B]`: whether its group is all equal, so that it teaches nothing. `task [B]`:
    which of the config's tasks it is of, where there are several.
    """

    advantage: Any  # float arrays; Any because tree operations put anything into a leaf
    values: Any
    asked: Any
    valid: Any
    flat: Any
    task: Any = None

    @classmethod
    def none(cls, rewards: int, size: int, tasks: int = 0) -> "Credit":
        """Before anything is scored; `tasks`: how many there are, 0: metrics do not tell them apart."""
        no, nothing = jnp.zeros(size, bool), jnp.zeros((rewards, size))
        return cls(jnp.zeros(size), nothing, nothing != 0, no, no, jnp.zeros(size, jnp.int32) if tasks else None)

    @property
    def counts(self) -> Array:
        """1 for samples that teach something."""
        return (self.valid & ~self.flat).astype(jnp.float32)


@struct.dataclass
class Rollout:
    """Images on the way: `x [B, h, w, c]` is the noise, and once drawn the final latents.

    `keys [T, B]`; `first`: the first trained timestep; `stored`: the trained ones.
    """

    x: Any
    keys: Any
    first: Any
    stored: Stored


@dataclasses.dataclass(frozen=True)
class GRPOSpec:
    """The static part. `group`: neighbouring rows that come from one draw of a prompt; `rewards`: their names.

    `tasks`: the weights of their rewards, where there are several whose metrics are told apart.
    """

    objective: PolicyGradient
    transition: Transition
    sigmas: np.ndarray
    latent_shape: tuple[int, int, int]
    guidance: float
    group: int
    rewards: tuple[str, ...]
    tasks: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    window: NoiseWindow = dataclasses.field(default_factory=NoiseWindow)
    shared_noise: bool = False
    updates_per_rollout: int = 1
    minibatches: int = 1
    micro_batches: int = 1

    def check(self, batch_size: int) -> None:
        """Raises ValueError naming the field where the parts do not fit."""
        check_objective(self.objective, self.transition)
        steps = len(self.sigmas) - 1
        start, stop = self.within
        if not 0 <= start < stop <= steps:
            raise ValueError(f"window.within: found {(start, stop)}, expected 0 <= start < stop <= {steps}")
        if self.window.moves != "none" and not 0 < self.window.size <= min(stop, steps - 1) - start:
            raise ValueError(
                f"window.size: found {self.window.size}, expected 1 to {min(stop, steps - 1) - start}: it moves within "
                f"steps {start} to {min(stop, steps - 1)}, and the schedule's last is not trained"
            )
        if self.window.size > stop - start:
            raise ValueError(f"window.size: found {self.window.size}, expected at most {stop - start}")
        if self.trained < 1:
            raise ValueError("window.within: holds no trained step: the schedule's last is not trained")
        check_parts(batch_size, self.updates_per_rollout, self.minibatches, self.micro_batches)

    @property
    def parts(self) -> int:
        """Of a batch, that go through the network one after the other."""
        return self.minibatches * self.micro_batches

    @property
    def within(self) -> tuple[int, int]:
        """Where the window may lie."""
        return self.window.within or (0, len(self.sigmas) - 1)

    @property
    def noisy(self) -> int:
        """How many steps draw noise."""
        start, stop = self.within
        return self.window.size or stop - start

    @property
    def trained(self) -> int:
        """How many steps are trained: the noisy ones, without the schedule's last."""
        return min(self.noisy, len(self.sigmas) - 2 - self.within[0])

    def place(self, state: TrainState) -> Int[Array, ""]:
        """The window's first step at this step of training."""
        start, stop = self.within
        last = min(stop, len(self.sigmas) - 2) - self.noisy
        if self.window.moves == "slide":
            return jnp.minimum(start + state.step // self.window.every, last).astype(jnp.int32)
        if self.window.moves == "random":
            return jax.random.randint(jax.random.fold_in(state.rng(), PLACE), (), start, last + 1)
        return jnp.int32(start)

    def levels(self, first: Int[Array, ""]) -> Level:
        """All steps, with noise in the window that begins at `first`."""
        steps = jnp.arange(len(self.sigmas) - 1)
        return make_levels(self.sigmas, (first <= steps) & (steps < first + self.noisy))
