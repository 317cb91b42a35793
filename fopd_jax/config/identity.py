"""What identifies an experiment: the settings of its config that are no defaults, without those of section `run` and
those that only look on."""

import functools
import hashlib
import json
import re
import typing
from collections.abc import Mapping
from typing import Any

from fopd_jax.config.parse import STAGES, current_name, flatten
from fopd_jax.config.schema import Config
from fopd_jax.config.section import Section
from fopd_jax.config.teaching import PAPER_GUIDANCE

Fields = Mapping[str, Any]
_TEACHERS_GUIDANCE = re.compile(r"(tasks\.[^.]+|anchor)\.guidance")


def identity(config: Config) -> dict[str, Any]:
    """Flat `{dotted field: value}` in JSON types, and the names of the tasks."""
    return normalise(flatten(config))


def config_hash(config: Config) -> str:
    """SHA-256 of the identity, first 16 hex digits."""
    return fields_hash(identity(config))


def fields_hash(fields: Fields) -> str:
    """The same of an identity as a workdir holds it, in whatever version's form."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def normalise(fields: Fields) -> dict[str, Any]:
    """The identity that a config's fields have today; earlier versions kept all of them, under names of their own."""
    named: dict[str, Any] = json.loads(json.dumps({current_name(name): value for name, value in fields.items()}))
    stage, tasks = (
        named.get("stage", "opd"),
        sorted({name.split(".")[1] for name in named if name.startswith("tasks.")}),
    )
    kept = {
        name: value
        for name, value in named.items()
        if not name.startswith("run.")
        and value not in (default_of(stage, name), left_out(stage, name))
        and not _implied(name, named, tasks)
        and not _looks_on(name, named)
    }
    offline = sorted({name.split(".")[2] for name in named if name.startswith("offline.tasks.")})
    kept |= {"offline.tasks": named.get("offline.tasks") or offline} if offline else {}
    return {"stage": stage, "tasks": named.get("tasks") or tasks} | kept


def default_of(stage: str, name: str) -> Any:
    """The schema's default of a dotted field in JSON types; something equal to nothing where it has none."""
    kind = STAGES.get(stage)
    found = _default(_blank(kind), kind, name.split(".")) if kind is not None else _MISSING
    return list(found) if isinstance(found, tuple) else found


def left_out(stage: str, name: str) -> Any:
    """What a field means that an identity leaves out: its default.

    Of a teacher's guidance it is the paper's scale, as in earlier versions, whose default it was; a run's config has
    the scale that a file gave it (`stages.cards.settled`).
    """
    return PAPER_GUIDANCE if stage == "opd" and _TEACHERS_GUIDANCE.fullmatch(name) else default_of(stage, name)


@functools.cache
def _blank(kind: type[Config]) -> Config:
    """A config of defaults, only to be read."""
    return kind()


class _Missing:
    """Of a field that is not there; equal to nothing but itself."""

    def __repr__(self) -> str:
        return "nothing"


_MISSING = _Missing()


def _default(node: Any, hint: Any, path: list[str]) -> Any:
    if not path:
        return node
    if isinstance(node, Section):
        return _default(getattr(node, path[0], _MISSING), typing.get_type_hints(type(node)).get(path[0]), path[1:])
    if isinstance(node, dict):
        kind = typing.get_args(hint)[1]
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        return _default(kind() if is_section else node.get(path[0], _MISSING), kind, path[1:])
    return _MISSING


def _looks_on(name: str, fields: Fields) -> bool:
    """Whether a field of section `health` changes no number of the training."""
    return name.startswith("health.") and (name == "health.gaps" or fields.get("health.noisy") != "weigh")


def _implied(name: str, fields: Fields, tasks: list[str]) -> bool:
    """Whether a field says what its default, which means all tasks alike, says too."""
    if name == "eval.tasks":
        return sorted(fields[name]) == tasks
    prefix = "cold_start.weights."
    weights = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    return name.startswith(prefix) and sorted(weights) == tasks and set(weights.values()) == {1 / len(tasks)}
