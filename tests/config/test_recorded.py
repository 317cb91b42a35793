"""Whole configs kept as JSON: they come back as they were, under the names of any version."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.config.identity import identity
from fopd_jax.config.load import load_config
from fopd_jax.config.parse import flatten, override, resolve, unflatten
from fopd_jax.config.recorded import RECORD_FILE, read_starts
from tests.config.fields import STAGES, valid
from tests.config.test_flags import MINIATURE, error_of, values
from tests.configs import EVERY, load


def _through_json(config: Any) -> Any:
    return resolve(unflatten(json.loads(json.dumps(flatten(config)))))


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_every_config_comes_back(name: str, variant: str):
    config = resolve(load(name, *filter(None, [variant])))
    assert _through_json(config) == config
    assert identity(_through_json(config)) == identity(config)


@pytest.mark.parametrize("stage", STAGES)
def test_dicts_hold_what_they_held_and_not_what_they_hold_by_default(stage: str):
    changes = {"run.alarms": {}, "run.profile": (2, 5), "model.resolution": (768, 512), "eval.tasks": ("x",)}
    config = resolve(override(valid(stage), changes))
    assert _through_json(config) == config
    config = resolve(override(config, {"run.alarms": {"loss": (0.0, 1e-300)}}))
    assert dict(_through_json(config).run.alarms) == {"loss": (0.0, 1e-300)}


def test_names_of_earlier_versions_are_understood_and_unknown_ones_named():
    fields = flatten(resolve(load()))
    fields["shift"], fields["steps"] = 2.5, 7
    del fields["model.shift"], fields["run.steps"]
    config = unflatten(fields)
    assert (config.model.shift, config.run.steps) == (2.5, 7)
    for name in ("later", "model.later", "model.shift.later", "tasks.text.later", "later.still", "name.a.b"):
        with pytest.raises(ValueError, match=f"^{re.escape(name)}: no such field"):
            unflatten(fields | {name: 1})
    with pytest.raises(ValueError, match="stage: found 'sft', expected opd or flow_matching or grpo or forward_rl"):
        unflatten(fields | {"stage": "sft"})


# ---- on the command line


def _to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A run's folder that was started twice, the second time for more steps."""
    folder = tmp_path / "a run: the first"
    folder.mkdir()
    starts = [{"config": flatten(resolve(load(**{"seed": 5, "run.steps": steps})))} for steps in (2, 9)]
    (folder / RECORD_FILE).write_text(json.dumps({"starts": starts}))
    return folder


def test_a_workdir_alone_stands_for_the_config_of_its_last_start(workdir: Path):
    found = values("--config.eval.num_steps=3", "--workdir", str(workdir), "--config.tasks.text.weight=2")
    assert (found["seed"], found["run.steps"], found["eval.num_steps"], found["tasks.text.weight"]) == (5, 9, 3, 2.0)
    # A config that is given is the one that counts.
    assert values(MINIATURE, f"--workdir={workdir}")["seed"] == 0


def test_what_is_no_runs_folder_is_one_line(workdir: Path, tmp_path: Path):
    assert error_of() == "--config: missing, expected --config=FILE.py, or --workdir=DIR of a run"
    expected = "no such file, which every run writes into its --workdir; give --config"
    assert error_of(f"--workdir={tmp_path}") == f"{tmp_path}/run.json: {expected}"
    for content in ('{"starts": [', '{"starts": [3]}', "[" * 100_000):
        (workdir / RECORD_FILE).write_text(content)
        with pytest.raises(ValueError, match=r"run\.json: damaged, expected .*; give --config once$"):
            load_config(workdir / RECORD_FILE)
    assert error_of(f"--workdir={workdir}").startswith(f"{workdir}/run.json: damaged, expected the starts of a run")


@pytest.mark.parametrize(
    ("make", "problem"), [(Path.mkdir, "Is a directory"), (os.mkfifo, "a pipe"), (_to_nothing, "No such file")]
)
def test_what_is_in_a_records_way_is_told(make: Callable[[Path], None], problem: str, tmp_path: Path):
    make(tmp_path / RECORD_FILE)
    with pytest.raises(ValueError, match=rf"run\.json: {problem}.*; give --config once$"):
        load_config(tmp_path / RECORD_FILE)


def test_a_record_of_a_later_version_is_one_line(workdir: Path):
    path = workdir / RECORD_FILE
    starts = read_starts(path)
    starts[-1]["config"]["model.later"] = 1
    path.write_text(json.dumps({"starts": starts}))
    with pytest.raises(ValueError, match=r"run\.json: no config of this version \(model.later: no such field\)"):
        load_config(path)
