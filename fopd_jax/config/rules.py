"""What a setting's value may be: one rule a field, told in the words of its error message."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """`holds(value)` for values of the field's type; `expected` completes "expected …"."""

    expected: str
    holds: Callable[[Any], bool]


def at_least(least: float | int) -> Rule:
    return Rule(f"at least {least}", lambda value: value >= least)


def above(limit: float | int) -> Rule:
    return Rule(f"> {limit}", lambda value: value > limit)


def between(low: float | int, high: float | int) -> Rule:
    return Rule(f"a number in [{low}, {high}]", lambda value: low <= value <= high)


def one_of(*known: Any) -> Rule:
    return Rule(f"one of {known}", lambda value: value in known)


PROBABILITY = Rule("a probability", lambda value: 0 <= value <= 1)
SOME = Rule("at least one", lambda value: len(value) > 0)
NAME = Rule("a name", lambda value: bool(re.fullmatch(r"(?!\.\.?$)[^\s/\\]+", value)))
AXIS = Rule("a length ≥ 1, or -1: the devices that are left", lambda value: value >= 1 or value == -1)
BETAS = Rule("two numbers in [0, 1)", lambda value: all(0 <= beta < 1 for beta in value))
BEST = Rule("'max:METRIC', 'min:METRIC' or ''", lambda value: value == "" or bool(re.fullmatch("(max|min):.+", value)))
STEPS = Rule("(start, stop) with 0 <= start < stop", lambda value: value is None or 0 <= value[0] < value[1])
WEIGHTS = Rule(
    "non-negative weights, not all of them 0",
    lambda value: not value or (min(value.values()) >= 0 and sum(value.values()) > 0),
)
BOUNDS = Rule(
    "{metric: (low, high)} with low <= high",
    lambda value: all(low <= high for low, high in value.values()),
)
