"""A config to read: every field stands on one line with its value, its origin and its meaning."""

import json
import re

import pytest

from fopd_jax.config.parse import flatten, override, resolve
from fopd_jax.config.show import describe
from tests.config.fields import STAGES, valid


def shown(stage: str, changes: dict, flags: set[str]) -> dict[str, tuple[object, str, str]]:
    """`{field: (value, origin, meaning)}` as they are read back, and that these are all fields."""
    config = resolve(override(valid(stage), changes))
    lines = [
        re.fullmatch(r"(\S+) += (.+?) +(default|file|flag) +(\S.*)", line)
        for line in describe(config, flags).splitlines()
    ]
    rows = {line[1]: (json.loads(line[2]), line[3], line[4]) for line in lines if line}
    assert all(lines)
    assert {name: value for name, (value, _, _) in rows.items()} == flatten(config)
    assert list(rows) == list(flatten(config))
    return rows


@pytest.mark.parametrize("stage", STAGES)
def test_origins_are_the_default_the_file_or_a_flag(stage: str):
    rows = shown(stage, {"seed": 3, "run.steps": 5, "eval.tasks": ("x",), "run.alarms": {"a": (0, 1)}}, {"seed"})
    files = {"name", "run.steps", "eval.tasks", "run.alarms.a"} | (
        {"cold_start.weights.x"} if stage == "opd" else set()
    )
    assert {name for name, (_, origin, _) in rows.items() if origin == "flag"} == {"seed"}
    assert {name for name, (_, origin, _) in rows.items() if origin == "file"} == files


def test_a_flag_that_gives_its_default_is_a_flag_still():
    assert shown("opd", {}, {"guidance"})["guidance"][1] == "flag"


def test_what_a_flag_of_a_whole_dict_sets_is_of_a_flag():
    rows = shown("opd", {"cold_start.weights": {"x": 0.5, "y": 0.5}}, {"cold_start.weights", "run.wandb"})
    assert {name for name, (_, origin, _) in rows.items() if origin == "flag"} == {
        "cold_start.weights.x", "cold_start.weights.y", "run.wandb",
    }  # fmt: skip


def test_meanings_are_the_schemas_with_the_papers_value():
    rows = shown("opd", {"run.alarms": {"ratio": (0.5, 2.0)}}, set())
    assert rows["tasks.x.guidance"][2] == (
        "The scale under which the teacher is asked; 1: none; None: what its file says, else the paper's. [paper] 4.5"
    )
    assert rows["run.alarms.ratio"][2].startswith("Metrics to warn of outside (low, high)")
    assert rows["cold_start.weights.x"][2].endswith("[paper] the average")
