"""What an OPD update is made of: its static description, and the trees that flow through it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import Objective, Offline
from fopd_jax.flow.schedule import Level, make_levels
from fopd_jax.flow.transition import Transition
from fopd_jax.objectives.opd import check_objective, counted, trains
from fopd_jax.policy.groups import Slots
from fopd_jax.policy.panel import RoutingTable
from fopd_jax.policy.velocity import Tree

STACK = "*"
"""Among `OPDSpec.members`: the whole networks."""


@struct.dataclass
class Frozen:
    """What does not train: base network, bank of teachers (and anchor), the empty prompt (one row).

    Where the base is asked, it is the bank's last entry. The bank holds adapters on the base (see
    `adapters.stack_bank`), or whole networks stacked along a leading axis. `trust [K]`: what each teacher's term
    counts; None: 1. `networks`: of teachers that are others, by name, their variables and the bank of adapters on them,
    {} where there is none.
    """

    variables: Tree
    bank: Tree
    null: Conditioning
    anchor: Tree = None  # parameters of one that follows the student, as they are in this step (see `steps.opd.anchor`)
    trust: Any = None
    networks: Tree = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The gap that an anchor is held to, and how its weight learns to; see `objectives.dual`."""

    gap: float
    rate: float
    limits: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class OPDSpec:
    """The static part of the update.

    `teachers` names the bank's entries that are routed to, in its order; the anchor follows them. Guidance scales are
    one per bank entry and one for the student; where all of a forward's are 1 it does without the empty prompt.

    Three ways to spend fewer forwards, each an unbiased estimate of a stated loss: `trained = (start, stop)` takes the
    loss over those timesteps alone (earlier ones are sampled only, later ones not at all); `anchor_every = m` asks the
    anchor about one random sample of every m neighbours a timestep, which counts m times; `one_timestep` trains each
    sample at one timestep of its rollout, drawn in proportion to the timesteps' weights.

    `extrapolation`: λ of each teacher; (): 0. `rewards`, `tasks`: of 'mixed', as in `steps.grpo.spec`. `between
    [T, m - 1]`: levels within each step of the schedule, along which teachers are asked (see `targets`); None: at its
    beginning alone. `asks_base`: mixes name the base among the teachers, as coordinates do.

    `anchor_moves`: 'ema', the anchor is the state's average; 'slow', its old copy, of which `anchor_decay` stays at
    each step. `bound`: where the anchor's weight is the state's, and learns. `offline`: captioned latents in the batch
    are matched beside.

    `networks`: the one of each teacher and of the anchor, '' that of the student's base; (): all are. `slots`: see
    `policy.groups`.
    """

    objective: Objective
    transition: Transition
    sigmas: np.ndarray
    noisy: np.ndarray
    latent_shape: tuple[int, int, int]
    teachers: tuple[str, ...]
    guidance: float
    teacher_guidance: tuple[float, ...]
    updates_per_rollout: int = 1
    minibatches: int = 1
    micro_batches: int = 1
    whole_teachers: bool = False  # the bank holds whole networks, not adapters
    trained: tuple[int, int] | None = None
    anchor_every: int = 1
    one_timestep: bool = False
    extrapolation: tuple[float, ...] = ()
    rewards: tuple[str, ...] = ()
    tasks: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    anchor_moves: str = "none"
    anchor_decay: float = 0.0
    bound: Bound | None = None
    offline: Offline | None = None
    gaps: bool = False  # the gap is measured apart by timestep, see `steps.opd.gaps`
    between: np.ndarray | None = None
    asks_base: bool = False
    networks: tuple[str, ...] = ()
    slots: Slots | None = None

    def check(self, batch_size: int) -> None:
        """Raises ValueError naming the field where the parts do not fit."""
        check_objective(self.objective, self.transition)
        if len(self.sigmas) < 3:
            raise ValueError(
                f"sampler.num_steps: found {len(self.sigmas) - 1}, expected at least 2: the last is not trained"
            )
        if self.updates_per_rollout < 1:
            raise ValueError(f"updates_per_rollout: found {self.updates_per_rollout}, expected at least 1")
        if len(self.teacher_guidance) != len(self.teachers) + 1:
            raise ValueError(
                f"teacher_guidance: found {len(self.teacher_guidance)} scales, expected {len(self.teachers) + 1}: "
                "one per teacher and the anchor's"
            )
        if self.networks and len(self.networks) != len(self.teacher_guidance):
            raise ValueError(f"networks: found {len(self.networks)}, expected {len(self.teacher_guidance)} likewise")
        if self.minibatches < 1 or batch_size % self.minibatches:
            raise ValueError(f"minibatches: found {self.minibatches}, expected a divisor of batch_size {batch_size}")
        if self.minibatches > self.updates_per_rollout:
            raise ValueError(
                f"minibatches: found {self.minibatches}, expected at most updates_per_rollout "
                f"({self.updates_per_rollout}): the rest of each rollout would never be trained on"
            )
        self._check_folding()
        if self.apart and self.teacher_steps > 1:
            raise ValueError(
                f"sampler.teacher_steps: found {self.teacher_steps}, expected 1 with objective.match 'branches': the "
                "steps are of guided velocities, whose branches have no means of their own"
            )
        self._check_savings()
        if self.bound is not None and not self.bound.limits[0] <= self.objective.mar_beta <= self.bound.limits[1]:
            raise ValueError(
                f"anchor.bound_limits: found {self.bound.limits}, expected to hold objective.mar_beta "
                f"{self.objective.mar_beta:g}, which it starts from"
            )
        if batch_size // self.minibatches % (self.micro_batches * self.anchor_every):
            raise ValueError(
                f"run.micro_batches: found {self.micro_batches}, expected a divisor of the "
                f"{batch_size // self.minibatches} samples a minibatch, with anchor.every {self.anchor_every}"
            )
        start, stop = self.window
        if not self.noisy[start:stop].any() and trains(self.objective, jnp.zeros(())) == 0:
            raise ValueError("sampler.window: holds no trained step, so the objective would have nothing to train")

    def _check_folding(self) -> None:
        most = max(self.teacher_guidance[:-1], default=1.0)
        if self.objective.match == "conditional" and self.guidance > 1 and self.guidance >= most:
            raise ValueError(
                f"guidance: found {self.guidance:g}, expected 1, or less than the teachers' {most:g}: objective.match "
                "'conditional' folds theirs into the student, which would be guided twice"
            )

    def _check_savings(self) -> None:
        start, stop = self.window
        if not 0 <= start < stop <= len(self.sigmas) - 2:
            raise ValueError(
                f"sampler.trained: found {self.trained}, expected (start, stop) with 0 <= start < stop <= "
                f"{len(self.sigmas) - 2}"
            )
        if self.anchor_every < 1:
            raise ValueError(f"anchor.every: found {self.anchor_every}, expected at least 1")
        if self.one_timestep and (self.objective.name != "direct" or self.anchor_every > 1):
            raise ValueError("one_timestep: found True, which needs objective.name 'direct' and anchor.every 1")
        if self.one_timestep and (self.updates_per_rollout, self.parts) != (1, 1):
            raise ValueError("one_timestep: found True, expected False with several updates or run.micro_batches")

    @property
    def window(self) -> tuple[int, int]:
        """The trained timesteps; the last of a schedule never is."""
        return self.trained or (0, len(self.sigmas) - 2)

    @property
    def anchored(self) -> bool:
        """Whether the anchor is asked: where it has a weight."""
        return self.objective.mar_beta > 0

    @property
    def follows(self) -> bool:
        """Whether the anchor that is asked is the student as it was, and no entry of the bank."""
        return self.anchored and self.anchor_moves != "none"

    @property
    def replays(self) -> bool:
        """Whether the rollout is stored and gone through again."""
        return self.updates_per_rollout > 1 or self.parts > 1

    @property
    def parts(self) -> int:
        """Of a batch, that go through the network one after the other."""
        return self.minibatches * self.micro_batches

    @property
    def table(self) -> RoutingTable:
        """Who teaches what."""
        *scales, anchor = self.teacher_guidance
        teachers = dict(zip(self.teachers, scales, strict=True))
        table = RoutingTable.of_tasks(teachers, anchor if self.anchored and not self.follows else None)
        if not (any(self.extrapolation) or self.asks_base):
            return table
        # The base is asked under the teachers' scales; for an anchor that is not asked, the empty prompt is not read.
        scales = (*scales, anchor if self.anchored else 1.0, 1.0)
        return dataclasses.replace(
            table, guidance=scales, extrapolation=self.extrapolation, base=len(self.teachers) + 1
        )

    @property
    def grouped(self) -> bool:
        """Whether several networks are asked."""
        return self.whole_teachers or any(self.networks)

    @property
    def members(self) -> dict[str, tuple[int, ...]]:
        """The table's entries that each network answers: the student's base '', others by name, `STACK`."""
        table = self.table
        names = self.networks or ("",) * (len(self.teachers) + 1)
        if self.whole_teachers:
            names = (STACK,) * len(names)
        asked = dict(enumerate(names[: len(self.teachers) + (self.anchored and not self.follows)]))
        if table.base is not None:
            asked[table.base] = ""
        return {name: tuple(k for k, own in asked.items() if own == name) for name in sorted(set(asked.values()))}

    @property
    def apart(self) -> bool:
        """Whether velocities under the empty prompt are asked for beside the others."""
        return self.objective.match == "branches"

    @property
    def teacher_steps(self) -> int:
        """m: how often a target's teachers are asked on the way."""
        return 1 if self.between is None else self.between.shape[1] + 1

    def levels(self, start: int, stop: int) -> Level:
        """Those of the schedule's steps `start <= t < stop`, stacked."""
        return make_levels(self.sigmas, self.noisy, (start, stop), self.between)

    def shares(self) -> tuple[np.ndarray, float]:
        """Share of each trained timestep in the loss `[T]`, and its timesteps' mean weight."""
        start, stop = self.window
        with jax.ensure_compile_time_eval():  # numbers, also where a step is being traced
            pairs = jnp.stack([jnp.asarray(self.sigmas[start:stop]), jnp.asarray(self.sigmas[start + 1 : stop + 1])], 1)
            counts = np.asarray([float(trains(self.objective, jnp.asarray(on))) for on in self.noisy[start:stop]])
            weighted = [float(counted(self.objective, self.transition, *pair)) for pair in pairs]
        weights = counts * np.asarray(weighted)
        return weights / weights.sum(), float(weights.sum() / counts.sum())
