"""A workdir and the config it belongs to."""

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.config.identity import fields_hash, identity
from fopd_jax.config.parse import override
from fopd_jax.config.schema import OPD, RoutedTask
from fopd_jax.files import write_json
from fopd_jax.running import lock, workdir
from fopd_jax.running.workdir import check, check_evaluates, claim


def _config(**changes: Any) -> dict[str, Any]:
    """The identity of a config with some fields changed."""
    return identity(override(OPD(name="x", tasks={"text": RoutedTask("a")}), changes))


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_is_fine_and_checking_makes_nothing(tmp_path: Path):
    check(tmp_path / "runs" / "new", _config())
    assert not (tmp_path / "runs").exists()
    check(tmp_path, _config())
    assert not list(tmp_path.iterdir())


def test_claiming_writes_the_config_once(tmp_path: Path):
    folder = tmp_path / "runs" / "new"
    claim(folder, _config())
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert json.loads((folder / "config.json").read_text()) == _config()
    before = _snapshot(folder)
    check(folder, _config(steps=9))
    claim(folder, _config(steps=9))
    assert _snapshot(folder) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 77),
        ("run.mesh.fsdp", 4),
        ("run.alarms", {"loss": (0.0, 1.0)}),
        ("model.remat", "full"),
        ("run.encoding.cache", "x"),
    ],
)
def test_fields_that_change_no_step_may_change(tmp_path: Path, field: str, value: Any):
    claim(tmp_path, _config())
    check(tmp_path, _config(**{field: value}))
    assert _config(**{field: value}) == _config()


def test_another_config_is_refused_with_every_difference_and_both_values(tmp_path: Path):
    claim(tmp_path, _config())
    (tmp_path / "metrics.jsonl").write_text("mine\n")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    before = _snapshot(tmp_path)
    other = _config(**{"optimizer.learning_rate": 3e-4, "optimizer.betas": (0.8, 0.9), "sampler.window": (0, 2)})
    with pytest.raises(ValueError, match="belongs to another config") as error:
        check(tmp_path, other)
    message = str(error.value)
    assert str(tmp_path) in message
    for difference in (
        "optimizer.learning_rate: 0.0001 there, 0.0003 here",
        "optimizer.betas: [0.9, 0.999] there, [0.8, 0.9] here",
        "sampler.window: None there, [0, 2] here",
    ):
        assert difference in message
    assert "name" not in message.partition("these differ")[2]
    assert _snapshot(tmp_path) == before


def test_a_field_that_is_gone_counts_as_a_difference(tmp_path: Path):
    write_json(tmp_path / "config.json", _config() | {"optimizer.momentum": 0.5})
    write_json(tmp_path / "results.json", {})
    with pytest.raises(ValueError, match=r"optimizer.momentum: 0.5 there, nothing here"):
        check(tmp_path, _config())


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no run's folder \(no config.json\)") as error:
        check(tmp_path, _config())
    assert str(tmp_path) in str(error.value)
    assert _snapshot(tmp_path) == {"thesis.txt": b"mine"}


def test_a_file_in_the_way_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="no run's folder"):
        check(tmp_path / "run", _config())


@pytest.mark.parametrize("content", ["", "{", "[1]", "7"])
def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        check(tmp_path, _config())
    assert str(tmp_path) in str(error.value)


def test_only_process_0_looks_and_writes_and_all_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    waited: list[str] = []
    monkeypatch.setattr(workdir, "barrier", waited.append)
    monkeypatch.setattr(workdir, "is_main", lambda: False)
    (tmp_path / "something.txt").write_text("no run's folder")
    check(tmp_path, _config())
    claim(tmp_path / "new", _config())
    assert waited == ["the workdir is checked", "the workdir is claimed"]
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(workdir, "is_main", lambda: True)
    check(tmp_path / "new", _config())
    claim(tmp_path / "new", _config())
    assert len(waited) == 4


# ---- until something is saved


LEFT = {"config.json", "inputs.json", "metrics.jsonl", "tensorboard", "checkpoints", "goodput.json", "wandb.json"}


def _fail(folder: Path, config: dict[str, Any]) -> None:
    """What a run leaves that failed before its first checkpoint: one of its saves was under way."""
    claim(folder, config)
    for name in LEFT - {"config.json", "tensorboard", "checkpoints"}:
        (folder / name).write_text("{}\n")
    (folder / "tensorboard").mkdir()
    (folder / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "run.json").write_text('{"starts": []}')


