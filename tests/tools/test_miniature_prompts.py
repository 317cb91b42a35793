"""`tools/miniature_prompts.py`: files that tasks beside the miniature's own read, and the configs that do."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fopd_jax import main
from fopd_jax.config.parse import resolve
from fopd_jax.tasks.prompts import read_tasks
from fopd_jax.worlds.miniature.prompts import prompts
from tests.configs import VARIANTS, load


@pytest.fixture
def folder(load_script: Callable[[str], ModuleType], tmp_path: Path) -> Path:
    load_script("tools/miniature_prompts.py").main(["--dst", str(tmp_path / "below" / "prompts")])
    return tmp_path / "below" / "prompts"


def config_of(variant: str, folder: Path) -> Any:
    config = load("miniature_teachers", variant)
    for task in config.tasks.values():
        for field in ("prompts", "test"):
            setattr(task, field, getattr(task, field).replace("runs/miniature_prompts", str(folder)))
    return config


@pytest.mark.parametrize("variant", VARIANTS["miniature_teachers"])
def test_tasks_read_all_prompts_each_once(variant: str, folder: Path) -> None:
    config = config_of(variant, folder)
    tasks = read_tasks({name: task for name, task in config.tasks.items() if task.prompts})
    for split in ("train", "test"):
        expected = [prompt for skill in ("text", "composition") for prompt in prompts(skill, split)]
        found = [prompt for task in tasks.values() for prompt in getattr(task, split)]
        assert sorted(found) == sorted(expected)
    for name, task in tasks.items():
        skill, _, part = name.partition("_")
        if part:
            assert set(task.train) <= set(prompts(skill, "train"))
            share = len(task.train) / len(prompts(skill, "train"))
            assert share == pytest.approx(2 / int(variant), rel=0.15)


@pytest.mark.parametrize("variant", ["3", "8"])
def test_a_run_of_them_would_begin(
    variant: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.check(resolve(config_of(variant, folder)), tmp_path / "run")
    told = capsys.readouterr().out
    assert told.endswith("all is well: nothing was written\n")
    assert {"3": "quality", "8": "composition_4"}[variant] in told


def test_a_folder_that_is_full_is_kept(load_script: Callable[[str], ModuleType], folder: Path) -> None:
    before = (folder / "train.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        load_script("tools/miniature_prompts.py").main(["--dst", str(folder)])
    assert (folder / "train.jsonl").read_bytes() == before
