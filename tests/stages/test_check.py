"""What is refused before anything long begins, and `--check`, which says what a run would do and does none of it."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax import main
from fopd_jax.config.parse import assign, resolve
from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.evaluation import sampler
from fopd_jax.running import resources
from fopd_jax.stages import opd, plan
from fopd_jax.stages.opd import plan_opd
from fopd_jax.stages.plan import check_plan
from fopd_jax.steps.opd import step as opd_step
from fopd_jax.tasks.task import Task
from tests.configs import EVERY, load, smoke_variant

OWN = "fopd_jax.rewards.ocr:quoted_target"  # any function will do: nothing is scored here
NEEDS = [("miniature_pretrain", "mediocre"), ("miniature_large", "")]  # files of others
NEEDS += [each for each in EVERY if each[0] in ("miniature_sft", "miniature_teachers")]
RUNNING = [each for each in EVERY if each[0].startswith("miniature") and each not in NEEDS]
RUNNING += [(name, smoke_variant(variant)) for name, variant in EVERY if "teacher" not in name]


@pytest.fixture(autouse=True)
def nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """No prompt is encoded, no update traced, nothing sampled, no base put onto the devices."""

    def began(*args: Any) -> None:
        raise AssertionError("something long began before the input was checked")

    monkeypatch.setattr(opd_step, "fused", began)
    monkeypatch.setattr(sampler, "solve", began)
    monkeypatch.setattr(opd.teachers, "load_base", began)
    monkeypatch.setattr(plan.Plan, "prepare", began)


def checked(config: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The lines of `--check` by their first word."""
    main.check(resolve(config), folder)
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "all is well: nothing was written"
    rows = [re.fullmatch(r"(\w+(?: \w+)?)  +(\S.*)", line) for line in lines]
    assert all(rows), lines
    return {row[1]: row[2] for row in rows if row}


