"""Configs from outside: names of earlier versions, overrides, and the one check that freezes them."""

import ast
import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from fopd_jax.config.schema import Config
from fopd_jax.config.section import FrozenDict, Section
from fopd_jax.config.stages import StageConfig
from fopd_jax.exits import is_plain

AnyConfig = TypeVar("AnyConfig", bound=Config)
STAGES: dict[str, type[StageConfig]] = {kind().stage: kind for kind in typing.get_args(StageConfig)}
LONGEST = 200  # characters of a value in a message
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
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
    """The same in place. Entries of dicts may be new, and those of open names be on the way.

    Raises:
      ValueError: there is no such field; names it.
    """
    for name, value in changes.items():
        group, _, last = (today := current_name(name)).rpartition(".")
        _open_groups(config, group.split("."))
        holder = find(config, group) if group else config
        if isinstance(holder, dict):
            holder[last] = value
        else:
            find(config, today)
            setattr(holder, last, value)


def find(config: Config, name: str) -> Any:
    """The value of a dotted field by today's name.

    Raises:
      ValueError: there is no such field; names it and what is there.
    """
    node: Any = config
    for part in name.split("."):
        known = dict(fields_of(node)) if isinstance(node, Section) else node if isinstance(node, dict) else {}
        if part not in known:
            close = difflib.get_close_matches(part, known, 1)
            there = f"did you mean {close[0]!r}?" if close else f"only {', '.join(known) or 'a value'}"
            raise ValueError(f"{name}: no such field: {part!r}, {there}")
        node = known[part]
    return node


def open_entry(config: Config, name: str, value: str) -> None:
    """Make the entry that a dotted field names in a dict of open names, as text `value` says its type; else nothing.

    What a field's type leaves open, such as a reward's option, has that of `value` as Python reads it.
    """
    *groups, last = name.split(".")
    kind = _open_groups(config, groups)
    if kind is not None and _is_name(last):
        entries = find(config, ".".join(groups))
        if kind is not Any:
            entries.setdefault(last, kind())
        elif not isinstance(entries.get(last), str):  # what a file gives as text stays text
            entries[last] = _literal(value)


def _open_groups(config: Config, groups: list[str]) -> Any:
    """Make those entries of dicts of open names that are on a way; the entries' type where it ends in such a dict."""
    node: Any = config
    hint, is_open = type(config), False
    for part in groups:
        if isinstance(node, Section):
            field = next((each for each in _schema(node) if each.name == part), None)
            if field is None:
                return None
            is_open = field.metadata["open"]
        elif not (_holds_sections(hint) and (part in node or (is_open and _is_name(part)))):
            return None
        node, hint = _below(node, hint, part)
    return typing.get_args(hint)[1] if isinstance(node, dict) and is_open else None


def _holds_sections(hint: Any) -> bool:
    """Whether a type is a dict's of sections."""
    kind = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
    return isinstance(kind, type) and issubclass(kind, Section)


