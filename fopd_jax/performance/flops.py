"""FLOPs of a whole update, from those of one sample's pass through the network (`Backbone.flops`)."""

import dataclasses

from fopd_jax.backbones.record import Pass


@dataclasses.dataclass(frozen=True)
class Update:
    """One update of a whole batch, by phase. `rollout`: what trains, forward alone; `teachers`: others, forward."""

    teachers: float
    rollout: float
    forward: float
    backward: float
    recomputed: float

    @property
    def model(self) -> float:
        """Without recomputation: what MFU counts."""
        return self.teachers + self.rollout + self.forward + self.backward

    @property
    def hardware(self) -> float:
        """With recomputation: what HFU counts."""
        return self.model + self.recomputed

    def __add__(self, other: "Update") -> "Update":
        return Update(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, count: float | int) -> "Update":
        return Update(*(each * count for each in dataclasses.astuple(self)))


NOTHING = Update(teachers=0.0, rollout=0.0, forward=0.0, backward=0.0, recomputed=0.0)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one OPD update runs. `timesteps`: the trained ones; guided forwards take two rows a sample.

    `teacher_forwards`: networks that each sample is shown, the anchor (or its share) among them. Adapters are routed
    to, so that one of them sees a sample; of several networks see `stages.grouping`. `only_sampled`: timesteps that the
    student passes without being trained there, guided as where it trains unless `guided_sampling` says otherwise.
    """

    batch: int
    timesteps: int
    guided_student: bool
    guided_teachers: bool
    teacher_forwards: float | int
    updates_per_rollout: int = 1
    minibatches: int = 1
    only_sampled: int = 0
    micro_batches: int = 1
    guided_sampling: bool | None = None

    @property
    def replayed(self) -> bool:
        return self.updates_per_rollout > 1 or self.minibatches > 1 or self.micro_batches > 1


def update_flops(student: Pass, teacher: float, schedule: Schedule) -> Update:
    """One OPD update; `student`: of one sample, `teacher`: FLOPs of one sample's forward through a teacher."""
    sampled = schedule.batch * schedule.timesteps
    asked = sampled * schedule.teacher_forwards * (2 if schedule.guided_teachers else 1)
    guided = 2 if schedule.guided_student else 1
    rows = sampled * guided
    sampled_guided = schedule.guided_student if schedule.guided_sampling is None else schedule.guided_sampling
    passed = schedule.batch * schedule.only_sampled * (2 if sampled_guided else 1)
    trained = rows * schedule.updates_per_rollout / schedule.minibatches
    return Update(
        teachers=asked * teacher,
        # Fused, the rollout's forward is the training's.
        rollout=(passed + (rows if schedule.replayed else 0)) * student.forward,
        forward=trained * student.forward,
        backward=trained * student.backward,
        recomputed=trained * student.recomputed,
    )
