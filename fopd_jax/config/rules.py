"""What a setting's value may be: one rule a field, told in the words of its error message."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from fopd_jax.config.sizes import LARGEST_SIDE, height_width
from fopd_jax.exits import is_local

MOST_STEPS = 10**9
"""Of updates, and of whatever is counted in them: years of any machine, and within int32."""
MOST_ROWS = 2**20
"""Of samples, images, prompts or devices at once."""
MOST_SAMPLER_STEPS = 1000
"""The noise levels that the networks were trained on."""
NO_LIMIT = 1e30
"""For numbers of which a large one switches something off; finite in float32, and so are its products with weights."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """`holds(value)` for values of the field's type; `expected` completes "expected …".

    `limits`: the least and the largest number that may stand in the field, or in its tuple or dict.
    """

    expected: str
    holds: Callable[[Any], bool]
    limits: tuple[float | int, float | int] | None = None


def at_least(least: float | int, most: float | int) -> Rule:
    return Rule(f"at least {least}, at most {most}", lambda value: least <= value <= most, (least, most))


def above(limit: float | int, most: float | int) -> Rule:
    return Rule(f"> {limit}, at most {most}", lambda value: limit < value <= most, (limit, most))


def between(low: float | int, high: float | int) -> Rule:
    return Rule(f"a number in [{low}, {high}]", lambda value: low <= value <= high, (low, high))


def one_of(*known: Any) -> Rule:
    return Rule(f"one of {known}", lambda value: value in known)


def each(rule: Rule) -> Rule:
    """Of every number in a tuple."""
    return Rule(f"{rule.expected} each", lambda value: all(map(rule.holds, value)), rule.limits)


PROBABILITY = Rule("a probability", lambda value: 0 <= value <= 1, (0, 1))
SIZE = Rule(
    f"pixels a side from 1 to {LARGEST_SIDE}, or (height, width)",
    lambda value: all(1 <= side <= LARGEST_SIDE for side in height_width(value)),
    (1, LARGEST_SIDE),
)
GUIDANCE = Rule("at least 0, at most 100", lambda value: value is None or 0 <= value <= 100, (0, 100))
SOME = Rule("at least one", lambda value: len(value) > 0)
NAME = Rule("a name of at most 200 characters", lambda value: bool(re.fullmatch(r"(?!\.\.?$)[^\s/\\]{1,200}", value)))
PATH = Rule("a path on this machine, written out", is_local)
AXIS = Rule(
    f"a length from 1 to {MOST_ROWS}, or -1: the devices that are left",
    lambda value: 1 <= value <= MOST_ROWS or value == -1,
    (-1, MOST_ROWS),
)
BETAS = Rule("two numbers in [0, 1)", lambda value: all(0 <= beta < 1 for beta in value), (0, 1))
RANGE = Rule(
    "(low, high) with 1e-12 <= low <= high <= 1000",
    lambda value: 1e-12 <= value[0] <= value[1] <= 1000,
    (1e-12, 1000),
)
BEST = Rule("'max:METRIC', 'min:METRIC' or ''", lambda value: value == "" or bool(re.fullmatch("(max|min):.+", value)))
WEIGHTS = Rule(
    "weights from 0 to 1000, not all of them 0",
    lambda value: not value or (all(0 <= each <= 1000 for each in value.values()) and sum(value.values()) > 0),
    (0, 1000),
)
REWARDS = Rule("weights from 0 to 1000", lambda value: all(0 <= each <= 1000 for each in value.values()), (0, 1000))
DIALS = Rule("numbers from -10 to 10", lambda value: all(-10 <= each <= 10 for each in value.values()), (-10, 10))
SCHEDULE = Rule(
    f"{{step: weight}}, steps from 1 to {MOST_STEPS}, weights from 0 to 1000000",
    lambda value: all(_is_step(step) and 0 <= weight <= 1e6 for step, weight in value.items()),
    (0, 1e6),
)
KIND = Rule(
    "a known reward's name, package.module:function, or ''",
    lambda value: bool(re.fullmatch(r"|[\w-]+|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", value)),
)
URLS = Rule(
    "http(s)://host[:port][/path] each, without user, password, query or fragment",
    lambda value: all(map(_is_server, value)),
)
BOUNDS = Rule(
    "{metric: (low, high)} with low <= high",
    lambda value: all(low <= high for low, high in value.values()),
    (-sys.float_info.max, sys.float_info.max),
)


def bands(known: tuple[str, ...]) -> Rule:
    """Of bounds of some known statistics, which are no negative numbers."""
    return Rule(
        f"{{statistic: (low, high)}} with 0 <= low <= high <= {NO_LIMIT:g}, statistics of {known}",
        lambda value: all(name in known and 0 <= low <= high <= NO_LIMIT for name, (low, high) in value.items()),
        (0, NO_LIMIT),
    )


def _is_step(name: str) -> bool:
    """Whether a name in a dict is the number of a step after the first, as Python writes it."""
    return bool(re.fullmatch("[1-9][0-9]{0,9}", name)) and int(name) <= MOST_STEPS


def _is_server(url: str) -> bool:
    """Whether a URL names a server alone: a password in it would be written wherever configs are."""
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, brackets of half an IPv6 address
        return False
    return named and "@" not in parts.netloc and "?" not in url and "#" not in url and not re.search(r"\s", url)


def steps(most: int) -> Rule:
    """Of a range of steps, or None."""
    expected = f"(start, stop) with 0 <= start < stop <= {most}"
    return Rule(expected, lambda value: value is None or 0 <= value[0] < value[1] <= most, (0, most))


@contextlib.contextmanager
def within(section: str) -> Iterator[None]:
    """Gives errors about a section's field, raised where sections are not known, its full name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{section}.{error}") from error