def _schema(section: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(section)


def _literal(text: str) -> Any:
    """A number, True or False, else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    return value if type(value) in (bool, int, float) else {"true": True, "false": False}.get(text, text)


def thaw(value: Any) -> Any:
    """A copy that can be changed."""
    if isinstance(value, Section):
        made = object.__new__(type(value))  # values are checked by `resolve` alone
        for name, each in fields_of(value):
            setattr(made, name, thaw(each))
        return made
    if isinstance(value, dict):
        return {name: thaw(each) for name, each in value.items()}
    return list(value) if isinstance(value, list) else value


def fields_of(section: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of a section's fields, in the schema's order."""
    return ((field.name, getattr(section, field.name)) for field in dataclasses.fields(section))


def resolve(config: AnyConfig) -> AnyConfig:
    """The config with numbers and tuples in their fields' types, every field checked, and frozen.

    Raises:
      ValueError: it is none, or fields are of another type or out of range; a line for each, with its full name.
    """
    if not isinstance(config, Config) or type(config) not in STAGES.values():
        kinds = " or ".join(f"{kind.__module__}.{kind.__name__}" for kind in STAGES.values())
        raise ValueError(f"get_config: found {type(config).__name__}, expected {kinds}")
    config, problems = settle(config)
    if problems:
        raise ValueError("\n".join(problems))
    return config


def settle(config: AnyConfig) -> tuple[AnyConfig, list[str]]:
    """A frozen copy with values in their fields' types as far as they have them, and what is wrong with the others."""
    try:
        return _section("", thaw(config), type(config))
    except RecursionError as error:
        raise ValueError("config: a dict or a section in it holds itself") from error


Typed = tuple[Any, list[str]]
"""A value as its type has it, frozen, and what is wrong with it or below it."""


def _typed(name: str, value: Any, hint: Any) -> Typed:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _either(name, value, arguments)
    if origin is tuple:
        return _tuple(name, value, arguments)
    if origin is dict:
        return _dict(name, value, arguments[1])
    if hint is Any:
        return _any(name, value)
    return _section(f"{name}.", value, hint) if issubclass(hint, Section) else _scalar(name, value, hint)


def _either(name: str, value: Any, kinds: tuple[Any, ...]) -> Typed:
    """Of a tuple or something else, whichever the value looks like."""
    is_tuple = isinstance(value, tuple | list)
    if types.NoneType in kinds and (value is None or (is_tuple and tuple(value) == (None,))):
        return None, []  # ml_collections makes (None,) of a tuple's flag `=None`
    kind = min(kinds, key=lambda each: (each is types.NoneType, (typing.get_origin(each) is tuple) != is_tuple))
    found, problems = _typed(name, value, kind)
    other = next(each for each in kinds if each is not kind)
    whole = f"{name}: " if other is not types.NoneType else name  # what is wrong within a tuple makes it no number
    return found, [f"{each}, or {_kind(other)}" if each.startswith(whole) else each for each in problems]


def _kind(hint: Any) -> str:
    if hint is types.NoneType:
        return "None"
    arguments = typing.get_args(hint)
    return f"a tuple of {len(arguments)}, each {_WORDS[arguments[0]]}" if arguments else _WORDS[hint]


def _section(path: str, section: Any, kind: type) -> Typed:
    if type(section) is not kind:
        return section, [_problem(path.rstrip("."), section, f"a section {kind.__name__}")]
    hints, problems = typing.get_type_hints(kind), []
    for field in dataclasses.fields(section):
        name, value, rule = f"{path}{field.name}", getattr(section, field.name), field.metadata["rule"]
        found, wrong = _typed(name, value, hints[field.name])
        if not wrong and rule is not None and not rule.holds(found):
            wrong = [_problem(name, value, rule.expected)]
        setattr(section, field.name, found)
        problems += wrong
    section.freeze()
    return section, problems


def _scalar(name: str, value: Any, hint: type) -> Typed:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number:  # an int may be larger than any float
        finite = abs(value) <= sys.float_info.max
        return (float(value), []) if finite else (value, [_problem(name, value, "a finite number")])
    if hint is int and number and isinstance(value, int):
        return value, []
    if hint is str and isinstance(value, str) and not is_plain(value):
        return value, [_problem(name, value, "a text without control characters, and without blanks at its ends")]
    return value, [] if type(value) is hint else [_problem(name, value, _WORDS[hint])]


def _any(name: str, value: Any) -> Typed:
    """A scalar in the type that it has, which whoever reads it checks."""
    kind = next((each for each in _WORDS if type(value) is each), None)
    if kind is None or (kind is int and abs(value) >= 2**63):
        return value, [_problem(name, value, "a number within 64 bits, a text, True or False")]
    return _scalar(name, value, kind)


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and re.fullmatch(r"[^\s.]+", key) is not None and is_plain(key)


def _tuple(name: str, value: Any, arguments: tuple[Any, ...]) -> Typed:
    hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis and isinstance(value, tuple | list) else arguments
    if not isinstance(value, tuple | list) or len(hints) != len(value):
        expected = "a tuple" if arguments[-1] is Ellipsis else f"a tuple of {len(arguments)}"
        return value, [_problem(name, value, f"{expected}, each {_WORDS[arguments[0]]}")]
    typed = [_typed(f"{name}[{i}]", each, hint) for i, (each, hint) in enumerate(zip(value, hints, strict=True))]
    return tuple(found for found, _ in typed), [problem for _, wrong in typed for problem in wrong]


def _dict(name: str, value: Any, hint: Any) -> Typed:
    if not isinstance(value, Mapping):
        return value, [_problem(name, value, "a dict")]
    if wrong := [key for key in value if not _is_name(key)]:
        expected = "a text without dots, spaces and control characters"
        return value, [_problem(f"{name}, a name in it", key, expected) for key in wrong]
    # Draws and banks depend on no file's order.
    typed = {key: _typed(f"{name}.{key}", each, hint) for key, each in sorted(value.items())}
    problems = [problem for _, wrong in typed.values() for problem in wrong]
    return FrozenDict({key: found for key, (found, _) in typed.items()}), problems


_PASSWORD = re.compile(r"[^\s'\"]*:[^\s'\"]*@")
"""A user with a password before a host, and what is before them."""


def _problem(name: str, found: Any, expected: str) -> str:
    try:
        text = _PASSWORD.sub("…@", " ".join(repr(found).split()))
    except Exception as error:  # of an int, whose limit is 4300 digits, or of a user's own class
        text = f"a value of type {type(found).__name__} that cannot be shown ({type(error).__name__})"
        text = "an int of more digits than Python spells" if isinstance(found, int) else text
    return f"{name}: found {text if len(text) <= LONGEST else text[:LONGEST] + '…'}, expected {expected}"


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


def unflatten(fields: Mapping[str, Any]) -> StageConfig:
    """The config that `flatten` made flat, by today's or earlier names, neither checked nor frozen.

    Fields that are not there have their defaults.

    Raises:
      ValueError: there is no such stage, or no such field; names it.
    """
    kind = STAGES.get(str(fields.get("stage")))
    if kind is None:
        raise ValueError(f"stage: found {fields.get('stage')!r}, expected {' or '.join(STAGES)}")
    config = _emptied(kind())
    for name, value in fields.items():
        *groups, last = (today := current_name(name)).split(".")
        node, hint = config, kind
        try:
            for part in groups:
                node, hint = _below(node, hint, part)
            node.__setitem__(last, value) if isinstance(node, dict) else setattr(node, last, value)
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # IndexError: below a value
            raise ValueError(f"{today}: no such field") from error
    return config


def _emptied(section: Any) -> Any:
    """A section without the entries that its dicts have by default: those that are meant are named."""
    for name, value in fields_of(section):
        if isinstance(value, Section):
            _emptied(value)
        elif isinstance(value, dict):
            setattr(section, name, {})
    return section


def _below(node: Any, hint: Any, part: str) -> tuple[Any, Any]:
    """A section's field or a dict's entry, made if it is not there, and its type."""
    if isinstance(node, Section):
        return getattr(node, part), typing.get_type_hints(type(node))[part]
    kind = typing.get_args(hint)[1]
    return node.setdefault(part, _emptied(kind())), kind
