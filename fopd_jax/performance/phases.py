"""Where an update's time goes, by ablation: programs that do ever more of it, and the differences between them.

A phase inside one compiled program cannot be timed, so each program scans the same timesteps and adds one phase to the
one before it. What runs at the same time or is fused differently in the whole is attributed to none: the remainder
says how much that is, and may be negative.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fopd_jax.parallel.sharding import activation_rules
from fopd_jax.performance.flops import Update
from fopd_jax.performance.timing import Timing, time_calls
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.opd.spec import Batch, Frozen
from fopd_jax.steps.opd.step import OPDStep
from fopd_jax.steps.state import TrainState, advance

Arguments = tuple[Frozen, TrainState, Batch]
UPDATE = "optimizer and average"
Program = Callable[[Frozen, TrainState, Batch], Any]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Seconds of one update (differences of medians) and analytic FLOPs, recomputation left out."""

    name: str
    seconds: float
    flops: float


def time_programs(pieces: OPDStep, shapes: Arguments, arguments: Arguments, steps: int) -> dict[str, Timing]:
    """Compile and time each program of `programs`, one after the other.

    Raises:
      ValueError: the update trains one timestep a sample, which has no such phases.
    """
    if pieces.spec.one_timestep:
        raise ValueError("phases: one_timestep trains after its rollout, not along it; measure it without phases")
    found = {}
    for name, program in programs(pieces).items():
        compiled = jax.jit(program).lower(*shapes).compile()
        found[name] = time_calls(partial(compiled, *arguments), steps, warmup=1)
    return found


def programs(pieces: OPDStep) -> dict[str, Program]:
    """From the rollout on, each doing what the one before it does and more; `update` stands alone."""
    found: dict[str, Program] = {"rollout": partial(_forwards, pieces, None)}
    found["teachers"] = partial(_forwards, pieces, _without_anchor(pieces))
    if pieces.anchored:
        found["anchor"] = partial(_forwards, pieces, pieces)
    found["gradients"] = partial(_replayed, pieces) if _replays(pieces) else pieces.fused_gradients
    found["update"] = partial(_update, pieces)
    return {name: partial(_within_mesh, pieces, program) for name, program in found.items()}


def phases(pieces: OPDStep, timings: dict[str, Timing], whole: Timing, flops: Update) -> list[Phase]:
    """What the programs' medians say about the whole update's, and as the last entry what they leave unsaid.

    `flops`: of the update as it is; teachers and anchor share theirs by the number of forwards.
    """
    seconds = {name: timing.median for name, timing in timings.items()}
    teachers, anchor = _split_targets(pieces, flops.teachers)
    found = [Phase("teachers", seconds["teachers"] - seconds["rollout"], teachers)]
    if pieces.anchored:
        found.append(Phase("anchor", seconds["anchor"] - seconds["teachers"], anchor))
    gradients = seconds["gradients"] - seconds["anchor" if pieces.anchored else "teachers"]
    split = _replayed_phases if _replays(pieces) else _fused_phases
    found = split(pieces, seconds, gradients, flops, found)
    return [*found, Phase("not attributed", whole.median - sum(each.seconds for each in found), 0.0)]


def _fused_phases(
    pieces: OPDStep, seconds: dict[str, float], gradients: float, flops: Update, asked: list[Phase]
) -> list[Phase]:
    """One forward of the student is both the rollout's and the training's."""
    student = Phase("rollout = student forward", seconds["rollout"], flops.rollout + flops.forward)
    backward = Phase("backward", gradients, flops.backward)
    return [student, *asked, backward, Phase(UPDATE, seconds["update"], 0.0)]


def _replayed_phases(
    pieces: OPDStep, seconds: dict[str, float], gradients: float, flops: Update, asked: list[Phase]
) -> list[Phase]:
    """The student's forward in training is not told from its backward."""
    count = pieces.spec.updates_per_rollout
    training = Phase("student forward and backward", count * gradients, flops.forward + flops.backward)
    return [
        Phase("rollout", seconds["rollout"], flops.rollout),
        *asked,
        training,
        Phase(UPDATE, count * seconds["update"], 0.0),
    ]


def _replays(pieces: OPDStep) -> bool:
    return pieces.spec.updates_per_rollout > 1 or pieces.spec.minibatches > 1


def _split_targets(pieces: OPDStep, flops: float) -> tuple[float, float]:
    routed = len(pieces.spec.teachers) if pieces.spec.whole_teachers else 1
    anchor = flops / (routed * pieces.spec.anchor_every + 1) if pieces.anchored else 0.0
    return flops - anchor, anchor


def _without_anchor(pieces: OPDStep) -> OPDStep:
    objective = dataclasses.replace(pieces.spec.objective, mar_beta=0.0)
    spec = dataclasses.replace(pieces.spec, objective=objective)
    return OPDStep(spec, pieces.velocity, pieces.optimizer, pieces.ema, pieces.trains, pieces.groups)


# ---- programs


def _within_mesh(pieces: OPDStep, program: Program, frozen: Frozen, state: TrainState, batch: Batch) -> Any:
    with activation_rules(pieces.groups.mesh):
        return program(frozen, state, batch)


def _forwards(pieces: OPDStep, asked: OPDStep | None, frozen: Frozen, state: TrainState, batch: Batch) -> Any:
    """Roll out and ask for targets, whose squares are returned so that the compiler does not leave them out."""
    parameters = pieces.trains.compute(state.trained)
    x, keys, picks = pieces.approach(frozen, state, parameters, batch)

    def step(x: jax.Array, inputs: Any) -> tuple[jax.Array, Tree]:
        level, step_keys, pick = inputs
        v = pieces.student(frozen, parameters, batch.conditioning, x, level)
        x_next, _ = pieces.act(x, v, level, step_keys)
        targets = asked.targets(frozen, batch, x, level, pick) if asked is not None else None
        return x_next, jax.tree.map(lambda target: jnp.square(target).sum(), targets)

    return jax.lax.scan(step, x, (pieces.part(pieces.levels), keys, picks))


def _replayed(pieces: OPDStep, frozen: Frozen, state: TrainState, batch: Batch) -> Any:
    """The rollout and the gradient of one of the updates on it, here of its first rows."""
    stored, rows = pieces.collect(frozen, state, batch), batch.route.shape[0] // pieces.spec.minibatches
    part = jax.tree.map(lambda leaf: leaf[:, :rows], stored)
    return pieces.replayed_gradients(frozen, state.trained, jax.tree.map(lambda leaf: leaf[:rows], batch), part)


def _update(pieces: OPDStep, frozen: Frozen, state: TrainState, batch: Batch) -> Any:
    """Optimizer and average alone; the average stands in for a gradient, whose shape it has."""
    updated, norm, skipped = pieces.update(state, state.ema, {"loss": jnp.zeros(batch.route.shape[0])})
    return advance(updated, pieces.ema, skipped), norm
