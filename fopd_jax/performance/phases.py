"""Where an update's time goes, by ablation: programs that do ever more of it, and the differences between them.

A phase inside one compiled program cannot be timed, so each program scans the same timesteps and adds one phase to the
one before it. What runs at the same time or is fused differently in the whole is attributed to none, nor is flow
matching beside distillation: the remainder says how much that is, and may be negative.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fopd_jax.config.schema import EMA
from fopd_jax.flow.rollout import Seen, sample
from fopd_jax.parallel.sharding import activation_rules
from fopd_jax.performance.flops import Update
from fopd_jax.performance.timing import Timing, time_calls
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.opd.anchor import following
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.offline import apart
from fopd_jax.steps.opd.pieces import Pieces, approach, student_policy
from fopd_jax.steps.opd.replay import collect, replayed_gradients
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.opd.targets import anchor_picks, ask
from fopd_jax.steps.state import TrainState, advance, apply_if_finite
from fopd_jax.worlds.prompt_stream import Batch

Arguments = tuple[Frozen, TrainState, Batch]
UPDATE = "optimizer and average"
Program = Callable[[Frozen, TrainState, Batch], Any]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Seconds of one update (differences of medians) and analytic FLOPs, recomputation left out."""

    name: str
    seconds: float
    flops: float


def time_programs(found: dict[str, Program], shapes: Arguments, arguments: Arguments, steps: int) -> dict[str, Timing]:
    """Compile and time each of `programs`, one after the other."""
    timings = {}
    for name, program in found.items():
        compiled = jax.jit(program).lower(*shapes).compile()
        timings[name] = time_calls(partial(compiled, *arguments), steps, warmup=1)
    return timings


def programs(pieces: Pieces, optimizer: optax.GradientTransformation, ema: EMA) -> dict[str, Program]:
    """From the rollout on, each doing what the one before it does and more; `update` stands alone.

    Raises:
      ValueError: the update trains one timestep a sample, which has no such phases.
    """
    if pieces.spec.one_timestep:
        raise ValueError("phases: one_timestep trains after its rollout, not along it; measure it without phases")
    found: dict[str, Program] = {"rollout": partial(_forwards, pieces, None)}
    found["teachers"] = partial(_forwards, pieces, _without_anchor(pieces))
    if pieces.spec.anchored:
        found["anchor"] = partial(_forwards, pieces, pieces)
    found["gradients"] = partial(_replayed if pieces.spec.replays else fused_gradients, pieces)
    found["update"] = partial(_update, optimizer, ema)
    return {name: partial(_within_mesh, pieces, program) for name, program in found.items()}


def phases(pieces: Pieces, timings: dict[str, Timing], whole: Timing, flops: Update) -> list[Phase]:
    """What the programs' medians say about the whole update's, and as the last entry what they leave unsaid.

    `flops`: of the update as it is; teachers and anchor share theirs by the number of forwards.
    """
    seconds = {name: timing.median for name, timing in timings.items()}
    teachers, anchor = _split_targets(pieces, flops.teachers)
    found = [Phase("teachers", seconds["teachers"] - seconds["rollout"], teachers)]
    if pieces.spec.anchored:
        found.append(Phase("anchor", seconds["anchor"] - seconds["teachers"], anchor))
    gradients = seconds["gradients"] - seconds["anchor" if pieces.spec.anchored else "teachers"]
    split = _replayed_phases if pieces.spec.replays else _fused_phases
    found = split(pieces, seconds, gradients, flops, found)
    return [*found, Phase("not attributed", whole.median - sum(each.seconds for each in found), 0.0)]


def _fused_phases(
    pieces: Pieces, seconds: dict[str, float], gradients: float, flops: Update, asked: list[Phase]
) -> list[Phase]:
    """One forward of the student is both the rollout's and the training's."""
    student = Phase("rollout = student forward", seconds["rollout"], flops.rollout + flops.forward)
    backward = Phase("backward", gradients, flops.backward)
    return [student, *asked, backward, Phase(UPDATE, seconds["update"], 0.0)]


def _replayed_phases(
    pieces: Pieces, seconds: dict[str, float], gradients: float, flops: Update, asked: list[Phase]
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


def _split_targets(pieces: Pieces, flops: float) -> tuple[float, float]:
    spec = pieces.spec
    routed = len(spec.teachers) if spec.whole_teachers and spec.slots is None else 1
    anchor = flops / (routed * pieces.spec.anchor_every + 1) if pieces.spec.anchored else 0.0
    return flops - anchor, anchor


def _without_anchor(pieces: Pieces) -> Pieces:
    objective = dataclasses.replace(pieces.spec.objective, mar_beta=0.0)
    return dataclasses.replace(pieces, spec=dataclasses.replace(pieces.spec, objective=objective))


# ---- programs


def _within_mesh(pieces: Pieces, program: Program, frozen: Frozen, state: TrainState, batch: Batch) -> Any:
    with activation_rules(pieces.groups.mesh):
        return program(following(pieces, frozen, state), state, apart(batch)[0])


def _forwards(pieces: Pieces, asked: Pieces | None, frozen: Frozen, state: TrainState, batch: Batch) -> Any:
    """Roll out and ask for targets, whose squares are returned so that the compiler does not leave them out."""
    spec, parameters = pieces.spec, pieces.student.compute(state.trained)
    x, keys = approach(pieces, frozen, state, parameters, batch)

    def watch(_: None, seen: Seen) -> tuple[None, Tree]:
        targets = ask(asked, frozen, batch, seen.x, seen.level, seen.inputs) if asked is not None else None
        return None, jax.tree.map(lambda target: jnp.square(target).sum(), targets)

    policy, levels = student_policy(pieces, frozen, parameters, batch.conditioning), spec.levels(*spec.window)
    return sample(policy, spec.transition, levels, x, keys, watch, inputs=anchor_picks(spec, state, x.shape[0]))


def _replayed(pieces: Pieces, frozen: Frozen, state: TrainState, batch: Batch) -> Any:
    """The rollout and the gradient of one of the updates on it, here of its first rows."""
    stored, rows = collect(pieces, frozen, state, batch), batch.route.shape[0] // pieces.spec.minibatches
    part = jax.tree.map(lambda leaf: leaf[:, :rows], stored)
    return replayed_gradients(pieces, frozen, state.trained, jax.tree.map(lambda leaf: leaf[:rows], batch), part)


def _update(optimizer: optax.GradientTransformation, ema: EMA, frozen: Frozen, state: TrainState, batch: Batch) -> Any:
    """Optimizer and average alone; the average stands in for a gradient, whose shape it has."""
    updated, norm, skipped = apply_if_finite(state, state.ema, jnp.zeros(()), optimizer)
    return advance(updated, ema, skipped), norm
