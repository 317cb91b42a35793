"""What a run's model card is gathered from: its record, its inputs, the report that belongs to the weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.config.identity import config_hash
from fopd_jax.config.parse import flatten, resolve
from fopd_jax.stages.model_card import gather
from fopd_jax.stages.pipeline import make_pipeline
from tests.configs import load

PYTHON = ["/opt/env/bin/python", "-m", "fopd_jax.main"]
FIRST = ["--config=/data/mine/configs/miniature.py:smoke", "--workdir=/data/runs/a", "--config.seed=3"]
TEACHER = "--config.tasks.text.teacher"
CARD = AdapterCard(preset="miniature", updates=2, version="0.1.0")


@pytest.fixture(scope="module")
def config() -> Any:
    return resolve(load("miniature", "smoke"))


@pytest.fixture(scope="module")
def pipeline(config: Any) -> Any:
    return make_pipeline(config.model, config.run, dict)


def _run(folder: Path, config: Any, *commands: list[str], **more: Any) -> Path:
    """A run's folder with its weights and a record of starts."""
    same = {"config": flatten(config), "config_hash": config_hash(config), "commit": "abc", "versions": {"jax": "1"}}
    starts = [{**same, "command": [*PYTHON, *command], **more} for command in commands]
    (folder / "run.json").write_text(json.dumps({"starts": starts}))
    (folder / "student.safetensors").write_bytes(b"weights")
    return folder


def _gather(folder: Path, config: Any, pipeline: Any) -> Any:
    return gather(folder, folder, config, pipeline, CARD)


def test_the_command_has_what_changes_numbers_and_no_folder_of_a_machine(tmp_path: Path, config: Any, pipeline: Any):
    flags = [*FIRST, TEACHER, "/data/teachers/text.safetensors", "--config.run.steps=9", "--config.run.servers", "{}"]
    facts = _gather(_run(tmp_path, config, flags), config, pipeline)
    assert facts.command == [
        "python", "-m", "fopd_jax.main", "--config=configs/miniature.py:smoke", "--config.seed=3",
        f"{TEACHER}=teachers/text.safetensors", "--config.run.steps=2",
    ]  # fmt: skip
    assert (facts.commit, facts.versions) == ("abc", {"jax": "1"})


def test_a_start_that_names_no_config_leaves_the_command_as_it_was(tmp_path: Path, config: Any, pipeline: Any):
    once = _gather(_run(tmp_path, config, FIRST), config, pipeline)
    assert _gather(_run(tmp_path, config, FIRST, FIRST, ["--workdir=/data/runs/a"]), config, pipeline) == once


@pytest.mark.parametrize("record", [None, "{", '{"starts": []}'])
def test_without_a_record_there_is_no_command(record: str | None, tmp_path: Path, config: Any, pipeline: Any):
    _run(tmp_path, config)
    (tmp_path / "run.json").unlink() if record is None else (tmp_path / "run.json").write_text(record)
    facts = _gather(tmp_path, config, pipeline)
    assert (facts.command, facts.commit, facts.versions) == ([], "", {})


@pytest.mark.parametrize(("steps", "theirs"), [(2, {"text": 0.25}), (1, {})])
def test_only_a_report_of_these_weights_counts(
    steps: int, theirs: dict[str, float], tmp_path: Path, config: Any, pipeline: Any
):
    _run(tmp_path, config, FIRST)
    results = {"steps": steps, "config_hash": config_hash(config), "models": {"student": {"text": 0.25}, "base": {}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "table.txt").write_text("the table\n")
    facts = _gather(tmp_path, config, pipeline)
    assert facts.scores == theirs
    assert facts.table == ("the table\n" if theirs else "")


def test_hashes_of_what_was_read_stand_by_field(tmp_path: Path, config: Any, pipeline: Any):
    noted = {name: {"path": "/a/b/c.txt", "sha256": "ab", "stat": ""} for name in ("model.path", "tasks.text.teacher")}
    (_run(tmp_path, config, FIRST) / "inputs.json").write_text(json.dumps(noted))
    assert _gather(tmp_path, config, pipeline).inputs == {"tasks.text.teacher": ("b/c.txt", "ab")}
