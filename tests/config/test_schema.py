"""Every field of all stages: what it says of itself, what it refuses and in which words, and that it freezes."""

import copy
import dataclasses
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.config import learning, schema, teaching
from fopd_jax.config.identity import identity
from fopd_jax.config.parse import assign, find, flatten, override, resolve, thaw, unflatten
from fopd_jax.config.rules import PATH
from fopd_jax.config.section import Section
from tests.config.fields import EVERY, GROUPS, LEAVES, STAGES, Field, valid
from tests.config.ranges import FREE, RANGES

NAN, INF, HUGE = math.nan, math.inf, 10**400


def refusals(stage: str, changes: dict[str, Any]) -> dict[str, str]:
    """The lines in which values are refused, all at once, by the fields that they begin with."""
    config = override(valid(stage), changes)
    with pytest.raises(ValueError, match="expected") as error:
        resolve(config)
    lines = str(error.value).splitlines()
    found = [re.fullmatch(r"([\w.]+)(\[\d+\]|, a name in it)?: found .+, expected .+", line) for line in lines]
    assert all(found), lines
    assert max(map(len, lines)) < 400
    return {line[1]: line[0] for line in found if line}


def below(name: str, field: str) -> bool:
    """Whether a refused name is the field's, or an entry's in it."""
    return name == field or name.startswith(f"{field}.")


# ---- what a field says of itself


def test_every_field_is_described():
    for field, _ in EVERY:
        assert len(field.metadata["doc"]) >= 5, field
        assert field.metadata["doc"][-1] == ".", field
        sourced = r"|(\[(paper|code|DiffusionNFT|AWM|CRD)\] [^\[]+(; |, )?)+"
        assert re.fullmatch(sourced, field.metadata["paper"]), field


def test_every_section_is_reached_by_some_stage():
    known = {**vars(schema), **vars(learning), **vars(teaching)}.values()
    defined = {each for each in known if isinstance(each, type) and issubclass(each, Section)}
    found = [find(valid(field.stage), field.name) for field in GROUPS]
    reached = {type(each["x"] if isinstance(each, dict) else each) for each in found}
    assert defined - {Section, schema.Config, learning.Reinforced, *STAGES.values()} == reached


def test_what_the_other_tests_change_is_valid():
    for stage in STAGES:
        assert resolve(valid(stage)) == valid(stage)


# ---- types

PAIR = ["12", 3, (), (1,), (1, 2, 3), (1, "2"), (1, True), (1, None), (1, NAN), (1, HUGE), {1: 2}, {1, 2}]
WRONG: dict[Any, list[Any]] = {
    int: [None, True, 1.0, 1.5, NAN, INF, "1", (1,), [1], 2**32, -(2**32), HUGE, -HUGE, 10**5000, 1j],
    float: [None, True, NAN, INF, -INF, HUGE, -HUGE, 10**5000, "1", "nan", (1.0,), [1.0], 1j],
    float | None: [True, NAN, INF, -INF, HUGE, -HUGE, 10**5000, "1", "None", (1.0,), [1.0], 1j],
    str: [None, True, 1, 1.0, NAN, b"text", ("text",), ["text"], Path("text")],
    bool: [None, 0, 1, 1.0, "True", "", (True,)],
    tuple[str, ...]: [None, True, 1, "text", {"text"}, {"text": 1}, (1,), ("data", None), ("data", ("fsdp",))],
    tuple[float, float]: [None, *PAIR], tuple[int, ...]: [None, 1, (1.0,)], tuple[float, ...]: [None, 1.0, (NAN,)],
    tuple[int, int] | None: [False, (1, 2.0), (1, 2**32), *PAIR],
    int | tuple[int, int]: [None, True, 1.0, NAN, HUGE, (1, 2.0), (1, 2**32), *(each for each in PAIR if each != 3)],
    dict[str, float]: [
        None, 1, (), [("x", 1.0)], {"x": None}, {"x": NAN}, {"x": INF}, {"x": HUGE}, {"x": True}, {"x": "1"},
        {1: 1.0}, {None: 1.0}, {"": 1.0}, {"a.b": 1.0}, {"a b": 1.0}, {"x\n": 1.0},
    ],
    dict[str, Any]: [
        None, 1, (), {"x": None}, {"x": NAN}, {"x": -INF}, {"x": HUGE}, {"x": 2**63}, {"x": b"1"}, {"x": (1,)},
        {"x": {}}, {"x": " 1"}, {1: 1}, {"a.b": 1},
    ],
    dict[str, tuple[float, float]]: [None, 1, (), *({"x": value} for value in [None, *PAIR]), {"a.b": (0.0, 1.0)}],
}  # fmt: skip


