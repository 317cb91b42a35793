"""Weights & Biases beside the other metrics: what it gets, how it resumes, and that nothing depends on it."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fopd_jax import main
from fopd_jax.config.identity import identity
from fopd_jax.config.parse import flatten, resolve
from fopd_jax.config.schema import Config
from fopd_jax.running import tracking, workdir
from fopd_jax.running.metrics import MetricWriter
from fopd_jax.running.preemption import Preempted
from fopd_jax.running.supervision import Supervision
from tests.configs import load
from tests.running.toy import Toy

PICTURE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


class Service(ModuleType):
    """In place of the package. `broken`: calls that fail."""

    def __init__(self, starting_step: int = 0, broken: tuple[str, ...] = ()) -> None:
        super().__init__("wandb")
        self.starting_step, self.broken = starting_step, broken
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[int] = []

    def _may(self, call: str) -> None:
        if call in self.broken:
            raise ConnectionError(f"{call}: no route\nto host")

    def init(self, **settings: Any) -> "Service":
        self._may("init")
        self.started.append(settings)
        return self

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        self._may("log")
        self.logged.append((step, dict(values)))

    def finish(self, *, exit_code: int) -> None:
        self._may("finish")
        self.finished.append(exit_code)

    def Html(self, page: str) -> tuple[str, str]:
        return "page", page

    def Image(self, picture: np.ndarray) -> tuple[str, bytes]:
        return "image", picture.tobytes()


Install = Callable[[Service | None], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts something in place of the package; None: it is not installed."""
    return lambda service: monkeypatch.setitem(sys.modules, "wandb", service)


def _config(project: str = "distillation", **run: Any) -> Config:
    changes = {"run.wandb": project, "run.steps": 4, "run.checkpoint_every": 2, "run.eval_every": 2}
    return resolve(load(**changes | {f"run.{name}": value for name, value in run.items()}))


def _start(folder: Path, config: Config | None = None) -> tracking.Tracker | None:
    config = config or _config()
    return tracking.start(config.run.wandb, config.name, flatten(config), folder)


def _train(config: Config, folder: Path, stage: Any = None) -> list[dict[str, float]]:
    """What the program does around the loop; returns the lines of metrics."""
    workdir.check(folder, identity(config))
    workdir.claim(folder, identity(config))
    _, writer = main.train(config, folder, stage or Toy(), Supervision())
    writer.write_scalars(config.run.steps, {}, {"goodput/step": 0.75})
    writer.write_texts(config.run.steps, {"final/table": "a < b\n"})
    writer.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_gets_every_scalar_and_picture_at_its_step(tmp_path: Path, install: Install):
    install(service := Service())
    config = _config(alarms={})
    lines = _train(config, tmp_path / "run")
    *scalars, goodput, table = [(step, values) for step, values in service.logged if "samples" not in values]
    clocked = ("time/", "memory/")
    assert [(step, {n: v for n, v in values.items() if not n.startswith(clocked)}) for step, values in scalars] == [
        (line.pop("step"), line) for line in lines
    ]
    assert goodput == (4, {"goodput/step": 0.75})
    assert table == (4, {"final/table": ("page", "<pre>a &lt; b\n</pre>")})
    assert any("time/step_seconds" in values for _, values in scalars)
    assert [values for _, values in scalars if "eval/score" in values]
    pictures = {step: values["samples"] for step, values in service.logged if "samples" in values}
    assert pictures == {step: ("image", np.full((2, 2, 3), step, np.uint8).tobytes()) for step in (2, 4)}
    steps = [step for step, _ in service.logged]
    assert steps == sorted(steps)  # a history only grows
    assert service.finished == [0]


def test_it_is_told_the_experiment(tmp_path: Path, install: Install):
    install(service := Service())
    config = _config()
    assert _start(tmp_path, config)
    (settings,) = service.started
    assert (settings["project"], settings["name"], settings["dir"]) == ("distillation", "miniature", str(tmp_path))
    assert settings["config"] == flatten(config)
    assert settings["config"]["optimizer.learning_rate"] == config.optimizer.learning_rate


def test_a_workdir_is_resumed_as_the_same_run(tmp_path: Path, install: Install):
    install(service := Service())
    for folder in ("one", "one", "two"):
        (tmp_path / folder).mkdir(exist_ok=True)
        _start(tmp_path / folder)
    (tmp_path / "one").rename(tmp_path / "moved")
    _start(tmp_path / "moved")
    first, again, other, moved = (settings["id"] for settings in service.started)
    assert first == again == moved != other
    assert {settings["resume"] for settings in service.started} == {"allow"}


def test_what_a_resumed_run_repeats_is_not_written_again(tmp_path: Path, install: Install):
    install(service := Service(starting_step=3))
    _train(_config(alarms={}), tmp_path / "run")
    assert {step for step, _ in service.logged} == {3, 4}


def test_a_failed_run_is_marked_as_one(tmp_path: Path, install: Install):
    install(service := Service())

    def failing(state: Any, batch: Any) -> Any:
        raise KeyError("the step")

    with pytest.raises(KeyError):
        _train(_config(), tmp_path / "run", Toy(failing))

    def stopped(state: Any, batch: Any) -> Any:
        raise Preempted(15, 1, 0.1)

    with pytest.raises(Preempted):
        _train(_config(), tmp_path / "run", Toy(stopped))
    assert service.finished == [1, 143]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_failing_service_stops_nothing(
    tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str], call: str
):
    install(Service())
    expected = _train(_config(alarms={}), tmp_path / "well")
    capsys.readouterr()
    install(service := Service(broken=(call,)))
    assert _train(_config(alarms={}), tmp_path / "ill") == expected
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert f"run.wandb: ConnectionError: {call}: no route to host; nothing more is written there" in warnings[0]
    assert bool(service.logged) == (call == "finish")


def test_without_the_package_the_error_comes_first(tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch):
    install(None)
    monkeypatch.setattr(main, "find_stage", lambda config: pytest.fail("built before the input was checked"))
    with pytest.raises(ValueError, match=r"run\.wandb: .*pip install 'fopd_jax\[wandb\]'"):
        main.prepare(_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_its_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights & Biases leaves a folder `wandb` where programs run, which Python would import."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    try:
        with pytest.raises(ValueError, match=r"run\.wandb: wandb is not installed"):
            tracking.check("distillation")
    finally:
        sys.modules.pop("wandb", None)


def test_nobody_imports_it_unasked(tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch):
    install(None)
    tracking.check("")
    assert _start(tmp_path, _config("")) is None
    monkeypatch.setattr(tracking, "is_main", lambda: False)
    tracking.check("distillation")
    assert _start(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_only_process_0_writes(tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch):
    install(service := Service())
    tracker = _start(tmp_path)
    monkeypatch.setattr("fopd_jax.running.metrics.is_main", lambda: False)
    writer = MetricWriter(tmp_path, 0, tracker)
    writer.write_scalars(1, {"train/loss": 1.0})
    writer.write_images(1, {"samples": PICTURE})
    writer.close()
    assert not service.logged
