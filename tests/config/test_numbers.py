"""Every number of every field, alone or in a tuple or dict: within its rule's limits, or refused by its full name."""

import math
import re
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest

from fopd_jax.config.parse import find, override, resolve, settle
from fopd_jax.config.rules import PATH
from tests.config.fields import LEAVES, STAGES, Field, valid

NAN, INF = math.nan, math.inf
NUMBERS: list[Any] = [
    -1, -0.5, 0, 0.0, 0.5, 1, 2, 1e-300, 3e-39, 1e10, 1e30, -1e30, 1e39, 1e300, 10**10, 10**30, -(10**30), 2**31, 2**32,
    2**63, 2**64,
]  # fmt: skip
NONE: list[Any] = [
    NAN, INF, -INF, 10**400, "1", "nan", "", b"1", True, False, [1], [], (1,), {}, {1}, 1j, np.float32(1), object,
]  # fmt: skip
"""No field takes them."""
LENGTHS: list[Any] = [(), (1,), (0, 1, 2), (0, 1, 2, 3), [], [1], 1, "01", {0: 1}, True]
EMPTY = {"cold_start.weights", "run.alarms"}  # dicts, which may be
HOST = {"run.alarms"}  # compared on the host alone, in float64
NUMERIC = [field for field in LEAVES if any(kind in str(field.hint) for kind in ("int", "float"))]
OF = {stage: [field for field in NUMERIC if field.stage == stage] for stage in STAGES}


def forms(field: Field, number: Any) -> list[Any]:
    """Values of the field's form with a number in each of its places; always two."""
    hint = str(field.hint)
    low = max(0, field.metadata["rule"].limits[0])
    values = [(number, 1), (low, number)] if "tuple" in hint else [number, number]
    named = {"schedule": "1", "bands": "spread"}  # a step's number, what is known of teachers; else any name
    entry = named.get(field.name.rpartition(".")[2], "x")
    return [{entry: each} for each in values] if hint.startswith("dict") else values


def numbers(value: Any) -> Iterator[Any]:
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]:
        yield from numbers(each) if isinstance(each, tuple) else [each]


