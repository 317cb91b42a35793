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


# ---- ranges: (refused, taken) at the edges, by what a field is named at the end of its dotted name

COUNT, INDEX = ([0, -1], [1, 1000]), ([-1], [0])
POSITIVE, NON_NEGATIVE = ([0.0, -1e-9], [1e-9]), ([-1e-9], [0.0])
PROBABILITY, MIX = ([-1e-9, 1 + 1e-9], [0.0, 1.0]), ([{"x": -1e-9}, {"x": 0.0}], [{}, {"x": 0.0, "y": 1e-9}])
NAME = (["", "a b", "a/b", "a\\b", "a\n", " ", ".", ".."], ["a", "a.b", "...", ".a", "ß-1"])
STEPS = ([(-1, 2), (2, 2), (3, 2), (-2, -1)], [None, (0, 1), (3, 9)])
AXIS = ([0, -2], [-1, 1])
MIX = ([{"x": -1e-9}, {"x": 0.0}], [{}, {"x": 0.0, "y": 1e-9}])


def choice(*names: str) -> tuple[list[Any], list[Any]]:
    return ["", "nope", names[0].upper(), f"{names[0]} ", ",".join((*names, names[0]))], list(names)


RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "name": NAME, "anchor.name": NAME, "opd:objective.name": choice("direct", "clipped", "mixed"),
    "grpo:objective.name": choice("clip", "guard", "dppo"), "forward_rl:objective.name": choice("nft", "awm", "crd"),
    "opd:stage": choice("opd"), "flow_matching:stage": choice("flow_matching"),
    "grpo:stage": choice("grpo"), "forward_rl:stage": choice("forward_rl"),
    "seed": ([-1], [0, 2**32 - 1]), "eval.seed": INDEX, "coordinates.base": PROBABILITY,
    "model.dtype": choice("float32", "bfloat16"), "model.t5_length": COUNT,
    "model.resolution": ([0, -1, (0, 1), (1, 0), (1, 2**14 + 1)], [1, (1, 2), (2**14, 1)]),
    "shift": ([0.0, 9e-4, -1.0], [0.001]), "mean": ([-101.0, 101.0], [-100.0, 0.0]),
    "trained": choice("adapter", "params"), "sampler.trained": STEPS, "sampler.window": STEPS,
    "adapter.rank": COUNT, "adapter.alpha": POSITIVE, "adapter.targets": ([()], [("attn",), ("attn", "mlp")]),
    "batch_size": COUNT, "learning_rate": POSITIVE, "warmup": INDEX,
    "betas": ([(1.0, 0.9), (0.9, 1.0), (-1e-9, 0.9), (0.9, -1e-9)], [(0.0, 0.0), (0.9, 1 - 1e-9)]),
    "weight_decay": NON_NEGATIVE, "clip_norm": POSITIVE, "ema.decay": PROBABILITY, "every": COUNT,
    "eval.samples": COUNT, "final_samples": COUNT, "eval.num_steps": COUNT, "sampler.num_steps": ([1, 0, -1], [2]),
    "guidance": NON_NEGATIVE, "transition": choice("sde", "cps", "ode"),
    "eval.transition": choice("sde", "cps", "ode", "dpm2"), "rollouts.transition": choice("sde", "cps", "ode", "dpm2"),
    "noise_level": NON_NEGATIVE, "teacher_steps": COUNT, "also_steps": ([(0,), (4, -1)], [(), (8, 4)]),
    "high": ([0.9, 2.1], [1.0, 2.0]), "joint_target": choice("sum", "routed"),
    "run.steps": INDEX, "log_every": COUNT, "checkpoint_every": COUNT, "eval_every": INDEX, "keep_checkpoints": COUNT,
    "keep_best": (["max", "max:", "most:text", "text", " max:text"], ["", "max:text", "min:a/b"]),
    "mesh.data": AXIS, "mesh.fsdp": AXIS, "mesh.tensor": AXIS,
    "reduce_once": ([("fsdp",), ("fsdp", "data"), ("tensor",)], [(), ("data",), ("data", "fsdp")]),
    "attention": choice("auto", "xla", "cudnn", "splash"), "remat": choice("full", "attention", "dots", "none"),
    "max_skipped_steps": INDEX, "alarms": ([{"x": (1.0, 0.0)}], [{}, {"x": (1.0, 1.0), "y": (-1e300, 1e300)}]),
    "watchdog_seconds": NON_NEGATIVE, "profile": STEPS, "stop_seconds": ([0.0, 0.09, 1e6 + 1], [0.1, 1e6]),
    "weight": NON_NEGATIVE, "method": choice("merge", "adapter", "none"), "merge": choice(*teaching.MERGES),
    "cold_start.weights": ([{"x": -1e-9}, {"x": 0.0}, {"x": -1.0, "y": 2.0}], [{}, {"x": 0.0, "y": 1e-9}]),
    "reward": choice("kl", "log_ratio", "kl_detached"), "weighting": choice(*teaching.WEIGHTINGS),
    "clip": POSITIVE, "reward_limit": POSITIVE, "mar_beta": NON_NEGATIVE, "images_per_prompt": COUNT,
    "updates_per_rollout": COUNT, "minibatches": COUNT, "export": choice("ema", "raw"),
    "share": NON_NEGATIVE, "wrong_caption": PROBABILITY, "degraded": PROBABILITY, "std": NON_NEGATIVE,
    "empty_caption": PROBABILITY, "tasks.x.rewritten": PROBABILITY, "wrong": PROBABILITY, "top": INDEX,
    "bands": ([{"size": (1.0, 0.0)}, {"x": (0.0, 1.0)}], [{}, {"spread": (0.0, 1e30)}]),
    "also_guidance": ([(-1e-9,), (1.0, 101.0)], [(), (0.0, 4.5)]),
    "coordinates.rank": INDEX, "alone": PROBABILITY, "joint": PROBABILITY,
    "tasks.x.rewards": ([{"x": -1e-9}, {"x": 1001.0}], [{}, {"x": 0.0}, {"x": 0.5, "y": 1000.0}]),
    "rewards.x.kind": (
        ["a b", "a.b", ":f", "a:", "a:b:c", "a-b:f", "1a:f", "a..b:f", "a/b:f", "a:f()"],
        ["", "ocr", "clip-score", "a:f", "a.b_c.d2:_f"],
    ),
    "tasks.x.schedule": ([{"1": -1e-9}, {"0": 1.0}, {"x": 1.0}], [{}, {"1": 0.0}, {"7": 0.5, "1000000000": 1e6}]),
    "lag": ([-1, 2], [0, 1]), "micro_batches": COUNT, "decoding.batch_size": COUNT,
    "decoding.dtype": choice("float32", "bfloat16"), "advantages.normalise": choice("global", "group", "each"),
    "teacher_weight": NON_NEGATIVE, "task_weight": NON_NEGATIVE, "kl_beta": NON_NEGATIVE, "old_beta": NON_NEGATIVE,
    "beta": POSITIVE, "divergence": NON_NEGATIVE, "reference_guidance": NON_NEGATIVE, "window.within": STEPS,
    "levels.within": STEPS, "window.size": INDEX, "window.every": COUNT, "moves": choice("none", "slide", "random"),
    "kl_weighting": choice(*teaching.WEIGHTINGS), "step_weighting": choice("uniform", "noise"),
    "times": INDEX, "distribution": choice("schedule", "uniform", "logit_normal"), "old.start": PROBABILITY,
    "old.slope": PROBABILITY, "old.wait": INDEX, "old.limit": PROBABILITY, "rollouts.num_steps": ([1, 0, -1], [2]),
    "grpo:images_per_prompt": ([1, 0], [2]), "forward_rl:images_per_prompt": ([1, 0], [2]),
    "extrapolation": ([-1.1, 10.1], [-1.0, 0.5, 10.0]), "match": choice("guided", "conditional", "branches"),
    "branch_weight": NON_NEGATIVE, "mix": MIX, "noisy_mix": MIX, "bound_rate": POSITIVE,
    "anchor.moves": choice("none", "ema", "slow"), "anchor.decay": PROBABILITY, "anchor.bound": NON_NEGATIVE,
    "bound_limits": ([(0.0, 1.0), (1.0, 0.5), (1.0, 1001.0)], [(1e-12, 1e-12), (0.5, 1000.0)]),
    "routing.method": choice("hard", "soft", "classifier"), "temperature": ([0.0, 9e-4, 1001.0], [0.001, 1000.0]),
    "health.weight": PROBABILITY, "noisy": choice("warn", "weigh", "off"), "fixed_states": INDEX,
    "eval.coordinates": ([{"x": -10.1}, {"y": 10.1}], [{}, {"x": -10.0, "y": 10.0}]),
    "density": ([0.0, 1.1], [1.0]), "target": choice("data", "velocity"),
    "divide_by": POSITIVE, "max_failed_rewards": PROBABILITY, "timeout": POSITIVE, "retries": INDEX,
    "servers.x.urls": (
        [(each,) for each in (
            "", "host:80", "ftp://host", "http://", "http://:80",
            "http://host:port", "http://host:99999", "http://host:0", "http://[::1", "http://host/?token=a",
            "http://host/#a", "http://ho st",
        )],
        [(), ("http://127.0.0.1:18085",), ("https://host", "http://[::1]:80/a/b")],
    ),
}  # fmt: skip
FREE = {  # of any value of their type: paths, names that are looked up where they are used, switches
    "model.preset", "model.path", "eval.tasks", "run.encoding.cache", "run.encoding.resident", "run.watchdog_abort",
    "run.compiled", "run.wandb", "tasks.x.teacher", "tasks.x.prompts", "tasks.x.test", "tasks.x.images",
    "whole_teachers", "anchor.adapter", "one_timestep", "objective.window_only", "objective.normalise",
    "rewards.x.weights", "rewards.x.options", "run.servers.x.token_file", "run.one_program", "eval.rewritten",
    "advantages.merge_equal_prompts", "rollouts.shared_noise", "offline.tasks.x.images", "offline.tasks.x.test",
    "health.gaps", "cold_start.adapter",
}  # fmt: skip


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


DICTS = ("tasks", "rewards", "run.servers")
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
