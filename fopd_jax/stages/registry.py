"""The stages that there are: what runs each, and which programs a run of it compiles."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fopd_jax.config import learning, schema
from fopd_jax.config.schema import Config
from fopd_jax.parallel.sharding import AnyMesh
from fopd_jax.performance.program import Program
from fopd_jax.running.stage import Stage
from fopd_jax.stages import flow_matching, forward_rl, grpo, opd
from fopd_jax.stages.cards import Origin
from fopd_jax.stages.flow_matching import FlowMatching, plan_flow_matching
from fopd_jax.stages.flow_matching_update import flow_matching_programs
from fopd_jax.stages.forward_rl import ForwardRL, plan_forward_rl
from fopd_jax.stages.forward_rl_update import forward_rl_programs
from fopd_jax.stages.grpo import GRPO, plan_grpo
from fopd_jax.stages.grpo_update import grpo_programs
from fopd_jax.stages.opd import make_opd, plan_opd
from fopd_jax.stages.plan import Plan
from fopd_jax.stages.problem import opd_programs


@dataclasses.dataclass(frozen=True)
class Kind:
    """`make(config, workdir, run)`: the stage, its input checked; `plan(config)`: what it would do, its input read.

    `run`: the folder of the run whose weights it leaves, if it is not `workdir`: its metrics tell their scores.
    `programs(config, mesh)`: without files or weights, the update first. `origin(config)`: what is told of what trains.
    """

    make: Callable[..., Stage]
    plan: Callable[[Any], Plan]
    programs: Callable[[Any, AnyMesh], list[Program]]
    origin: Callable[[Any], Origin]


STAGES: dict[type[Config], Kind] = {
    schema.OPD: Kind(make_opd, plan_opd, opd_programs, opd.origin),
    learning.GRPO: Kind(GRPO, plan_grpo, grpo_programs, grpo.origin),
    learning.ForwardRL: Kind(ForwardRL, plan_forward_rl, forward_rl_programs, forward_rl.origin),
    schema.FlowMatching: Kind(FlowMatching, plan_flow_matching, flow_matching_programs, flow_matching.origin),
}


def find_stage(config: Config) -> Kind:
    """The stage that a config is of."""
    return STAGES[type(config)]