def taken(stage: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What becomes of the values that are taken: numbers within the limits; refusals begin with the full name."""
    config, problems = settle(override(valid(stage), changes))
    lines = [re.fullmatch(r"([\w.]+)(\[\d\]|, a name in it)?: found .+, expected .+", line) for line in problems]
    assert all(lines), problems
    assert all(len(line) < 400 for line in problems)
    refused = {re.sub(r"\.(x|1|spread)$", "", line[1]) if line[1] not in changes else line[1] for line in lines if line}
    assert refused <= changes.keys()
    kept = {name: find(config, name) for name in changes.keys() - refused}
    for field in OF[stage]:
        low, high = field.metadata["rule"].limits
        for number in numbers(kept.get(field.name, ())):
            assert type(number) is (int if "int" in str(field.hint) else float), field
            assert low <= number <= high, field
    return kept


def test_every_number_has_limits_that_arithmetic_can_hold():
    assert len(NUMERIC) > 80
    for field in NUMERIC:
        rule = field.metadata["rule"]
        assert rule is not None, field
        assert rule.limits is not None, field
        widest = float(np.finfo(np.float64 if field.name in HOST else np.float32).max)
        assert max(map(abs, rule.limits)) <= (widest if "float" in str(field.hint) else 2**32 - 1), field


@pytest.mark.parametrize("stage", STAGES)
def test_a_number_is_taken_within_the_limits_alone(stage: str):
    for number in NUMBERS:
        for place in range(2):
            taken(stage, {field.name: forms(field, number)[place] for field in OF[stage]})


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_no_finite_number_is_taken_nowhere(stage: str):
    for value in NONE:
        for place in range(2):
            assert not taken(stage, {field.name: forms(field, value)[place] for field in OF[stage]}), value


@pytest.mark.parametrize("stage", STAGES)
def test_a_tuple_has_its_own_length(stage: str):
    for value in LENGTHS:
        changes = {
            each.name: {"x": value} if each.name in EMPTY else value
            for each in OF[stage]
            if "tuple" in str(each.hint)
            and (int not in get_args(each.hint) or type(value) is not int)
            and (Ellipsis not in get_args(each.hint) or not isinstance(value, tuple | list))
        }
        assert changes
        assert not taken(stage, changes), value


@pytest.mark.parametrize("stage", STAGES)
def test_the_largest_number_is_taken_and_none_above(stage: str):
    inside, above = {}, {}
    for field in OF[stage]:
        high = field.metadata["rule"].limits[1]
        one = type(high)(1)
        inside[field.name] = forms(field, 1 - 1e-9 if field.name == "optimizer.betas" else high)[1]
        if field.name not in HOST:
            above[field.name] = forms(field, high + max(one, high // 1000) if high > 1 else high + 0.001)[1]
    assert taken(stage, inside).keys() == inside.keys()
    assert not taken(stage, above)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("run.steps", 10**20, f"run.steps: found {10**20}, expected at least 0, at most 1000000000"),
        ("seed", 2**32, "seed: found 4294967296, expected a number in [0, 4294967295]"),
        ("eval.seed", 2**32 - 1, "eval.seed: found 4294967295, expected a number in [0, 4294967294]"),
        ("optimizer.learning_rate", 1e39, "optimizer.learning_rate: found 1e+39, expected > 0, at most 100"),
        ("ema.decay", -0.1, "ema.decay: found -0.1, expected a probability"),
        ("tasks.x.weight", -INF, "tasks.x.weight: found -inf, expected a finite number"),
        ("cold_start.weights", {"x": NAN}, "cold_start.weights.x: found nan, expected a finite number"),
        ("sampler.window", (0, 10**9),
         "sampler.window: found (0, 1000000000), expected (start, stop) with 0 <= start < stop <= 1000"),
    ],
)  # fmt: skip
def test_messages_name_the_field_what_was_found_and_the_limits(name: str, value: Any, message: str):
    with pytest.raises(ValueError, match="expected") as error:
        resolve(override(valid("opd"), {name: value}))
    assert str(error.value) == message


# ---- texts

TEXTS = [field for field in LEAVES if "str" in str(field.hint) and "dict" not in str(field.hint)]
PATHS = [field for field in TEXTS if field.metadata["rule"] is PATH]


@pytest.mark.parametrize("stage", STAGES)
def test_a_text_is_seen_and_can_be_written(stage: str):
    mine = [field for field in TEXTS if field.stage == stage]
    assert len(mine) >= 18
    for text in ("a\0b", "a\nb", " a", "a ", " ", "\x7f", "\udc80"):
        changes = {each.name: (text,) if "tuple" in str(each.hint) else text for each in mine}
        _, problems = settle(override(valid(stage), changes))
        assert {line.partition(":")[0].partition("[")[0] for line in problems} == changes.keys()
        assert all(line.isprintable() for line in problems)


@pytest.mark.parametrize("stage", STAGES)
def test_a_path_is_written_out(stage: str):
    mine = [field.name for field in PATHS if field.stage == stage]
    assert {"model.path", "run.encoding.cache", "run.compiled"} < set(mine)
    for text in ("gs://bucket/x", "~/x", "$SCRATCH/x"):
        _, problems = settle(override(valid(stage), dict.fromkeys(mine, text)))
        assert problems == [f"{name}: found {text!r}, expected a path on this machine, written out" for name in mine]


def test_what_cannot_be_shown_is_told_by_its_type():
    class Hidden:
        def __repr__(self) -> str:
            raise TypeError

    _, problems = settle(override(valid("opd"), {"name": Hidden()}))
    assert problems == ["name: found a value of type Hidden that cannot be shown (TypeError), expected a text"]


def test_a_config_that_holds_itself_is_refused():
    config = valid("opd")
    config.tasks["y"] = config.tasks
    with pytest.raises(ValueError, match=r"^config: a dict or a section in it holds itself$"):
        resolve(config)
