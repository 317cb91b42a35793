"""Options of one kind of reward: a frozen dataclass each, filled from a config's dict."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def read_options(kind: type[T], options: Mapping[str, Any], field: str) -> T:
    """`kind`, a dataclass of bools, ints, floats and strings, with what `options` names; `field` is their name.

    Raises:
      ValueError: an option is unknown, of another type, or refused by the dataclass; names the field.
    """
    hints, known = typing.get_type_hints(kind), [each.name for each in dataclasses.fields(kind)]  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{field}.{name}: no such option, expected some of {', '.join(known) or 'none'}")
        whole = hints[name] is float and type(value) is int
        if type(value) is not hints[name] and not whole:
            raise ValueError(f"{field}.{name}: found {value!r}, expected a value of type {hints[name].__name__}")
        given[name] = float(value) if whole else value
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{field}.{error}") from error
