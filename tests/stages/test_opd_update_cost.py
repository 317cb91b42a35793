"""FLOPs of an update by arithmetic, against the rows that its forwards run on the small network."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fopd_jax.adapters.lora import zeros_like
from fopd_jax.config.parse import resolve
from fopd_jax.config.schema import EMA, OPD
from fopd_jax.config.stages import is_mixed
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.policy.routing import TaskMixes
from fopd_jax.stages.abstract import abstract_model
from fopd_jax.stages.opd import origin
from fopd_jax.stages.opd_update import make_spec, update_cost
from fopd_jax.steps.grpo.spec import Credit
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.mixed import make_programs
from fopd_jax.steps.opd.one_timestep import picked_gradients
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.replay import replay
from fopd_jax.steps.visits import make_passes
from fopd_jax.worlds.prompt_stream import Batch
from tests.configs import load
from tests.steps.opd.network import BANK, SGD, SHAPE, frozen_of, make_batch, make_state, make_velocity, quick

SIZE = 12
DIRECT = {"objective.name": "direct"}
SCALED = {"tasks.text.guidance": 4.5, "anchor.guidance": 2.0}
CASES: dict[str, dict[str, Any]] = {
    "guided": SCALED | {"guidance": 4.5},
    "folded, at a scale": SCALED | {"objective.match": "conditional", "guidance": 2.0, "sampler.trained": (2, 4)},
    "branches of the last timesteps": {"objective.match": "branches", "sampler.trained": (2, 4)},
    "branches, one timestep": {"objective.match": "branches", "one_timestep": True, **DIRECT},
    "branches, replayed": {
        "objective.match": "branches", "updates_per_rollout": 2, "minibatches": 2, "sampler.trained": (2, 4),
    },
    "branches in micro-batches, seldom anchored": {
        "objective.match": "branches", "run.micro_batches": 2, "anchor.every": 3,
    },
    "branches, mixed": {
        "objective.match": "branches", "objective.name": "mixed", "images_per_prompt": 2, "updates_per_rollout": 2,
        "tasks.text.rewards": {"text": 1.0}, "tasks.composition.rewards": {"composition": 1.0},
    },
    "folded, beyond several teachers": SCALED | {
        "objective.match": "conditional", "guidance": 1.0, "tasks.text.extrapolation": 0.5,
        "tasks.text.mix": {"text": 0.5, "composition": 0.5}, "routing.method": "soft",
    },
    "beyond, without an anchor": {"tasks.text.extrapolation": 0.5, "objective.mar_beta": 0.0, "anchor.guidance": 4.5},
}  # fmt: skip

QUICK = ("guided", "branches in micro-batches, seldom anchored", "branches, mixed", "folded, beyond several teachers")


def config_of(changes: dict[str, Any]) -> OPD:
    return resolve(load("miniature", **({"batch_size": SIZE} | changes)))


def batch_of(config: OPD) -> Batch:
    batch = jax.tree.map(jnp.asarray, make_batch(SIZE))
    if config.routing.method == "hard":
        return batch
    tasks, names = [tuple(config.tasks)[k] for k in batch.route], tuple(config.tasks)
    soft = TaskMixes(names, {name: (task.mix, task.noisy_mix) for name, task in config.tasks.items()})
    return dataclasses.replace(batch, mix=jax.tree.map(jnp.asarray, soft(tasks, tasks)))


def counted_rows(config: OPD) -> int:
    """Of all forwards of one update; what is not reached does not count."""
    spec, rows = dataclasses.replace(make_spec(config, SHAPE), latent_shape=SHAPE), []
    spec.check(SIZE)
    plain = make_velocity()

    def velocity(variables: Any, adapter: Any, x: Any, *others: Any) -> jax.Array:
        jax.debug.callback(lambda count=x.shape[0]: rows.append(count))
        return plain(variables, adapter, x, *others)

    pieces, batch = Pieces(spec, velocity), batch_of(config)
    bank = dict(zip((*config.tasks, "anchor"), BANK.values(), strict=True))
    frozen = frozen_of({**bank, "base": zeros_like(bank["anchor"])} if spec.table.base else bank)
    if is_mixed(config):
        _drive(pieces, frozen, batch)
    elif spec.replays:
        jax.block_until_ready(quick(replay, pieces, SGD, EMA())(frozen, make_state(), batch))
    else:
        gradients = picked_gradients if spec.one_timestep else fused_gradients
        jax.block_until_ready(quick(gradients, pieces)(frozen, make_state(), batch))
    jax.effects_barrier()
    return sum(rows)


def _drive(pieces: Pieces, frozen: Any, batch: Batch) -> None:
    programs, spec = make_programs(pieces, SGD, EMA()), pieces.spec
    rewards = len(spec.rewards)
    yes = jnp.ones(SIZE, bool)
    credit = Credit(jnp.ones(SIZE), jnp.zeros((rewards, SIZE)), jnp.zeros((rewards, SIZE), bool), yes, ~yes)
    progress: Any = (make_state(), *programs.begin(frozen, make_state(), batch))
    passes = make_passes(spec.updates_per_rollout, spec.minibatches, spec.micro_batches)
    for k in range(len(passes.part)):
        each = jax.tree.map(lambda leaf, k=k: jnp.asarray(leaf[k]), passes)
        progress, _ = programs.go(frozen, progress, batch, credit, each)
    jax.block_until_ready(progress)


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in CASES]
)
def test_forwards_are_those_that_are_run(case: str) -> None:
    config = config_of(CASES[case])
    model = abstract_model(config, make_mesh(config.run.mesh))
    spec = make_spec(config, (24, 24, 3))
    cost = update_cost(config, spec, 8, model)
    assert cost.backward / cost.forward == pytest.approx(_plain(model).backward / _plain(model).forward)
    one = _plain(model).forward / (SIZE * 5)  # of a row: one forward of five timesteps a sample, nothing is guided
    found = counted_rows(config)
    print(f"{case}: {found} rows, {(cost.teachers + cost.rollout + cost.forward) / one:.1f} by arithmetic")
    assert (cost.teachers + cost.rollout + cost.forward) / one == pytest.approx(found)


def _plain(model: Any) -> Any:
    config = config_of({})
    return update_cost(config, make_spec(config, (24, 24, 3)), 8, model)


def test_a_folded_student_is_for_use_under_its_own_scale() -> None:
    """Whatever its teachers' are, and under whichever it is evaluated."""
    config = config_of(SCALED | {"objective.match": "conditional", "guidance": 1.0, "eval.guidance": 2.0})
    assert (origin(config).guidance, config.eval.guidance) == (1.0, 2.0)
    assert make_spec(config, SHAPE).teacher_guidance == (1.0, 4.5, 2.0)
