"""Every field of all stages, found by walking the schema; dicts of sections are walked with one entry, `x`."""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fopd_jax.config.learning import GRPO, ForwardRL, RewardedTask
from fopd_jax.config.load import load_config
from fopd_jax.config.schema import OPD, ColdStart, FlowMatching, Offline, Pairs, RewardConfig, RoutedTask, Server
from fopd_jax.config.section import Section
from fopd_jax.config.teaching import TeacherNetwork

STAGES = {"opd": OPD, "flow_matching": FlowMatching, "grpo": GRPO, "forward_rl": ForwardRL}


@dataclasses.dataclass(frozen=True)
class Field:
    stage: str
    name: str
    hint: Any
    metadata: Any

    def __str__(self) -> str:
        return f"{self.stage}-{self.name}"


def valid(stage: str) -> Any:
    """A config of the stage that resolves, with an entry `x` in every dict."""
    made: dict[str, Any] = {
        "opd": OPD(
            name="any",
            tasks={"x": RoutedTask()},
            cold_start=ColdStart(weights={"x": 1.0}),
            offline=Offline(tasks={"x": Pairs()}),
        ),
        "flow_matching": FlowMatching(name="any", tasks={"x": Pairs()}),
        "grpo": GRPO(name="any", tasks={"x": RewardedTask()}),
        "forward_rl": ForwardRL(name="any", tasks={"x": RewardedTask()}),
    }
    config = made[stage]
    if stage == "opd":
        config.networks = {"x": TeacherNetwork()}
    else:
        config.run.alarms = {"x": (0.0, 1.0)}
    config.rewards, config.run.servers = {"x": RewardConfig()}, {"x": Server()}
    return config


def _walk(stage: str, kind: type, path: str) -> Iterator[tuple[Field, type | None]]:
    """Each field with the section that it holds, if it holds any."""
    hints = typing.get_type_hints(kind)
    for each in dataclasses.fields(kind):
        name, hint = f"{path}{each.name}", hints[each.name]
        entry = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
        inner, at = (hint, name) if entry is None else (entry, f"{name}.x")
        holds = inner if isinstance(inner, type) and issubclass(inner, Section) else None
        yield Field(stage, name, hint, each.metadata), holds
        if holds is not None:
            yield from _walk(stage, holds, f"{at}.")


EVERY = [found for stage, kind in STAGES.items() for found in _walk(stage, kind, "")]
LEAVES = [field for field, holds in EVERY if holds is None]
GROUPS = [field for field, holds in EVERY if holds is not None]


OWN, DRIFT = Pairs(share=0.75, degraded=0.2), Pairs(share=0.25, wrong_caption=1.0, degraded=1.0)
TEACHERS = {"text": {"text": OWN, "composition": DRIFT}, "composition": {"text": DRIFT, "composition": OWN}}


def as_then(which: str) -> Any:
    """A config file's config, not frozen, with what its experiment has changed since the version before undone."""
    name, _, variant = which.partition(":")
    config: Any = load_config(Path(__file__).parents[2] / "configs" / f"{name}.py", variant)
    if name == "miniature":
        config.objective.mar_beta = 0.05
    if name == "miniature_teacher" and variant in TEACHERS:
        config.tasks = dict(TEACHERS[variant])
    return config
