"""Names of fields from outside: overrides, the names of earlier versions, and what is told of those that are none."""

import json
from pathlib import Path

import pytest

from fopd_jax.config.identity import left_out
from fopd_jax.config.parse import RENAMED, assign, current_name, find, flatten, override, resolve
from fopd_jax.config.schema import Config, RoutedTask
from tests.config.fields import EVERY, LEAVES, STAGES, as_then, valid

EARLIER = json.loads((Path(__file__).parent / "earlier.json").read_text())
"""Every field of each config of the version before, by its name then, and the config's hash then."""


# ---- overrides


def test_an_override_reaches_every_field_and_changes_no_other():
    for field in LEAVES:
        config = valid(field.stage)
        marker = object()
        changed = override(config, {field.name: marker})
        assert find(changed, field.name) is marker
        assert config == valid(field.stage)
        assign(changed, {field.name: find(config, field.name)})
        assert changed == config


def test_entries_of_dicts_can_be_changed_added_and_replaced():
    changes = {
        "tasks.x.weight": 3.0, "tasks.y": RoutedTask(weight=2.0), "cold_start.weights.y": 0.5,
        "run.alarms": {"loss": (0.0, 1.0)},
    }  # fmt: skip
    changes |= {"tasks.x.rewards.a": 0.5, "rewards.a.options.b": 3, "run.servers.a.retries": 2}
    config = resolve(override(valid("opd"), changes))
    assert config.tasks["x"].rewards == {"a": 0.5}
    assert (config.rewards["a"].options, config.run.servers["a"].retries) == ({"b": 3}, 2)
    assert {name: task.weight for name, task in config.tasks.items()} == {"x": 3.0, "y": 2.0}
    assert config.cold_start.weights == {"x": 1.0, "y": 0.5}
    assert config.run.alarms == {"loss": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "nope: no such field: 'nope', only name, stage, seed, "),
        ("seeds", "seeds: no such field: 'seeds', did you mean 'seed'?"),
        ("eval.sample", "eval.sample: no such field: 'sample', did you mean 'samples'?"),
        ("run.mesh.nope", "run.mesh.nope: no such field: 'nope', only data, fsdp, tensor"),
        ("tasks.x.nope", "tasks.x.nope: no such field: 'nope', only teacher, prompts, test, guidance, weight"),
        ("tasks.nope.weight", "tasks.nope: no such field: 'nope', only x"),
        ("tasks.items.weight", "tasks.items: no such field: 'items', only x"),
        ("mesh.nope", "run.mesh.nope: no such field: 'nope', only data, fsdp, tensor"),
        ("name.upper", "name.upper: no such field: 'upper', only a value"),
        ("adapter.scale", "adapter.scale: no such field: 'scale', only rank, alpha, targets"),
        ("cold_start.weights.x.y", "cold_start.weights.x.y: no such field: 'y', only a value"),
        ("freeze", "freeze: no such field: 'freeze'"),
        ("eval.tasks[0]", "eval.tasks[0]: no such field: 'tasks[0]', did you mean 'tasks'?"),
        ("", ": no such field: ''"),
        (".", ".: no such field: ''"),
        ("run.", "run.: no such field: ''"),
    ],
)
def test_an_unknown_field_is_refused_with_its_full_name_and_what_is_there(name: str, message: str):
    config = valid("opd")
    with pytest.raises(ValueError, match="no such field") as error:
        assign(config, {name: 1})
    assert str(error.value).startswith(message)
    assert config == valid("opd")


def test_a_stage_has_no_fields_of_the_other():
    for stage, name in (("opd", "empty_caption"), ("opd", "levels.mean"), ("flow_matching", "objective.clip")):
        with pytest.raises(ValueError, match=f"^{name.split('.')[0]}.*: no such field"):
            override(valid(stage), {name: 1})


def test_what_is_no_stage_is_not_resolved():
    with pytest.raises(
        ValueError, match=r"^get_config: found Config, expected .*schema\.OPD or .*FlowMatching or .*learning\.GRPO or "
    ):
        resolve(Config(name="any"))


def test_flat_fields_are_those_of_the_schema():
    for stage in STAGES:
        flat = flatten(resolve(valid(stage)))
        assert json.loads(json.dumps(flat)) == flat
        leaves = {field.name: find(valid(stage), field.name) for field in LEAVES if field.stage == stage}
        dicts = [name for name, value in leaves.items() if isinstance(value, dict) and value]
        entries = {f"{name}.{key}" for name in dicts for key in leaves[name]}
        assert flat.keys() == (leaves.keys() - set(dicts)) | entries


def test_the_order_of_a_dict_is_no_matter():
    first, second = ({name: RoutedTask() for name in names} for names in (("a", "b"), ("b", "a")))
    configs = [resolve(override(valid("opd"), {"tasks": tasks})) for tasks in (first, second)]
    assert [list(config.tasks) for config in configs] == [["a", "b"], ["a", "b"]]


# ---- names of earlier versions


def test_renamed_fields_are_none_of_today_and_become_some():
    names = {field.name for field, _ in EVERY}
    for old, new in RENAMED.items():
        assert old not in names
        assert new in names
        assert current_name(new) == new
        assert current_name(f"{old}.below") == f"{new}.below"
        assert current_name(f"{old}s") == f"{old}s"
    assert {current_name(name) for name in names} == names


@pytest.mark.parametrize("which", EARLIER)
def test_every_field_of_the_version_before_is_a_field_of_today(which: str):
    config = as_then(which)
    fields = EARLIER[which]["fields"]
    assert len(fields) >= 49
    changed = override(config, fields)  # each is there
    assert resolve(changed) == resolve(override(config, {current_name(name): value for name, value in fields.items()}))
    for field, value in fields.items():
        found = find(changed, current_name(field))
        assert found == value, field


@pytest.mark.parametrize("which", EARLIER)
def test_configs_mean_what_they_meant_in_the_version_before(which: str):
    config = resolve(as_then(which))
    flat = flatten(config)
    before = {current_name(field): value for field, value in EARLIER[which]["fields"].items()}
    means = {field: left_out("opd", field) if flat.get(field) is None else flat[field] for field in before}
    differing = {field for field, value in before.items() if means[field] != value}
    same = {"eval.tasks"} | {field for field in before if field.startswith("cold_start.weights.")}  # (), {}: all alike
    assert differing <= same | ({"run.alarms"} if before.get("run.alarms") == {} else set())