def test_every_type_of_the_schema_has_wrong_values_here():
    assert {field.hint for field in LEAVES} == WRONG.keys()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("hint", WRONG, ids=str)
def test_a_wrong_type_is_refused_by_name_in_every_field_of_the_type(stage: str, hint: Any):
    names = [field.name for field in LEAVES if field.stage == stage and field.hint == hint]
    for value in WRONG[hint] if names else []:
        lines = refusals(stage, dict.fromkeys(names, value))
        assert len(lines) == len(names)
        for name in names:
            assert any(below(line, name) for line in lines), (name, value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_section_is_nothing_else(stage: str):
    names = [field.name for field in GROUPS if field.stage == stage]
    inside = [name for name in names if "." in name]
    for value in (None, 1, "build", (), schema.EMA, schema.FlowMatching(), {"x": None}, {"x": 1}, {"x": {}}):
        for group in (inside, [name for name in names if name not in inside]):  # one at a time: the one holds the other
            lines = refusals(stage, dict.fromkeys(group, value))
            assert len(lines) == len(group)
            assert all(any(below(line, name) for line in lines) for name in group), value
    assert refusals(stage, {"tasks": {}, "eval": {}}).keys() == {"eval"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", True, "seed: found True, expected a whole number"),
        ("run.mesh.data", 1.5, "run.mesh.data: found 1.5, expected a whole number"),
        ("seed", HUGE, "seed: found 1" + "0" * 199 + "…, expected a number in [0, 4294967295]"),
        ("optimizer.learning_rate", NAN, "optimizer.learning_rate: found nan, expected a finite number"),
        ("optimizer.betas", (0.9, INF), "optimizer.betas[1]: found inf, expected a finite number"),
        ("optimizer.betas", (0.9,), "optimizer.betas: found (0.9,), expected a tuple of 2, each a number"),
        ("sampler.window", (1, "2"), "sampler.window[1]: found '2', expected a whole number, or None"),
        ("adapter.targets", "attn", "adapter.targets: found 'attn', expected a tuple, each a text"),
        ("cold_start.weights", {"x": "1"}, "cold_start.weights.x: found '1', expected a number"),
        ("run.alarms", {"x": (1, None)}, "run.alarms.x[1]: found None, expected a number"),
        ("tasks.x.weight", None, "tasks.x.weight: found None, expected a number"),
        ("tasks", {1: 2}, "tasks, a name in it: found 1, expected a text without dots, spaces and control characters"),
        ("tasks", {"x": schema.Pairs()}, "tasks.x: found Pairs(share=1.0, wrong_caption=0.0, degraded=0.0, images='', "
         "test='', rewards={}), expected a section RoutedTask"),
        ("eval", 3, "eval: found 3, expected a section Evaluation"),
        ("model.resolution", "768",
         "model.resolution: found '768', expected a whole number, or a tuple of 2, each a whole number"),
        ("model.resolution", (1, 2, 3),
         "model.resolution: found (1, 2, 3), expected a tuple of 2, each a whole number, or a whole number"),
        ("model.resolution", (768, 0.5), "model.resolution[1]: found 0.5, expected a whole number"),
        ("model.resolution", (768, 0), "model.resolution: found (768, 0), expected pixels a side from 1 to 16384, or "
         "(height, width)"),
    ],
)  # fmt: skip
def test_messages_hold_the_full_name_what_was_found_and_what_is_right(name: str, value: Any, message: str):
    with pytest.raises(ValueError, match="expected") as error:
        resolve(override(valid("opd"), {name: value}))
    assert str(error.value) == message


def test_an_int_that_python_does_not_spell_is_refused_like_any_other():
    assert refusals("opd", {"seed": 10**5000}) == {
        "seed": "seed: found an int of more digits than Python spells, expected a number in [0, 4294967295]"
    }


# ---- ranges at their edges


def edges(field: Field) -> tuple[list[Any], list[Any]] | None:
    """Of the longest name in the table that ends the field's own."""
    own = f"{field.stage}:{field.name}"
    ends = [end for end in RANGES if f".{field.name}".endswith(f".{end}") or end == own]
    return RANGES[max(ends, key=len)] if ends else None


def test_every_field_has_a_range_here_or_is_free():
    for field in LEAVES:
        assert (edges(field) is None) == (field.name in FREE) == (field.metadata["rule"] in (None, PATH)), field.name


def rounds(stage: str, side: int) -> list[dict[str, Any]]:
    """The values of one side, so that each round changes every field that has one more."""
    values = {field.name: found[side] for field in LEAVES if field.stage == stage and (found := edges(field))}
    most = max(map(len, values.values()))
    return [{name: each[k] for name, each in values.items() if k < len(each)} for k in range(most)]


