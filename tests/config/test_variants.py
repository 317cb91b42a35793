"""The same config in other sizes is a config of its own: changed where it says, checked, and no alias of the first."""

import pytest

from fopd_jax.config.parse import flatten, resolve
from fopd_jax.config.schema import RoutedTask
from fopd_jax.config.variants import smoke, split_variant, with_batch, with_teachers
from tests.config.fields import STAGES, valid
from tests.configs import load


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_size_changes_nothing_else(stage: str):
    config = resolve(valid(stage))
    changed = with_batch(config, 24)
    assert changed.batch_size == 24
    assert {k for k, v in flatten(changed).items() if flatten(config)[k] != v} == {"batch_size"}
    with pytest.raises(ValueError, match=r"^batch_size: found 0, expected at least 1, at most"):
        with_batch(config, 0)


def test_any_number_of_teachers_are_its_own_in_turn():
    config = load()
    own = [config.tasks["text"], config.tasks["composition"]]
    for count in (1, 2, 5):
        changed = with_teachers(config, count)
        assert {name: task.teacher for name, task in changed.tasks.items()} == {
            f"task{k}": own[k % 2].teacher for k in range(count)
        }
        flat, before = flatten(changed), flatten(resolve(config))
        assert {k for k, v in flat.items() if before.get(k) != v and not k.startswith("tasks.")} == set()
    own[0].weight = 7.0
    assert changed.tasks["task0"].weight == 1.0


@pytest.mark.parametrize(
    ("variant", "known", "expected"),
    [
        ("", (), ("", False)),
        ("smoke", (), ("", True)),
        ("", ("a", "b"), ("a", False)),
        ("smoke", ("a", "b"), ("a", True)),
        ("b", ("a", "b"), ("b", False)),
        ("b:smoke", ("a", "b"), ("b", True)),
    ],
)
def test_a_variant_is_a_choice_and_a_size(variant: str, known: tuple[str, ...], expected: tuple[str, bool]):
    assert split_variant(variant, known) == expected


@pytest.mark.parametrize("variant", ["c", "smoke:a", "a:b", "a:b:smoke", "a:smoke:smoke", "A", "a:", "smoke "])
def test_an_unknown_variant_is_named_with_what_there_is(variant: str):
    with pytest.raises(ValueError) as error:
        split_variant(variant, ("a", "b"))
    assert str(error.value) == f"variant: found {variant!r}, expected a or b or smoke, or CHOICE:smoke"


@pytest.mark.parametrize("stage", STAGES)
def test_a_smoke_config_needs_no_file_whatever_the_config_names(stage: str):
    config = valid(stage)
    config.model.path = "there/weights"
    config.tasks["x"].test = "there/test.txt"
    if stage == "opd":
        config.tasks = {"x": RoutedTask("there/teacher", "there/train.txt", "there/test.txt")}
        config.anchor.adapter = "there/anchor"
    small = resolve(smoke(config))
    assert small.name == "any_smoke"
    assert not any("there" in str(value) for value in flatten(small).values())
    assert list(small.tasks) == ["composition", "text"]
    assert small.run.steps == 2
