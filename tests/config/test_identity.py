"""What identifies a run: what deviates from the schema's defaults, in any version's names, in no file's order."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.config import parse, schema
from fopd_jax.config.identity import config_hash, default_of, fields_hash, identity, left_out, normalise
from fopd_jax.config.parse import find, flatten, override, resolve, thaw
from fopd_jax.config.schema import OPD, FlowMatching, Pairs, RoutedTask
from fopd_jax.config.section import setting
from tests.config.fields import LEAVES, STAGES, as_then, valid

EARLIER = json.loads((Path(__file__).parent / "earlier.json").read_text())
EXTENDABLE = (  # of the version before: left out of its identity
    "steps", "log_every", "checkpoint_every", "eval_every", "keep_checkpoints", "mesh", "conditioning_cache",
    "encode_batch_size", "keep_best", "max_skipped_steps", "alarms", "watchdog_seconds", "watchdog_abort",
)  # fmt: skip
# Another value than the default for each type; choices and ranges have their own.
OTHER: dict[Any, Any] = {
    int: 7,
    int | tuple[int, int]: (768, 512),
    float: 0.25,
    float | None: 0.25,
    str: "other",
    tuple[int, int] | None: (0, 2),
    tuple[str, ...]: ("x", "y"),
    tuple[int, ...]: (4, 8),
    tuple[float, ...]: (1.5,),
    dict[str, float]: {"x": 0.5},
    dict[str, Any]: {"x": "y"},
}
CHOSEN: dict[str, Any] = {
    "model.dtype": "float32", "trained": "params", "sampler.trained": (1, 2), "transition": "cps",
    "method": "none", "merge": "factors", "servers.x.urls": ("http://host",),
    "objective.name": "direct", "grpo:objective.name": "guard",
    "forward_rl:objective.name": "awm", "reward": "log_ratio", "weighting": "ode", "export": "raw",
    "optimizer.betas": (0.5, 0.5), "cold_start.weights": {"x": 0.5}, "adapter.targets": ("mlp",),
    "reduce_once": (), "schedule": {"5": 0.5}, "lag": 1, "advantages.normalise": "each", "decoding.dtype": "bfloat16",
    "moves": "slide", "step_weighting": "noise", "distribution": "uniform", "kl_weighting": "ode",
    "networks.x.dtype": "float32",
    "match": "branches", "routing.method": "soft", "attention": "xla", "kernels": "xla", "remat": "none",
    "keep_best": "max:x",
    "surrogate": "dppo", "teacher_guidance": "own",
    "run.alarms": {"other": (0.0, 2.0)}, "anchor.moves": "ema", "bound_limits": (0.5, 1.0), "target": "velocity",
    "noisy": "weigh", "health.bands": {"size": (0.0, 2.0)}, "joint_target": "sum", "joint": 0.125, "high": 1.5,
}  # fmt: skip


def other(stage: str, name: str, hint: Any, found: Any) -> Any:
    """A valid value that is not the one found."""
    ends = (end for end in CHOSEN if f".{name}".endswith(f".{end}") or end == f"{stage}:{name}")
    chosen = [CHOSEN[end] for end in ends]
    return chosen[-1] if chosen else not found if hint is bool else OTHER[hint]


def earlier_identity(which: str) -> dict[str, Any]:
    """As that version wrote it into a workdir."""
    fields = EARLIER[which]["fields"]
    return {name: value for name, value in fields.items() if name.split(".")[0] not in EXTENDABLE}


def today(which: str) -> Any:
    return resolve(as_then(which))


# ---- what is in it


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_left_out(stage: str):
    config = resolve(valid(stage))
    assert identity(config) == {"stage": stage, "name": "any", "tasks": ["x"]} | (
        {"offline.tasks": ["x"]} if stage == "opd" else {}
    )
    for field in LEAVES:
        if field.stage == stage and not field.name.startswith(("cold_start.weights", "run.alarms")):
            blank = STAGES[stage](tasks=config.tasks, rewards=config.rewards)
            blank.run.servers = config.run.servers
            if stage == "opd":
                blank.networks, blank.offline.tasks = config.networks, config.offline.tasks
            value = find(blank, field.name)
            assert default_of(stage, field.name) == (list(value) if isinstance(value, tuple) else value), field


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_counts_but_those_of_run(stage: str):
    """And, where teachers are weighed by their health, how."""
    config = valid(stage)
    if stage == "opd":
        config.health.noisy, config.health.weight = "weigh", 0.75
    config = resolve(config)
    before = config_hash(config)
    hashes = []
    for field in LEAVES:
        if field.stage == stage and field.name != "stage":
            value = other(stage, field.name, field.hint, find(config, field.name))
            value = "warn" if field.name == "health.noisy" else value
            changed = resolve(override(config, {field.name: value}))
            looks_on = field.name.startswith("run.") or field.name == "health.gaps"
            assert (config_hash(changed) == before) == looks_on, field
            hashes += [] if looks_on else [config_hash(changed)]
    assert len(set(hashes)) == len(hashes) >= 29


def test_looking_on_is_no_part_of_a_run():
    config, looks = valid("opd"), {"gaps": False, "fixed_states": 0, "weight": 0.5, "bands": {}, "noisy": "off"}
    before = config_hash(resolve(config))
    for name, value in looks.items():
        assert config_hash(resolve(override(config, {f"health.{name}": value}))) == before, name
    weighs = resolve(override(config, {"health.noisy": "weigh", "health.fixed_states": 4, "health.gaps": False}))
    assert {name for name in identity(weighs) if name.startswith("health.")} == {"health.noisy", "health.fixed_states"}


def test_an_identity_is_of_json_types_and_its_own_normal_form():
    for which in EARLIER:
        fields = identity(today(which))
        assert json.loads(json.dumps(fields)) == fields
        assert normalise(fields) == fields
        assert fields_hash(fields) == config_hash(today(which))
        assert not any(name.startswith("run.") for name in fields)


def test_a_number_is_the_same_however_it_is_written():
    configs = [resolve(override(valid("opd"), {"guidance": value})) for value in (2, 2.0)]
    assert config_hash(configs[0]) == config_hash(configs[1])
    lists = [resolve(override(valid("opd"), {"optimizer.betas": value})) for value in ([0, 0.5], (0.0, 0.5))]
    assert config_hash(lists[0]) == config_hash(lists[1])


def test_the_order_of_tasks_is_no_matter():
    tasks = {"b": RoutedTask(weight=3.0), "a": RoutedTask(), "c": RoutedTask(test="file")}
    orders = [dict(sorted(tasks.items(), reverse=reverse)) for reverse in (False, True)]
    first, second = (resolve(OPD(name="any", tasks=order)) for order in orders)
    assert config_hash(first) == config_hash(second)
    assert identity(first)["tasks"] == ["a", "b", "c"]
    pairs = [resolve(FlowMatching(name="any", tasks={name: Pairs() for name in names})) for names in ("ab", "ba")]
    assert config_hash(pairs[0]) == config_hash(pairs[1])


def test_a_task_more_is_another_run_even_if_it_says_nothing():
    hashes = {config_hash(resolve(OPD(name="any", tasks={name: RoutedTask() for name in n}))) for n in ("", "a", "ab")}
    assert len(hashes) == 3


def test_images_beside_are_another_run_even_if_they_say_nothing():
    found = [
        resolve(OPD(name="any", offline=schema.Offline(tasks={name: Pairs() for name in n}))) for n in ("", "a", "ab")
    ]
    assert len({config_hash(config) for config in found}) == 3
    fields = identity(found[2])
    assert fields["offline.tasks"] == ["a", "b"]
    assert normalise(fields) == fields


def test_all_tasks_alike_is_what_the_defaults_mean():
    config = override(valid("opd"), {"tasks.y": RoutedTask(), "cold_start.weights": {}})
    same = [{"eval.tasks": ("y", "x")}, {"cold_start.weights": {"y": 0.5, "x": 0.5}}]
    others = [
        {"eval.tasks": ("x",)}, {"cold_start.weights": {"x": 0.5, "y": 0.25}}, {"cold_start.weights": {"x": 0.5}},
        {"cold_start.weights": {"x": 0.5, "y": 0.5, "anchor": 0.5}},
    ]  # fmt: skip
    before = config_hash(resolve(config))
    assert {config_hash(resolve(override(config, change))) for change in same} == {before}
    hashes = {config_hash(resolve(override(config, change))) for change in others}
    assert len(hashes | {before}) == len(others) + 1


@dataclasses.dataclass
class NextSampler(schema.Sampler):
    fresh: float = setting(0.5, "A field of the next version.")


@dataclasses.dataclass
class NextOPD(OPD):
    sampler: NextSampler = setting(NextSampler, "The rollout.")  # type: ignore[assignment]
    more: NextSampler = setting(NextSampler, "A section of the next version.")
    switch: bool = setting(False, "A switch of the next version.")


@pytest.mark.parametrize("which", ["miniature", "sd35m_opd"])
def test_a_new_field_with_a_default_changes_no_hash(which: str, monkeypatch: pytest.MonkeyPatch):
    config, known = today(which), config_hash(today(which))
    monkeypatch.setitem(parse.STAGES, "opd", NextOPD)
    fields = dict(parse.fields_of(thaw(config)))
    made = NextOPD(**fields | {"sampler": NextSampler(**dict(parse.fields_of(config.sampler)))})
    resolved = resolve(made)
    assert flatten(resolved).keys() - flatten(config).keys() >= {"sampler.fresh", "more.fresh", "switch"}
    assert config_hash(resolved) == known
    for change in ({"sampler.fresh": 0.25}, {"more.num_steps": 3}, {"switch": True}):
        assert config_hash(resolve(override(made, change))) != known


def test_a_teachers_guidance_that_is_left_to_its_file_counts_as_the_papers():
    """Which was the default of earlier versions: their workdirs do not hold it."""
    config = override(valid("opd"), {"guidance": 3.0})
    for name in ("tasks.x.guidance", "anchor.guidance"):
        hashes = [config_hash(resolve(override(config, {name: value}))) for value in (None, 4.5, 4.0)]
        assert hashes[0] == hashes[1] != hashes[2]
        assert (default_of("opd", name), left_out("opd", name)) == (None, 4.5)
    assert left_out("opd", "guidance") == 4.5
    assert left_out("opd", "sampler.window") is None


# ---- of the version before


@pytest.mark.parametrize("which", EARLIER)
def test_the_identity_of_the_version_before_becomes_todays(which: str):
    before = earlier_identity(which)
    assert fields_hash(before) == EARLIER[which]["hash"]  # the record is what that version wrote
    assert normalise(before) == identity(today(which))
    assert fields_hash(normalise(before)) == config_hash(today(which))


@pytest.mark.parametrize("which", EARLIER)
def test_a_change_of_any_field_of_the_version_before_is_seen(which: str):
    before, here = earlier_identity(which), identity(today(which))
    for name, value in before.items():
        changed = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "other"
        if parse.current_name(name).startswith("run."):  # what became of it is no part of an identity any more
            assert normalise(before | {name: changed}) == here, name
        elif name == "eval.tasks":
            assert normalise(before | {name: ["other"]}) != here
        elif name != "stage":
            assert normalise(before | {name: changed}) != here, name


def test_a_field_that_no_version_knows_is_kept():
    """So a workdir of a later version is refused instead of mistaken for one of today."""
    fields = identity(resolve(valid("opd")))
    for name in ("later", "sampler.later", "tasks.x.later", "cold_start.weights.later.below"):
        assert normalise(fields | {name: 1})[name] == 1