@pytest.mark.parametrize("stage", STAGES)
def test_values_just_outside_a_range_are_refused_by_name(stage: str):
    for changes in rounds(stage, 0):
        lines = refusals(stage, changes)
        assert lines.keys() == changes.keys()
        for name, value in changes.items():
            assert lines[name].startswith(f"{name}: found {value!r}, expected "), lines[name]


@pytest.mark.parametrize("stage", STAGES)
def test_values_at_the_edges_of_a_range_are_taken(stage: str):
    for changes in rounds(stage, 1):
        config = resolve(override(valid(stage), changes))
        assert {name: find(config, name) for name in changes} == changes


def test_several_problems_are_all_told_one_a_line():
    changes = {
        "seed": -1, "model.resolution": 0, "optimizer.betas": (NAN, "x"), "tasks.x.weight": None, "eval": 3,
        "run.mesh.data": 0, "cold_start.weights": {"x": "1", "y": 1.0},
    }  # fmt: skip
    with pytest.raises(ValueError, match="seed") as error:
        resolve(override(valid("opd"), changes))
    names = [line.partition(": found ")[0] for line in str(error.value).splitlines()]
    assert sorted(names) == sorted(
        ["seed", "model.resolution", "optimizer.betas[0]", "optimizer.betas[1]", "tasks.x.weight", "eval",
         "run.mesh.data", "cold_start.weights.x"]
    )  # fmt: skip


@pytest.mark.parametrize(
    "url", ["https://me:secret@host", "http://secret@host:1", "me:secret@host", "http://a:secret/b@c"]
)
def test_a_password_in_a_url_is_refused_and_not_told(url: str):
    found = refusals("opd", {"run.servers.x.urls": ("http://a", url)})["run.servers.x.urls"]
    assert found.startswith("run.servers.x.urls: found ('http://a', '…@")
    assert "secret" not in found


# ---- values of whatever type


def test_options_of_rewards_are_scalars_in_the_types_that_they_have():
    options = {"a": 1, "b": 0.5, "c": "text", "d": True, "e": -(2**63) + 1}
    config = resolve(override(valid("opd"), {"rewards.x.options": options}))
    found = config.rewards["x"].options
    assert found == options
    assert {name: type(value) for name, value in found.items()} == {name: type(each) for name, each in options.items()}
    assert resolve(unflatten(json.loads(json.dumps(flatten(config))))) == config
    assert identity(config)["rewards.x.options.d"] is True
    assert refusals("opd", {"rewards.x.options": {"a": None, "b": 2**63}}) == {
        f"rewards.x.options.{name}": f"rewards.x.options.{name}: found {value}, expected a number within 64 bits, a "
        "text, True or False"
        for name, value in (("a", None), ("b", 2**63))
    }


# ---- what is taken in another form


@pytest.mark.parametrize("stage", STAGES)
def test_an_int_becomes_a_float(stage: str):
    names = [field.name for field in LEAVES if field.stage == stage and field.hint is float]
    config = resolve(override(valid(stage), dict.fromkeys(names, 1)))
    assert {(type(find(config, name)), find(config, name)) for name in names} == {(float, 1.0)}


@pytest.mark.parametrize("stage", STAGES)
def test_lists_become_tuples_and_ints_in_them_floats(stage: str):
    lists = {
        "adapter.targets": ["mlp", "attn"], "optimizer.betas": [0, 0], "eval.tasks": ["x"], "run.reduce_once": ["data"],
        "run.alarms": {"x": [0, 1]}, "run.profile": [1, 2], "model.resolution": [768, 512],
        "run.servers.x.urls": ["http://host"], "eval.also_steps": [4], "eval.also_guidance": [1],
    } | {
        "opd": {"sampler.window": [0, 2], "sampler.trained": [1, 2], "anchor.bound_limits": [1, 2]},
        "grpo": {"window.within": [0, 2]},
        "forward_rl": {"levels.within": [0, 2]},
    }.get(stage, {})  # fmt: skip
    assert lists.keys() == {f.name for f in LEAVES if f.stage == stage and "tuple" in str(f.hint)} - {"health.bands"}
    config = resolve(override(valid(stage), lists))
    found = {name: find(config, name) for name in lists} | {"run.alarms": config.run.alarms["x"]}
    assert {type(value) for value in found.values()} == {tuple}
    assert found == {name: tuple(value) for name, value in (lists | {"run.alarms": [0, 1]}).items()}
    assert {type(each) for name in ("optimizer.betas", "run.alarms") for each in found[name]} == {float}


