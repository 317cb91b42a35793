"""What a teacher's file says is taken, or told where it is not followed; a teacher of another base is refused."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter, rank_of
from fopd_jax.config.identity import config_hash, identity
from fopd_jax.config.parse import flatten, override, resolve
from fopd_jax.config.schema import Model
from fopd_jax.config.teaching import PAPER_GUIDANCE
from fopd_jax.interop.files.converted import Converted, Manifest, weights_hash, write_manifest
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from fopd_jax.interop.lora.cards import read_card
from fopd_jax.interop.lora.peft import write_peft
from fopd_jax.models.mmdit import PRESETS
from fopd_jax.running import workdir
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.stages import teachers
from fopd_jax.stages.abstract import abstract_update
from fopd_jax.stages.cards import base_hash, settled
from fopd_jax.stages.opd import plan_opd
from fopd_jax.stages.pipeline import make_pipeline, weight_path
from fopd_jax.stages.registry import find_stage
from fopd_jax.stages.reinforced import trained_rewards
from fopd_jax.stages.stored import export_stored
from fopd_jax.steps.state import init_state, make_optimizer
from tests.configs import load

BASE, TEACHER = "packaged:base.safetensors", "packaged:teacher_text.safetensors"
TEXT, SILENT = "tasks.text.guidance", "does not say its guidance; 4.5 is assumed; set"


@pytest.fixture(scope="module")
def own_hash() -> str:
    """The packaged base's, by the definition that everybody's tools have."""
    return hashlib.sha256(weight_path(BASE).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def packaged() -> Adapter:
    return load_adapter(weight_path(TEACHER))[0]


def _write(path: Path, adapter: Adapter, **said: Any) -> str:
    """A teacher whose file says so; nothing: it has no card."""
    save_adapter(path, adapter, {"preset": "miniature"}, AdapterCard(**said) if said else None)
    return str(path)


def _warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def _config(teacher: str, **changes: Any) -> Any:
    return resolve(load(**{"tasks.text.teacher": teacher, TEXT: None} | changes))


def _refused(config: Any) -> str:
    with pytest.raises(ValueError) as caught:
        plan_opd(config)
    return str(caught.value)


# ---- guidance


def test_a_teachers_guidance_is_what_its_file_says(tmp_path: Path, packaged: Adapter, capsys: Any):
    config = _config(_write(tmp_path / "a.safetensors", packaged, guidance=2.5))
    assert settled(config).tasks["text"].guidance == 2.5
    assert plan_opd(config).update.pieces.spec.teacher_guidance == (1.0, 2.5, 1.0)  # composition, text, anchor
    assert not _warnings(capsys)


def test_an_anchors_is_too_also_from_a_peft_folder(tmp_path: Path, packaged: Adapter, capsys: Any):
    write_peft(tmp_path / "peft", packaged, PRESETS["miniature"], AdapterCard(guidance=3.0))
    changes = {"anchor.adapter": str(tmp_path / "peft"), "anchor.guidance": None}
    assert plan_opd(resolve(load(**changes))).update.pieces.spec.teacher_guidance == (1.0, 1.0, 3.0)
    assert not _warnings(capsys)


def test_where_the_file_is_silent_the_papers_is_assumed_with_one_line(tmp_path: Path, packaged: Adapter, capsys: Any):
    for said in ({}, {"algorithm": "opd"}):
        path = _write(tmp_path / "a.safetensors", packaged, **said)
        assert plan_opd(_config(path)).update.pieces.spec.teacher_guidance == (1.0, PAPER_GUIDANCE, 1.0)
        assert _warnings(capsys) == [f"warning: tasks.text.teacher: {path} {SILENT} {TEXT}"]
    config = _config(path, **{"anchor.guidance": None, "anchor.adapter": path, TEXT: 1.0})
    assert settled(config).anchor.guidance == PAPER_GUIDANCE
    assert _warnings(capsys) == [f"warning: anchor.adapter: {path} {SILENT} anchor.guidance"]
    assert settled(resolve(load(**{"anchor.guidance": None}))).anchor.guidance == 1.0  # the packaged one says it
    assert not _warnings(capsys)


def test_a_config_that_says_another_is_followed_and_told(tmp_path: Path, packaged: Adapter, capsys: Any):
    path = _write(tmp_path / "a.safetensors", packaged, guidance=1.0)
    config = _config(path, **{TEXT: 4.5})
    assert settled(config) is config
    assert plan_opd(config).update.pieces.spec.teacher_guidance == (1.0, 4.5, 1.0)
    assert _warnings(capsys) == [
        f"warning: tasks.text.teacher: {path} is for guidance 1, but tasks.text.guidance is 4.5"
    ]
    plan_opd(_config(path, **{TEXT: 1.0}))
    assert not _warnings(capsys)


def test_one_who_teaches_and_anchors_is_told_of_both(tmp_path: Path, packaged: Adapter, capsys: Any):
    path = _write(tmp_path / "a.safetensors", packaged, guidance=2.0)
    changes = {"anchor.name": "text", "anchor.adapter": path, "anchor.guidance": 3.0, TEXT: 1.0}
    plan_opd(_config(path, **changes, **{"cold_start.method": "none", "cold_start.weights": {}}))
    told = f"warning: tasks.text.teacher: {path} is for guidance 2, but"
    assert _warnings(capsys) == [f"{told} tasks.text.guidance is 1", f"{told} anchor.guidance is 3"]


def test_nothing_is_asked_where_there_is_no_file(tmp_path: Path, capsys: Any):
    """Whoever needs it says that it is not there; the base as an anchor says nothing of itself."""
    config = _config(
        str(tmp_path / "nowhere"), **{"anchor.adapter": "", "anchor.guidance": None, "cold_start.weights": {}}
    )
    assert settled(config) == config
    other = resolve(load("miniature_teacher", "text"))
    assert settled(other) is other
    assert not _warnings(capsys)
    assert _refused(config).startswith(f"tasks.text.teacher: {tmp_path}/nowhere: no such file or folder")


def test_without_files_it_counts_as_the_papers():
    config = resolve(load(**{TEXT: None, "anchor.guidance": None, "tasks.text.teacher": "nowhere"}))
    pieces = abstract_update(config, jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))).pieces
    assert pieces.spec.teacher_guidance == (1.0, PAPER_GUIDANCE, PAPER_GUIDANCE)


@pytest.mark.parametrize("text", ['{"guidance": "none"}', '{"guidance": 1'])
def test_a_damaged_card_is_refused_by_field_and_file(text: str, tmp_path: Path, packaged: Adapter):
    write_peft(tmp_path / "peft", packaged, PRESETS["miniature"])
    (tmp_path / "peft" / "fopd_jax.json").write_text(text)
    for changes in ({}, {TEXT: 1.0}):  # also where its guidance is not asked
        message = _refused(_config(str(tmp_path / "peft"), **changes))
        assert message.startswith(f"tasks.text.teacher: {tmp_path}/peft/fopd_jax.json: ")


# ---- the base


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: Any) -> None:
        raise AssertionError("a teacher was loaded before the cards were checked")

    monkeypatch.setattr(teachers, "load_policy", loaded)


def test_a_teacher_of_another_base_is_refused(tmp_path: Path, packaged: Adapter, own_hash: str, nothing_loaded: None):
    path = _write(tmp_path / "a.safetensors", packaged, guidance=1.0, base="c0ffee" + "0" * 58)
    message = _refused(_config(path))
    assert message.startswith(
        f"tasks.text.teacher: {path}: trained on another base (SHA-256 of its weights c0ffee000000…"
    )
    assert f"that of model.path is {own_hash[:12]}…" in message
    assert "expected an adapter of this base" in message
    write_peft(tmp_path / "peft", packaged, PRESETS["miniature"], AdapterCard(preset="sd3_medium"))
    assert _refused(resolve(load(**{"anchor.adapter": str(tmp_path / "peft")}))) == (
        f"anchor.adapter: {tmp_path}/peft: trained on preset 'sd3_medium', but model.preset is 'miniature'"
    )


def test_a_teacher_of_this_base_or_of_one_that_it_does_not_say_is_taken(
    tmp_path: Path, packaged: Adapter, own_hash: str, capsys: Any
):
    for base in (own_hash, ""):
        plan_opd(_config(_write(tmp_path / "a.safetensors", packaged, guidance=1.0, base=base)))
    assert not _warnings(capsys)


def test_what_differs_otherwise_is_told(tmp_path: Path, packaged: Adapter, capsys: Any):
    said = {"guidance": 1.0, "resolution": (32, 24), "rank": 16, "alpha": 16.0}
    path = _write(tmp_path / "a.safetensors", packaged, **said)
    plan_opd(_config(path))
    assert _warnings(capsys) == [
        f"warning: tasks.text.teacher: {path} was trained at height 32, width 24 pixels, but model.resolution is 24",
        f"warning: tasks.text.teacher: {path} says that its scale is 1, but holds {packaged.scale:g}",
    ]
    plan_opd(
        _config(_write(tmp_path / "a.safetensors", packaged, guidance=1.0, resolution=(24, 24), rank=8, alpha=16.0))
    )
    assert not _warnings(capsys)


def test_a_base_is_its_source_whatever_it_was_converted_to(tmp_path: Path, own_hash: str):
    assert base_hash(Model("miniature", BASE)) == own_hash
    assert base_hash(Model("miniature", "")) == ""

    def converted(name: str, dtype: str, source: dict[str, str]) -> str:
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, Manifest("custom", {"transformer": Converted({}, dtype, 1, 1, source, {})}))
        return weights_hash(tmp_path / name)

    one = {"transformer/config.json": "1" * 64, "transformer/x.safetensors": "a" * 64}
    assert converted("half", "bfloat16", one) == converted("full", "float32", one) == "a" * 64  # the file's own
    renamed = {"transformer/config.json": "2" * 64, "y.safetensors": "a" * 64}  # saved again by another diffusers
    assert converted("renamed", "bfloat16", renamed) == "a" * 64
    shards = {"transformer/x-2.safetensors": "b" * 64, "transformer/x-1.safetensors": "a" * 64}
    assert converted("shards", "bfloat16", shards) == hashlib.sha256(f"{'a' * 64}\n{'b' * 64}".encode()).hexdigest()
    write_manifest(tmp_path, Manifest("custom", {"vae": Converted({}, "float32", 1, 1, one, {})}))
    with pytest.raises(ValueError, match=r"holds no transformer, only vae$"):
        weights_hash(tmp_path)


# ---- a run's identity


def _saved(folder: Path, fields: dict[str, Any]) -> None:
    """A workdir in which a run of this identity has saved something."""
    workdir.claim(folder, fields)
    (folder / "checkpoints" / "1").mkdir(parents=True)


def test_workdirs_of_earlier_versions_go_on(tmp_path: Path, packaged: Adapter, capsys: Any):
    """There 4.5 was the default, left out of the identity: it is the same whether it is set, left out or assumed."""
    config = _config(_write(tmp_path / "silent.safetensors", packaged))
    _saved(tmp_path / "run", fields := {k: v for k, v in identity(config).items() if not k.endswith("text.guidance")})
    assert fields == identity(config)
    for each in (config, settled(config), override(config, {TEXT: 4.5})):
        workdir.check(tmp_path / "run", identity(each))
        assert config_hash(each) == config_hash(config)


def test_a_run_goes_on_under_the_guidance_that_it_began_with_or_is_refused(tmp_path: Path, packaged: Adapter):
    """One of an earlier version, which did not ask its files, had 4.5; one of today has what the file says."""
    config = settled(_config(_write(tmp_path / "says.safetensors", packaged, guidance=1.0)))
    before = {name: value for name, value in identity(config).items() if name != TEXT}
    _saved(tmp_path / "earlier", before)
    with pytest.raises(ValueError, match=rf"\n  {TEXT}: 4.5 there, 1.0 here$"):
        workdir.check(tmp_path / "earlier", identity(config))
    _saved(tmp_path / "today", identity(config))
    for each in (config, settled(override(config, {TEXT: None})), override(config, {TEXT: 1.0})):
        workdir.check(tmp_path / "today", identity(each))
    with pytest.raises(ValueError, match=rf"\n  {TEXT}: 1.0 there, 4.5 here$"):
        workdir.check(tmp_path / "today", identity(override(config, {TEXT: 4.5})))


# ---- what is written


def _save(folder: Path, config: Any, weights: Any, step: int) -> None:
    """A checkpoint, and the metrics of evaluations around it."""
    state = init_state(jax.tree.map(jnp.asarray, weights), make_optimizer(config.optimizer), 0)
    checkpoints = Checkpoints(folder, 1, config_hash="c0ffee")
    checkpoints.save(step, dataclasses.replace(state, step=jnp.int32(step)))
    checkpoints.close()
    lines = [
        {"step": 2, "eval/text": 0.25, "eval/monitors/dark": 0.5},
        {"step": 3, "train/loss": 1.0},
        {"step": 4, "eval/text": 0.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("name", "variant", "expected"),
    [
        ("miniature", [], {"algorithm": "opd", "guidance": 1.5, "train_steps": 6}),
        ("miniature_teacher", ["text"], {"algorithm": "flow_matching", "guidance": 1.0}),
        (
            "miniature_rl",
            ["quality"],
            {"algorithm": "flow_grpo", "guidance": 1.0, "train_steps": 6, "rewards": {"quality": 1.0}},
        ),
    ],
)
def test_a_stage_says_how_to_use_what_it_trained(
    name: str, variant: list[str], expected: dict[str, Any], tmp_path: Path, packaged: Adapter, own_hash: str
):
    config = load(name, *variant)
    if name == "miniature":
        config.guidance = 1.5
    config = resolve(config)
    _save(tmp_path / "run", config, packaged, 3)
    (tmp_path / "out").mkdir()
    # Evaluated otherwise than its run was: a card is of the run, as far as its folder tells.
    (tmp_path / "run" / "run.json").write_text(json.dumps({"starts": [{"config": flatten(config)}]}))
    other = resolve(override(config, {"eval.guidance": 7.0, "eval.num_steps": 3}))
    pipeline, origin = make_pipeline(other.model, other.run, dict), find_stage(other).origin
    export_stored(other, pipeline, tmp_path / "run", 3, tmp_path / "out", origin)
    (path,) = (tmp_path / "out").glob("*.safetensors")
    card = read_card(path)
    assert card is not None
    assert card.fields() == expected | {
        "resolution": [24, 24], "eval_steps": 10, "preset": "miniature", "base": own_hash,
        "rank": rank_of(packaged), "alpha": rank_of(packaged) * packaged.scale, "targets": ["attn"],
        "updates": 3, "scores": {"text": 0.25},
        "scored_at": 2, "config": config.name, "config_hash": config_hash(config), "version": "0.1.0",
    }  # fmt: skip
    assert card.scale == packaged.scale == load_adapter(path)[0].scale
    found = load_adapter(path)[0]
    jax.tree.map(np.testing.assert_array_equal, found.weights, packaged.weights)


def test_rewards_count_by_the_prompts_that_they_score():
    config = load("miniature_rl", "quality")
    config.tasks["text"].weight, config.tasks["text"].rewards = 3.0, {"text": 2.0, "quality": 1.0, "composition": 0.0}
    assert trained_rewards(resolve(config)) == {"text": 1.5, "quality": 1.0}