def test_a_run_that_saved_nothing_does_not_block_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _fail(tmp_path, _config())
    (tmp_path / "compiled").mkdir()
    before, other = _snapshot(tmp_path), _config(**{"optimizer.learning_rate": 3e-4})
    check(tmp_path, other)
    assert _snapshot(tmp_path) == before
    claim(tmp_path, other)
    (line,) = capsys.readouterr().err.splitlines()
    aside = f"failed_{fields_hash(_config())}"
    assert line == (
        f"warning: {tmp_path}: the run of another config that was here saved nothing; what it left is in {aside}/"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "run.json", "compiled", aside}
    assert {path.name for path in (tmp_path / aside).iterdir()} == LEFT
    assert json.loads((tmp_path / "config.json").read_text()) == other
    check(tmp_path, other)
    # Again and again, also under a config that was there before.
    claim(tmp_path, _config())
    claim(tmp_path, other)
    assert {path.name for path in tmp_path.glob("failed_*")} == {
        aside, f"failed_{fields_hash(other)}", f"{aside}_2",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["checkpoints/20", "checkpoints/20.damaged", "results.json", "samples.png"])
def test_what_a_run_saved_blocks_its_folder(tmp_path: Path, name: str):
    _fail(tmp_path, _config())
    (Path.touch if name.endswith((".json", ".png")) else Path.mkdir)(tmp_path / name)
    before = _snapshot(tmp_path)
    with pytest.raises(ValueError, match="belongs to another config"):
        check(tmp_path, _config(seed=1))
    with pytest.raises(ValueError, match="belongs to another config"):  # saved since it was checked
        claim(tmp_path, _config(seed=1))
    assert _snapshot(tmp_path) == before


def test_a_run_that_lives_keeps_its_folder_although_it_has_saved_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _fail(tmp_path, _config())
    with lock.holding(tmp_path):
        monkeypatch.setattr(lock, "_may_be_alive", lambda text: True)  # as another process would find it
        monkeypatch.setattr(lock, "_moves", lambda path, seconds: True)
        before = _snapshot(tmp_path)
        with pytest.raises(ValueError, match="is running in it"):
            claim(tmp_path, _config(seed=1))
        assert _snapshot(tmp_path) == before


def test_a_write_that_was_killed_does_not_block_a_folder(tmp_path: Path):
    (tmp_path / ".config.json.0123.tmp").touch()
    check(tmp_path, _config())


def test_evaluations_may_differ_in_how_they_evaluate_alone(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no run's folder \(no config.json\)"):
        check_evaluates(tmp_path, _config())
    claim(tmp_path, _config())
    check_evaluates(tmp_path, _config(**{"eval.num_steps": 7, "run.steps": 3}))
    with pytest.raises(ValueError, match=r"(?s)only the fields of `run` and `eval` .* seed: 0 there, 1 here") as error:
        check_evaluates(tmp_path, _config(**{"eval.num_steps": 7, "seed": 1}))
    assert "num_steps" not in str(error.value)


@pytest.mark.parametrize("text", ['{"stage": []}', '{"stage": "opd", "eval.tasks": 3}', "[" * 100000])
def test_values_that_no_config_has_are_damage(text: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged.*; choose another --workdir$"):
        workdir.check(tmp_path, {"stage": "opd"})


def test_a_pipe_in_the_place_of_a_config_is_told_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json: found neither a file nor a folder, where a run has a file"):
        check(tmp_path, _config())


def _to_nothing(path: Path) -> None:
    path.symlink_to("not_mounted")


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, _to_nothing])
def test_what_stands_in_the_place_of_a_folder_is_refused(make: Any, name: str, tmp_path: Path):
    """A link to a disk that is not mounted: a run that began again would go over what it has recorded."""
    claim(tmp_path, _config())
    make(tmp_path / name)
    with pytest.raises(
        ValueError,
        match=rf"{name}: found (a file|neither .*|a link to nothing), where a run has a folder that it fills",
    ):
        check(tmp_path, _config())


@pytest.mark.parametrize("name", ["results.json", "student.safetensors", "metrics.jsonl", "run.json", "samples.png"])
@pytest.mark.parametrize(
    ("make", "what"),
    [(Path.mkdir, "a folder"), (os.mkfifo, "neither a file nor a folder"), (_to_nothing, "a link to nothing")],
)
def test_what_stands_in_the_place_of_a_file_is_refused_at_the_beginning(
    make: Any, what: str, name: str, tmp_path: Path
):
    claim(tmp_path, _config())
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: found {what}, where a run has a file that it writes; move it away"):
        check(tmp_path, _config())


def test_checkpoints_that_cannot_be_saved_are_told_before_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As whoever is not root meets a folder without permission."""
    claim(tmp_path, _config())
    (tmp_path / "checkpoints").mkdir()
    check(tmp_path, _config())
    assert not list((tmp_path / "checkpoints").iterdir())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"^--workdir: .*checkpoints cannot be written \(Permission denied\)$"):
        check(tmp_path, _config())
