"""The other stage: a teacher trained by the program, under the version before's names, and taught from."""

import json
from pathlib import Path
from typing import Any

from fopd_jax.adapters.lora import Adapter
from fopd_jax.config.parse import assign
from fopd_jax.interop.files.safetensors import load_adapter
from fopd_jax.interop.lora.cards import read_card
from fopd_jax.running.checkpoints import newest_step
from tests.configs import FOLDER, load, prepare
from tests.main.experiment import TINY, Program, assert_refused, command, logged


def test_a_teacher_is_trained_and_can_be_taught_from(config: Any, weights: Path, program: Program, tmp_path: Path):
    shared = {name: value for name, value in TINY.items() if name.startswith(("seed", "adapter", "eval.", "optimizer"))}
    shared["final_samples"] = shared.pop("eval.final_samples")
    settings = {
        "steps": 1, "log_every": 1, "checkpoint_every": 1, "eval_every": 1, "model.remat": "dots", "data.batch_size": 2,
        "data.empty_caption": 0.25, "data.tasks.text.share": 0.5, "model.path": f"{weights}/base.safetensors",
        "tasks.text.rewards.quality": 0.5, "tasks.text.rewards.dark": 2.0, "rewards.dark.divide_by": 4.0,
        "rewards.dark.kind": "tests.main.own_reward:darkness", "keep_best": "max:reward/text",
    }  # fmt: skip
    folder = tmp_path / "teacher"
    program.finish("teacher", command(folder, shared | settings, f"{FOLDER}/miniature_teacher.py:text"))
    fields = json.loads((folder / "config.json").read_text())
    assert (fields["batch_size"], fields["empty_caption"], fields["tasks.text.share"]) == (2, 0.25, 0.5)
    trained, measured = logged(folder)
    assert (trained["step"], measured["step"]) == (1, 1)
    found = {name.removeprefix("eval/"): value for name, value in measured.items() if name != "step"}
    scores = {name for name in found if not name.startswith("monitors/")}
    assert scores == {"text", "quality", "dark", "reward/text", "composition", "composition_strict"}
    assert 0 < found["dark"] < 0.25
    # Of both tasks' quality, of one task's reward.
    quality = (found["reward/text"] - 2 * found["dark"]) / 0.5
    assert 0 < quality <= 1
    assert json.loads((folder / "checkpoints" / "scores.json").read_text()) == {
        "reward/text": {"1": found["reward/text"]}
    }
    assert newest_step(folder) == 1
    assert {"adapter.safetensors", "samples.png"} <= {path.name for path in folder.iterdir()}
    adapter, metadata = load_adapter(folder / "adapter.safetensors")
    assert isinstance(adapter, Adapter)
    assert metadata["preset"] == "miniature"
    assert adapter.scale == 2.0
    card = read_card(folder / "adapter.safetensors")
    assert card is not None
    assert (card.algorithm, card.guidance, card.updates, card.scored_at) == ("flow_matching", 1.0, 1, 1)
    assert card.scores == {name: found[name] for name in scores}
    config.tasks["text"].teacher, config.tasks["text"].guidance = f"{folder}/adapter.safetensors", None
    stage = prepare(config, tmp_path / "student")
    assert dict(zip(config.tasks, stage.update.pieces.spec.teacher_guidance, strict=False))["text"] == 1.0


def test_what_trains_must_be_known(weights: Path, tmp_path: Path):
    teacher = load("miniature_teacher", "text")
    assign(teacher, {"model.path": f"{weights}/base.safetensors", "trained": "everything"})
    assert_refused(teacher, tmp_path / "run", "trained: found 'everything'", "'params'", "'adapter'")


def test_a_network_that_has_no_world_is_named(weights: Path, tmp_path: Path):
    teacher = load("miniature_teacher", "text")
    assign(teacher, {"model.path": f"{weights}/base.safetensors", "model.preset": "sd35_medium"})
    assert_refused(teacher, tmp_path / "run", "model.path: found", "'sd35_medium' needs a converted folder")
