"""Configs from outside: names of earlier versions, overrides, and the one check that freezes them."""

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ml_collections.config_flags import config_path

from fopd_jax.config.rules import Rule
from fopd_jax.config.schema import OPD, Config, FlowMatching, Section

AnyConfig = TypeVar("AnyConfig", bound=Config)
STAGES: dict[str, type[OPD | FlowMatching]] = {"opd": OPD, "flow_matching": FlowMatching}
LARGEST_INT = 2**32 - 1
RENAMED = {
    **{
        name: f"run.{name}"
        for name in (
            "steps", "log_every", "checkpoint_every", "eval_every", "keep_checkpoints", "keep_best", "mesh", "alarms",
            "reduce_once", "max_skipped_steps", "watchdog_seconds", "watchdog_abort",
        )
    },
    "model.attention": "run.attention",
    "model.remat": "run.remat",
    "conditioning_cache": "run.encoding.cache",
    "encode_batch_size": "run.encoding.batch_size",
    "resolution": "model.resolution",
    "t5_length": "model.t5_length",
    "shift": "model.shift",
    "final_samples": "eval.final_samples",
    "data.batch_size": "batch_size",
    "data.tasks": "tasks",
    "data.empty_caption": "empty_caption",
}  # fmt: skip
"""Earlier names of fields and groups, by which command lines and workdirs may still call them."""


def current_name(name: str) -> str:
    """A dotted field's name today: itself, or what became of it or of the group it was in."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (group := ".".join(parts[:length])) in RENAMED:
            return ".".join([RENAMED[group], *parts[length:]])
    return name


def override(config: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig:
    """A copy of a config, not frozen, with some dotted fields changed, by today's or earlier names.

    Raises:
      ValueError: there is no such field; names it.
    """
    changed = thaw(config)
    assign(changed, changes)
    return changed


def assign(config: Config, changes: Mapping[str, Any]) -> None:
    """The same in place.

    Raises:
      ValueError: there is no such field; names it.
    """
    for name, value in changes.items():
        try:
            config_path.set_value(current_name(name), config, value, accept_new_attributes=True)
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{name}: no such field of stage {config.stage!r}") from error


def thaw(value: Any) -> Any:
    """A copy that can be changed."""
    if isinstance(value, Section):
        made = object.__new__(type(value))  # values are checked by `resolve` alone
        for name, each in fields_of(value):
            setattr(made, name, thaw(each))
        return made
    if isinstance(value, dict):
        return {name: thaw(each) for name, each in value.items()}
    return copy.deepcopy(value)


def fields_of(section: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of a section's fields, in the schema's order."""
    return ((field.name, getattr(section, field.name)) for field in dataclasses.fields(section))


def resolve(config: AnyConfig) -> AnyConfig:
    """The config with numbers and tuples in their fields' types, every field checked, and frozen.

    Raises:
      ValueError: it is none, or fields are of another type or out of range; a line for each, with its full name.
    """
    if not isinstance(config, Config) or type(config) not in STAGES.values():
        kinds = " or ".join(f"fopd_jax.config.schema.{kind.__name__}" for kind in STAGES.values())
        raise ValueError(f"get_config: found {type(config).__name__}, expected {kinds}")
    config = thaw(config)
    problems = list(_settle("", config))
    if problems:
        raise ValueError("\n".join(problems))
    return config


def _settle(path: str, section: Section) -> Iterator[str]:
    """Give every field of a section its type, check it and freeze it; yields what is wrong."""
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        name, value = f"{path}{field.name}", getattr(section, field.name)
        found, problem = _typed(value, hints[field.name])
        setattr(section, field.name, found)
        rule: Rule | None = field.metadata["rule"]
        if not problem and rule is not None and not rule.holds(found):
            problem = rule.expected
        if problem:
            yield f"{name}: found {value!r}, expected {problem}"
        else:
            yield from _inside(name, found)
    section.freeze()


def _inside(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Section):
        yield from _settle(f"{name}.", value)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _inside(f"{name}.{key}", each)


def _typed(value: Any, hint: Any) -> tuple[Any, str]:
    """The value as its type has it, and what was expected instead of it, or nothing."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = next(each for each in arguments if each is not types.NoneType)
        found, problem = (value, "") if value is None else _typed(value, inner)
        return found, problem and f"{problem}, or None"
    if origin is tuple:
        return _typed_tuple(value, arguments)
    if origin is dict:
        return _typed_dict(value, arguments[1])
    return _typed_scalar(value, hint)


def _typed_scalar(value: Any, hint: type) -> tuple[Any, str]:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value), "" if math.isfinite(value) else "a finite number"
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value, "" if abs(value) <= LARGEST_INT else f"a number up to {LARGEST_INT}"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    return value, "" if type(value) is hint else words.get(hint, hint.__name__)


def _typed_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, str]:
    if not isinstance(value, tuple | list):
        return value, f"a tuple of {_spell(arguments)}"
    hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(hints) != len(value):
        return value, f"{len(hints)} numbers"
    typed = [_typed(each, hint) for each, hint in zip(value, hints, strict=True)]
    problems = [problem for _, problem in typed if problem]
    return tuple(found for found, _ in typed), problems[0] if problems else ""


def _typed_dict(value: Any, hint: Any) -> tuple[Any, str]:
    if not isinstance(value, Mapping):
        return value, f"a dict of {_spell((hint,))} by name"
    ordered = sorted(value.items(), key=lambda entry: str(entry[0]))  # draws and banks depend on no file's order
    typed = {str(name): _typed(each, hint) for name, each in ordered}
    problems = [f"{problem} at {name!r}" for name, (_, problem) in typed.items() if problem]
    return {name: found for name, (found, _) in typed.items()}, problems[0] if problems else ""


def _spell(arguments: tuple[Any, ...]) -> str:
    names = {str: "names", int: "whole numbers", float: "numbers"}
    return names.get(arguments[0], getattr(arguments[0], "__name__", str(arguments[0])))


def flatten(config: Config) -> dict[str, Any]:
    """`{dotted field: value}` in JSON types, entries of dicts as fields of their own; empty dicts and tuples stay."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        items = dict(fields_of(node)) if isinstance(node, Section) else node
        if isinstance(items, dict) and items:
            for name, value in items.items():
                visit(f"{prefix}.{name}" if prefix else name, value)
        else:
            flat[prefix] = list(node) if isinstance(node, tuple) else node

    visit("", config)
    return flat