@pytest.mark.parametrize(("name", "variant"), RUNNING)
def test_every_config_that_can_run_here_is_checked(
    name: str, variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = load(name, variant)
    rows = checked(config, tmp_path / "run", capsys)
    assert list(tmp_path.iterdir()) == []
    assert rows["run"].startswith(f"{config.name}, stage {config.stage}, config ")
    assert rows["workdir"] == f"{tmp_path / 'run'}, from the beginning"
    assert rows["devices"].startswith(f"{jax.device_count()} of kind 'cpu' in 1 process, mesh data ")
    assert rows["updates"].startswith(f"{config.run.steps:,} of {config.batch_size} samples, ")
    assert re.search(r"[\d.]+ [GT]FLOP each, [\d.]+ [GTP]FLOP in all", rows["updates"])
    assert re.match(r"estimate: [\d.]+ MiB a device are held \(base [\d.]+ [KM]iB, ", rows["memory"])
    assert rows["to encode"].startswith("0 of the ")
    assert ("all of the network" in rows["trains"]) == (config.trained == "params")


@pytest.mark.parametrize("name", ["sd35m_fast", "sd35m_grpo", "sd35m_nft", "sd35m_opd", "sd35m_sft"])
def test_configs_without_their_weights_are_refused_by_the_folder(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^model\.path: weights/sd35m: no such file or folder"):
        main.check(resolve(load(name)), tmp_path / "run")


def test_a_teachers_training_tells_rewards_rollouts_and_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = load("sd35m_grpo", "mix:smoke")
    assign(config, {"tasks.text.rewards": {"text": 0.5, "quality": 0.0}, "lag": 1, "rollouts.num_steps": 10})
    assign(config, {"window.within": (0, 5), "window.size": 3, "window.moves": "random"})
    rows = checked(config, tmp_path / "run", capsys)
    assert rows["rewards"] == "composition (share 1) by composition, text (share 1) by 0.5 text (and quality logged)"
    assert rows["rollouts"] == (
        "2 prompts x 4 images = 8 a step, 10 steps of sde of noise 0.7, guidance 4.5, made while rewards score the one "
        "before"
    )
    assert rows["learning"] == (
        "2 updates a rollout of 4 images, clip at 3 of 10 steps, anywhere within steps 0 to 4, held to the base by 0.04"
    )
    assert re.search(r", rollout [\d.]+ KiB\)", rows["memory"])
    rows = checked(load("sd35m_nft", "smoke"), tmp_path / "run", capsys)
    assert rows["learning"] == (
        "1 update a rollout of 8 images, nft at all noise levels of each (schedule), held to the base by 0.0001"
    )
    assert rows["rollouts"] == "2 prompts x 4 images = 8 a step, 3 steps of dpm2, no guidance"


def test_the_memory_is_that_of_the_shapes():
    config = resolve(load())
    held = plan_opd(config).held()
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in held.items()}
    assert sizes["average"] == sizes["trained"] == 253_952
    assert sizes["bank"] == 3 * sizes["trained"] // 2  # the teachers have half the rank
    assert sizes["optimizer"] == 2 * sizes["trained"] + 2
    assert all(leaf.sharding.mesh.size == jax.device_count() for leaf in jax.tree.leaves(held))


# ---- names of metrics


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"run.alarms": {"los": (0.0, 1.0)}}, r"run\.alarms: no metric 'los', expected some of anchor_gap, clipped, "),
    (
        {"run.keep_best": "max:txt"},
        r"run\.keep_best: found 'max:txt', expected max: or min: one of text, quality, comp",
    ),
    ({"run.keep_best": "max:text", "run.eval_every": 0}, r"run\.keep_best: found 'max:text', which needs evaluations"),
    ({"run.keep_best": "max:composition", "eval.tasks": ("text",)}, r"run\.keep_best: .* one of text, quality$"),
    ({"model.path": "pyproject.toml"}, r"model\.path: pyproject\.toml: damaged"),
    ({"adapter.rank": 49}, r"adapter\.rank: found 49, but the merged layers have rank 48 at most"),
    ({"tasks.text.teacher": "nowhere"}, r"tasks\.text\.teacher: nowhere: no such file"),
    ({"tasks.text.rewards": {"txt": 1.0}}, r"rewards\.txt\.kind: no reward 'txt'; did you mean 'text'\?"),
    ({"rewards": {"txt": RewardConfig()}}, r"rewards\.txt: no task names this reward; did you mean 'text'\?"),
    ({"run.servers": {"x": Server(("http://a",))}}, r"run\.servers\.x: no task names this reward; they name compo"),
    (
        {"tasks.text.rewards": {"a": 1.0}, "rewards": {"a": RewardConfig(kind="nowhere:f")}},
        r"rewards\.a\.kind: cannot import nowhere:f \(ModuleNotFoundError",
    ),
    (
        {"tasks.composition.rewards": {"text": 1.0}},
        r"tasks\.composition\.rewards\.text: OCR prompt '.*' must hold its target text in double quotes",
    ),
    (
        {"tasks.text.rewards": {"composition": 1.0}},
        r"tasks\.text\.rewards\.composition: prompt 'sign \"...\"' asks for text",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
@pytest.mark.parametrize("way", [main.check, main.prepare], ids=["check", "run"])
def test_what_would_fail_later_is_refused_first(
    way: Callable[[Any, Path], Any], changes: dict[str, Any], message: str, tmp_path: Path
):
    config = load()
    assign(config, changes)
    with pytest.raises(ValueError, match=message) as error:
        way(resolve(config), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_scores_that_can_be_kept_are_those_of_the_evaluated_tasks():
    config = load()
    skills = ["text", "quality", "composition", "composition_strict"]
    assert plan_opd(resolve(config)).setup.eval_set.skills() == skills
    assign(config, {"tasks.text.rewards": {"jpg": 1.0, "text": 0.5}, "rewards": {"jpg": RewardConfig(kind=OWN)}})
    assert plan_opd(resolve(config)).setup.eval_set.skills() == ["text", "quality", "jpg", "reward/text", *skills[2:]]


# ---- folders


def test_a_workdir_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder, problem in ((tmp_path / "file" / "run", "is no folder"), (Path("/proc/run"), "cannot be written")):
        with pytest.raises(ValueError, match=rf"^--workdir: .* {problem}"):
            main.check(resolve(load()), folder)


def test_a_disk_without_room_for_a_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = dataclasses.make_dataclass("usage", ["free"])
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda folder: usage(1000))
    with pytest.raises(
        ValueError, match=rf"^--workdir: disk of {tmp_path}: 0\.00 GiB free, 0\.07 GiB needed for a check"
    ):
        main.check(resolve(load()), tmp_path / "run")


# ---- prompts


def test_prompts_are_told_of_before_they_are_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = resolve(load())
    made = plan_opd(config)
    pipeline = made.setup.pipeline
    tasks = {"text": Task("text", ("a", "b"), ("b", "c")), "composition": Task("composition", ("d",), ("e",))}
    reviewed: list[str] = []
    world = dataclasses.replace(
        pipeline.world, tasks=tasks, review=lambda prompts: [*map(reviewed.append, prompts), "3 are cut"][-1:]
    )
    setup = dataclasses.replace(made.setup, pipeline=dataclasses.replace(pipeline, world=world))
    check_plan(dataclasses.replace(made, setup=setup), config, tmp_path)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "warning: tasks.text.test: 1 of 2 prompts are training prompts, too, such as 'b'",
        "warning: prompts: 3 are cut",
    ]
    assert reviewed == ["a", "b", "b", "c", "d", "e"]
    assert np.isfinite(made.cost().model)