def test_ints_in_a_dict_become_floats():
    weights = resolve(override(valid("opd"), {"cold_start.weights": {"x": 1, "y": 2}})).cold_start.weights
    assert weights == {"x": 1.0, "y": 2.0}
    assert {type(each) for each in weights.values()} == {float}


# ---- unknown fields, freezing


DICTS = ("tasks", "rewards", "run.servers", "networks", "offline.tasks")
SECTIONS = ["", *(f"{field.name}{'.x' * (field.name in DICTS)}" for field in GROUPS if field.stage == "opd")]


@pytest.mark.parametrize("group", SECTIONS)
def test_an_unknown_field_cannot_be_assigned(group: str):
    config = valid("opd")
    section = find(config, group) if group else config
    known = [each.name for each in dataclasses.fields(section)]
    with pytest.raises(AttributeError, match=f"{type(section).__name__} has no field 'nope', only {known[0]}"):
        section.nope = 1
    with pytest.raises(AttributeError, match="not removed"):
        delattr(section, known[0])
    assert config == valid("opd")


@pytest.mark.parametrize("stage", STAGES)
def test_a_resolved_config_is_frozen(stage: str):
    config = resolve(valid(stage))
    for name in [field.name for field, _ in EVERY if field.stage == stage]:
        group, _, last = name.rpartition(".")
        section, value = (find(config, group) if group else config), find(config, name)
        with pytest.raises(dataclasses.FrozenInstanceError, match=rf"^{last}: settings are frozen"):
            setattr(section, last, value)
        with pytest.raises(AttributeError):
            delattr(section, last)
        with pytest.raises(dataclasses.FrozenInstanceError):
            assign(config, {name: value})
    assert config == resolve(valid(stage))


@pytest.mark.parametrize("name", [*DICTS, "cold_start.weights", "run.alarms"])
def test_entries_of_dicts_are_frozen_too(name: str):
    config = resolve(valid("opd"))
    entries = find(config, name)
    key, value = next(iter(entries.items()))
    changes = [
        lambda: entries.__setitem__("new", value), lambda: entries.__setitem__(key, value),
        lambda: entries.__delitem__(key), lambda: entries.update(new=value), lambda: entries.__ior__({"new": value}),
        lambda: entries.setdefault("new", value), lambda: entries.pop(key), entries.popitem, entries.clear,
        lambda: assign(config, {f"{name}.new": value}),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(dataclasses.FrozenInstanceError, match="settings are frozen"):
            change()
    assert dict(entries) == {key: value}


def test_resolving_leaves_what_it_is_given_as_it_was():
    config = override(valid("opd"), {"guidance": 1, "adapter.targets": ["attn"]})
    resolve(config)
    assert (type(config.guidance), type(config.adapter.targets), type(config.tasks)) == (int, list, dict)
    config.tasks["y"] = schema.RoutedTask()
    config.run.mesh.data = 3


@pytest.mark.parametrize("copied", [thaw, lambda config: override(config, {})], ids=["thaw", "override"])
@pytest.mark.parametrize("stage", STAGES)
def test_copies_share_nothing_that_can_change(copied: Any, stage: str):
    config = override(valid(stage), {"adapter.targets": ["attn"]})
    for original in (config, resolve(config)):
        before, made = copy.deepcopy(original), copied(original)
        assert made == before
        made.tasks["x"].test = "other"
        made.tasks["y"] = made.tasks["x"]
        made.run.alarms["y"] = (0.0, 1.0)
        made.run.mesh.data = 7
        made.adapter.targets = [*made.adapter.targets, "mlp"]
        if isinstance(original.adapter.targets, list):
            copied(original).adapter.targets.append("mlp")
        assert original == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_frozen_config_survives_copying_and_pickling_frozen(stage: str):
    config = resolve(valid(stage))
    for made in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert made == config
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.seed = 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.tasks["y"] = made.tasks["x"]


def test_two_configs_share_no_default():
    first, second = schema.OPD(), schema.OPD()
    first.tasks["x"], first.run.alarms["x"], first.cold_start.weights["x"] = schema.RoutedTask(), (0.0, 1.0), 1.0
    first.run.mesh.data = 3
    assert second == schema.OPD()
    assert second.run.mesh.data == -1


@pytest.mark.parametrize("step", ["0", "-1", "05", "1.5", "x", "1000000001", "١"])
def test_a_schedule_is_by_numbers_of_steps(step: str):
    lines = refusals("opd", {"tasks.x.schedule": {step: 1.0}})
    assert set(lines) == {"tasks.x.schedule"}
    resolve(override(valid("opd"), {"tasks.x.schedule": {"1": 0.0, "1000000000": 1e6}}))
