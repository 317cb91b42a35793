"""The teachers' reward and the tasks' in one update: its limits, its closed form, and whom a sample's credit reaches.

Limits at 1e-6 of the distance moved; the closed form and the broadcast in float64.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import zeros_like
from fopd_jax.config.learning import PolicyGradient
from fopd_jax.config.schema import EMA, Objective
from fopd_jax.flow.transition import SDE
from fopd_jax.steps.grpo import step as grpo
from fopd_jax.steps.grpo.spec import Base, Credit, GRPOSpec
from fopd_jax.steps.grpo.step import Programs
from fopd_jax.steps.opd import mixed
from fopd_jax.steps.opd.replay import replay
from fopd_jax.steps.opd.spec import OPDSpec
from fopd_jax.steps.state import TrainState
from fopd_jax.steps.visits import make_passes
from fopd_jax.worlds.prompt_stream import Batch
from tests.steps.opd.network import (
    BANK,
    PLAIN,
    SGD,
    SHAPE,
    SIGMAS,
    check,
    frozen_of,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    make_velocity,
    quick,
)

SIZE = 6
MIXED = Objective("mixed", mar_beta=0.3, clip=0.01)
ADVANTAGE = np.array([1.0, -1.0, 0.5, -0.25, 2.0, -2.25], np.float32)


def credit_of(advantage: Any, rewards: int = 1) -> Credit:
    yes = jnp.ones(SIZE, bool)
    values = jnp.zeros((rewards, SIZE))
    return Credit(jnp.asarray(advantage), values, values == 0, yes, ~yes)


def batch_of() -> Batch:
    return jax.tree.map(jnp.asarray, make_batch(SIZE))


def drive(programs: Programs, spec: Any, frozen: Any, state: TrainState, of: Any, credit: Credit) -> Any:
    """What the host does: all passes, scored between."""
    state = jax.tree.map(jnp.array, state)  # it is donated
    passes = make_passes(spec.updates_per_rollout, spec.minibatches, spec.micro_batches)
    progress, found = (state, *programs.begin(frozen, state, of)), []
    for k in range(len(passes.part)):
        progress, seen = programs.go(
            frozen, progress, of, credit, jax.tree.map(lambda leaf, k=k: jnp.asarray(leaf[k]), passes)
        )
        found += [seen] if passes.trains[k] else []
    return *programs.end(progress[0], credit, found), progress[1]


def mix(spec: OPDSpec, advantage: Any) -> Any:
    programs = mixed.make_programs(make_pieces(spec), SGD, EMA())
    return drive(programs, spec, frozen_of(BANK), make_state(), batch_of(), credit_of(advantage))


def moved(after: TrainState) -> Any:
    return jax.tree.map(jnp.subtract, after.trained, make_state().trained)


# ---- limits


@pytest.mark.parametrize(
    "fields",
    [
        {"updates_per_rollout": 2, "minibatches": 2, "micro_batches": 3},
        {"updates_per_rollout": 3, "trained": (1, 3), "anchor_every": 3},
    ],
    ids=["minibatches", "part of the timesteps"],
)
def test_without_tasks_it_is_the_clipped_objective(fields: dict[str, Any]) -> None:
    spec = make_spec(dataclasses.replace(MIXED, task_weight=0.0), **fields)
    after, metrics, rollout = mix(spec, ADVANTAGE)
    plain = dataclasses.replace(spec, objective=dataclasses.replace(MIXED, name="clipped"))
    expected, known = quick(replay, make_pieces(plain), SGD, EMA())(frozen_of(BANK), make_state(), batch_of())
    check(moved(after), moved(expected), 1e-6)
    for name in known.keys() - {"samples/loss"}:
        if not name.startswith(("weights/teacher_gap", "teacher_gap/")):  # told apart by the credit's tasks
            np.testing.assert_allclose(metrics[name], known[name], rtol=1e-5, err_msg=name)
    assert int(after.step) == 1
    assert rollout.x.shape == (SIZE, *SHAPE)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_without_teachers_it_is_flow_grpo(beta: float) -> None:
    """With an anchor that is the base it is GRPO with its divergence from the base."""
    fields = {"updates_per_rollout": 4, "minibatches": 2}
    objective = Objective("mixed", teacher_weight=0.0, mar_beta=beta, clip=0.01, weighting="kl_no_dt")
    base = zeros_like(BANK["anchor"])
    spec = make_spec(objective, guidance=PLAIN, **fields)
    programs = mixed.make_programs(make_pieces(spec), SGD, EMA())
    frozen, batch = frozen_of({**BANK, "anchor": base}), batch_of()
    after, metrics, rollout = drive(programs, spec, frozen, make_state(), batch, credit_of(ADVANTAGE))

    policy = PolicyGradient(clip=0.01, kl_beta=beta)
    other = GRPOSpec(policy, SDE(0.7), SIGMAS, SHAPE, 1.0, 2, ("r",), **fields)
    others = grpo.make_programs(grpo.Pieces(other, make_velocity()), SGD, EMA())
    still = Base(frozen.variables, frozen.null)
    expected, known, whole = drive(others, other, still, make_state(), batch.conditioning, credit_of(ADVANTAGE))
    np.testing.assert_array_equal(rollout.x, whole.x)
    check(moved(after), moved(expected), 1e-6)
    np.testing.assert_allclose(metrics["loss"], known["loss"], rtol=1e-5)


# ---- whom credit reaches


def test_the_gradient_of_mixed_credit_is_the_sum_of_its_samples() -> None:
    """One sample's advantage changes that sample's loss alone: (B, 1) times (B,) would mix all of them."""
    trained = make_spec(MIXED)
    one, two = (mix(trained, ADVANTAGE + shift * (np.arange(SIZE) == 4)) for shift in (0.0, 1.0))
    only = np.zeros(SIZE, np.float32)
    only[4] = 1.0
    without = mix(trained, 0 * ADVANTAGE)
    alone = mix(trained, only)
    difference = [jax.tree.map(jnp.subtract, a[0].trained, b[0].trained) for a, b in ((two, one), (alone, without))]
    check(*difference, 1e-4)


def test_samples_without_an_advantage_are_distilled_all_the_same() -> None:
    """Failed, dropped and flat samples: the update of advantages that are 0, not one that leaves them out."""
    spec = make_spec(MIXED)
    advantage = jnp.asarray(ADVANTAGE) * np.array([1, 1, 0, 0, 0, 0], np.float32)
    plain = credit_of(advantage)
    no = np.arange(SIZE) >= 2
    marked = dataclasses.replace(
        plain, valid=jnp.asarray(~no), flat=jnp.asarray(no), values=jnp.where(no, jnp.nan, 0.0)[None]
    )
    programs = mixed.make_programs(make_pieces(spec), SGD, EMA())
    (one, metrics, _), (two, _, _) = (
        drive(programs, spec, frozen_of(BANK), make_state(), batch_of(), each) for each in (plain, marked)
    )
    jax.tree.map(np.testing.assert_array_equal, one.trained, two.trained)
    assert metrics["teacher_gap"] > 0
    nothing = mix(spec, 0 * ADVANTAGE)[0]
    clipped = dataclasses.replace(spec, objective=dataclasses.replace(MIXED, name="clipped"), updates_per_rollout=1)
    expected, _ = quick(replay, make_pieces(clipped), SGD, EMA())(frozen_of(BANK), make_state(), batch_of())
    check(moved(nothing), moved(expected), 1e-6)


def test_programs_compile_once() -> None:
    """Scored or not, of whatever part."""
    spec = make_spec(MIXED, updates_per_rollout=2, minibatches=2)
    programs = mixed.make_programs(make_pieces(spec), SGD, EMA())
    for advantage in (ADVANTAGE, 0 * ADVANTAGE):
        drive(programs, spec, frozen_of(BANK), make_state(), batch_of(), credit_of(advantage))
    assert [each._cache_size() for each in (programs.begin, programs.go, programs.end)] == [1, 1, 1]  # type: ignore[attr-defined]
