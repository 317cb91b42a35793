"""A workdir is one experiment's: continued by the same one, also of the version before, and refused to any other."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax import main
from fopd_jax.config.identity import identity
from fopd_jax.config.parse import assign, override, resolve
from fopd_jax.performance.compiling import cache_use
from fopd_jax.policy.panel import RoutingTable
from fopd_jax.running import lock, workdir
from fopd_jax.worlds.miniature.pairs import Renderings
from fopd_jax.worlds.miniature.world import make_world
from fopd_jax.worlds.prompt_stream import PromptStream
from tests.config.fields import as_then
from tests.configs import load, prepare
from tests.main import earlier
from tests.main.experiment import Overrides, assert_refused, snapshot


def saved(folder: Path) -> None:
    """As if a run had made a checkpoint."""
    (folder / "checkpoints" / "1").mkdir(parents=True)


def test_a_workdir_of_another_config_is_left_alone(config: Any, tmp_path: Path):
    folder = tmp_path / "run"
    prepare(config, folder)
    saved(folder)
    before = snapshot(folder)
    assign(config, {"seed": 4, "optimizer.learning_rate": 0.5})
    with pytest.raises(ValueError, match="belongs to another config") as error:
        prepare(config, folder)
    assert "seed: 3 there, 4 here" in str(error.value)
    assert "optimizer.learning_rate: 0.01 there, 0.5 here" in str(error.value)
    assert snapshot(folder) == before


def test_bad_input_does_not_touch_a_workdir_in_use(config: Any, tmp_path: Path):
    folder = tmp_path / "run"
    prepare(config, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    config.run.steps = -1
    assert_refused(config, folder, "run.steps: found -1")


def test_fewer_steps_than_the_checkpoint_has_are_refused(config: Any, tmp_path: Path):
    folder = tmp_path / "run"
    prepare(config, folder)
    (folder / "checkpoints" / "3").mkdir(parents=True)
    (folder / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # not whole
    config.run.steps = 2
    assert_refused(config, folder, "run.steps: found 2", str(folder), "step 3")
    config.run.steps = 3
    prepare(config, folder)


def test_what_is_compiled_in_preparation_is_found_by_the_next_workdir(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Prepared(Exception):
        pass

    def train(*_: Any) -> None:
        raise Prepared

    def start(name: str) -> tuple[int, int]:
        """Of the run's first part: programs asked for, and how many of them were compiled."""
        jax.clear_caches()  # as a fresh process
        with cache_use() as use, pytest.raises(Prepared):
            main.run(resolve(config), tmp_path / name)
        return use.requests, use.compiled

    monkeypatch.setattr(main, "train", train)
    monkeypatch.setenv("FOPD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    asked, compiled = start("one")
    assert asked == compiled > 0
    assert len(list((tmp_path / "cache" / "compiled").glob("*-cache"))) == compiled
    asked, compiled = start("two")
    assert asked > 0
    assert compiled == 0


# ---- of the version before

CONFIGS = {"miniature": "miniature", "miniature_teacher": "miniature_teacher:text"}
FIELDS = {"miniature": earlier.MINIATURE, "miniature_teacher": earlier.MINIATURE_TEACHER}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_experiment_goes_on_under_the_hash_that_it_has(name: str, tmp_path: Path):
    config, folder = as_then(CONFIGS[name]), tmp_path / "run"
    earlier.write(folder, FIELDS[name])
    before = snapshot(folder)
    for changes in ({}, {"run.steps": 9, "run.remat": "dots", "run.reduce_once": ()}):
        fields = identity(resolve(override(config, changes)))
        workdir.check(folder, fields)
        workdir.claim(folder, fields)
    assert snapshot(folder) == before
    assert workdir.claimed_hash(folder) == earlier.HASHES[name] == earlier.hash_of(FIELDS[name])


@pytest.mark.parametrize(
    ("name", "there", "here", "expected"),
    [
        ("miniature", {"shift": 2.0}, {}, "model.shift: 2.0 there, 3.0 here"),
        ("miniature", {"final_samples": 64}, {}, "eval.final_samples: 64 there, 1024 here"),
        ("miniature", {}, {"objective.mar_beta": 0.02}, "objective.mar_beta: 0.05 there, 0.02 here"),
        ("miniature", {"tasks.text.weight": 3.0}, {}, "tasks.text.weight: 3.0 there, 1.0 here"),
        (
            "miniature",
            {},
            {"tasks.text.teacher": "mine"},
            "tasks.text.teacher: 'packaged:teacher_text.safetensors' there",
        ),
        ("miniature", {"eval.tasks": ["text"]}, {}, "eval.tasks: ['text'] there, [] here"),
        ("miniature", {"cold_start.weights.text": 0.5}, {}, "cold_start.weights.text: 0.5 there, 0.33"),
        ("miniature", {"sampler.window": [1, 3]}, {}, "sampler.window: [1, 3] there, None here"),
        ("miniature", {"noise.colour": "pink"}, {}, "noise.colour: 'pink' there, nothing here"),
        ("miniature_teacher", {"data.batch_size": 32}, {}, "batch_size: 32 there, 64 here"),
        ("miniature_teacher", {"data.empty_caption": 0.5}, {}, "empty_caption: 0.5 there, 0.0 here"),
        ("miniature_teacher", {}, {"tasks.text.share": 0.5}, "tasks.text.share: 0.75 there, 0.5 here"),
    ],
)
def test_another_experiment_is_refused_with_both_values(
    name: str, there: Overrides, here: Overrides, expected: str, tmp_path: Path
):
    folder = tmp_path / "run"
    earlier.write(folder, FIELDS[name] | there)
    saved(folder)
    before = snapshot(folder)
    with pytest.raises(ValueError, match="belongs to another config") as error:
        workdir.check(folder, identity(resolve(override(as_then(CONFIGS[name]), here))))
    _, line = str(error.value).splitlines()  # what differs, and nothing else
    assert line.strip().startswith(expected)
    assert snapshot(folder) == before


def test_a_task_less_is_another_experiment(tmp_path: Path):
    fields = {name: value for name, value in earlier.MINIATURE.items() if not name.startswith("tasks.text.")}
    earlier.write(tmp_path / "run", fields)
    saved(tmp_path / "run")
    with pytest.raises(ValueError, match=r"tasks: \['composition'\] there, \['composition', 'text'\] here"):
        workdir.check(tmp_path / "run", identity(resolve(as_then("miniature"))))


def test_what_is_drawn_stays_what_it_was():
    """Step 7 of both stages, whatever the order of the tasks in the file: workdirs go on with the same prompts."""
    config = load()
    for tasks in (config.tasks, dict(reversed(config.tasks.items()))):
        found = resolve(override(config, {"tasks": tasks}))
        routes = RoutingTable.of_tasks(dict.fromkeys(found.tasks, 1.0), None).routes
        stream = PromptStream(make_world(), found.tasks, routes, batch_size=64, images_per_prompt=1, seed=0)
        drawn = list(zip(*stream.draw(7), strict=True))
        assert drawn[:3] == [
            ("composition", "one blue circle and one green square"),
            ("composition", "two yellow triangles and two yellow circles"),
            ("text", 'sign "7ZZ"'),
        ]
        np.testing.assert_array_equal(stream.batch(7).route[:12], [0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 0])
    teacher = resolve(as_then("miniature_teacher:text"))
    world, (size, empty) = make_world(), (teacher.batch_size, teacher.empty_caption)
    images = Renderings(world.tasks, world.encode, teacher.tasks, size, empty, 0).batch(7, np.arange(size))["x0"]
    expected = [-0.8188242316246033, 0.8185185194015503, -0.7666667103767395, -0.7851852178573608]
    np.testing.assert_allclose(images.mean((1, 2, 3))[:4], expected, rtol=1e-5)


def test_a_workdir_in_which_a_run_lives_is_refused_before_the_stage_is_built(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    workdir.claim(folder, identity(resolve(config)))
    monkeypatch.setattr(main, "find_stage", lambda config: pytest.fail("built"))
    with lock.holding(folder):
        monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
        monkeypatch.setattr(lock, "_may_be_alive", lambda text: True)  # as another process would find it
        monkeypatch.setattr(lock, "_moves", lambda path, seconds: True)
        assert_refused(config, folder, f"{folder}: process ", "is running in it")
