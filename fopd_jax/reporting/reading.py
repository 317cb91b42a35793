"""Files of runs as anybody may have left them, maybe while they are written: what could be read, and what could not.

Nothing here raises for what a file holds: a report tells it and shows the rest.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from fopd_jax.reading import is_taken, parse_json, read_regular

Named = TypeVar("Named")
Problems = list[str]
"""What could not be read, a line each, which names the file."""
_NAMED = 3  # damaged lines that are named one by one


class Series(NamedTuple):
    """A scalar over the steps that it was written at, in ascending order; a value may be no number (NaN, infinite)."""

    steps: Float[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]


def read_object(path: Path) -> tuple[dict[str, Any], Problems]:
    """A JSON object; empty where there is no such file."""
    try:
        if not is_taken(path):
            return {}, []
        found = parse_json(read_regular(path))
    except (OSError, ValueError) as error:
        return {}, [f"{path}: {_why(error)}"]
    return (found, []) if isinstance(found, dict) else ({}, [f"{path}: found no JSON object"])


def read_text(path: Path) -> tuple[str, Problems]:
    """A text; empty where there is no such file."""
    try:
        return (read_regular(path).decode("utf-8"), []) if is_taken(path) else ("", [])
    except (OSError, ValueError) as error:
        return "", [f"{path}: {_why(error)}"]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], Problems]:
    """JSON objects, one a line; damaged lines are left out and named. A last line without an end is being written."""
    try:
        text = read_regular(path) if is_taken(path) else b""
    except OSError as error:
        return [], [f"{path}: {_why(error)}"]
    *whole, last = text.split(b"\n")
    parsed = {number: _parse(line) for number, line in enumerate(whole, 1) if line.strip()}
    if last.strip() and (unfinished := _parse(last)) is not None:
        parsed[len(whole) + 1] = unfinished
    damaged = [number for number, line in parsed.items() if line is None]
    named = ", ".join(map(str, damaged[:_NAMED])) + (" …" if len(damaged) > _NAMED else "")
    problems = [f"{path}: {len(damaged)} damaged of {len(parsed)} lines, left out: line {named}"] if damaged else []
    return [line for line in parsed.values() if line is not None], problems


def read_series(path: Path) -> tuple[dict[str, Series], Problems]:
    """The scalars of a file of metrics by name; of a step that was written twice the last value."""
    lines, problems = read_lines(path)
    found: dict[str, dict[int, float]] = {}
    stepless = 0
    for line in lines:
        step = line.get("step")
        if type(step) is not int:
            stepless += 1
            continue
        for name, value in line.items():
            if name != "step" and (number := as_number(value, finite=False)) is not None:
                found.setdefault(name, {})[step] = number
    if stepless:
        problems = [*problems, f"{path}: {stepless} of {len(lines)} lines have no step, left out"]
    return {name: _series(values) for name, values in found.items()}, problems


def as_number(value: Any, finite: bool = True) -> float | None:
    """A number that JSON holds; None is something else."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) or not finite else None


def as_object(value: Any) -> Mapping[str, Any]:
    """An object where there is one, else an empty one."""
    return value if isinstance(value, dict) else {}


def numbers_of(value: Any) -> dict[str, float]:
    """The entries of an object that are numbers."""
    pairs = ((name, as_number(each)) for name, each in as_object(value).items())
    return {name: number for name, number in pairs if number is not None}


def distinct(names: Iterable[Named]) -> list[Named]:
    """Each once, in the order of their first places."""
    return list(dict.fromkeys(names))


def _series(values: Mapping[int, float]) -> Series:
    steps = sorted(values)
    return Series(np.asarray(steps, np.float64), np.asarray([values[step] for step in steps], np.float64))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        found = parse_json(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _why(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else f"damaged ({error})"
