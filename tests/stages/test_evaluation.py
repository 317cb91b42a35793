"""Models on suites: the same bytes however often it is killed, on whatever noise; what is wrong is told first."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.config.load import load_config
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import RewardConfig
from fopd_jax.config.stages import StageConfig
from fopd_jax.evaluation import cell_scores, generate, records
from fopd_jax.evaluation.generate import noise_keys
from fopd_jax.evaluation.records import DIVERSITY, RECORDS_FILE, read_cells, write_cell
from fopd_jax.evaluation.suites import Prompt
from fopd_jax.files import write_json, write_png
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from fopd_jax.rewards.pool import TooManyFailures
from fopd_jax.stages.contestants import named_sources
from fopd_jax.stages.evaluation import Wish, evaluate_models
from tests import test_sample
from tests.main.dying_reward import away_for
from tests.main.experiment import snapshot
from tests.test_sample import CONFIG

pytestmark = test_sample.pytestmark
small_network, weights = test_sample.small_network, test_sample.weights
PROMPTS, SAMPLES, SETTINGS = 5, 2, 3
"""Of each of two suites; the settings are two numbers of steps, and the first with prompts in other words."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluations")


@pytest.fixture(scope="module")
def away(folder: Path) -> Iterator[Path]:
    """Says for how many batches the judge is away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWAY", str(folder / "away"))
        yield folder / "away"


@pytest.fixture(scope="module")
def config(weights: Path, away: Path) -> StageConfig:
    changes = {
        "model.path": f"{weights}/base.safetensors", "eval.batch_size": 4, "eval.num_steps": 2, "eval.also_steps": (3,),
        "rewards": {"judge": RewardConfig(kind="tests.main.dying_reward:judge")},
    }  # fmt: skip
    return resolve(override(load_config(CONFIG), changes))


@pytest.fixture(scope="module")
def wish(weights: Path) -> Wish:
    models = {"base": "base", "tuned": f"{weights}/adapter.safetensors"}
    return Wish(models, ("text", "composition"), also=("rewritten",), prompts=PROMPTS, samples=SAMPLES)


@pytest.fixture(scope="module")
def small(wish: Wish) -> Wish:
    """One model on one suite."""
    return dataclasses.replace(wish, models={"base": "base"}, also=(), suites=("text",))


@pytest.fixture(scope="module")
def alone(config: StageConfig) -> StageConfig:
    """At one setting."""
    return resolve(override(config, {"eval.also_steps": ()}))


@pytest.fixture(scope="module")
def whole(config: StageConfig, wish: Wish, folder: Path) -> Path:
    evaluate_models(config, wish, folder / "whole")
    return folder / "whole"


def _left(out: Path, kept: Callable[[str], bool] = lambda name: True) -> dict[str, bytes]:
    """All that is left but when it was made."""
    return {name: data for name, data in snapshot(out).items() if name != "run.json" and kept(name)}


def test_every_model_has_its_images_and_scores_at_every_setting(config: StageConfig, whole: Path, weights: Path):
    cells = read_cells(whole)
    assert len(cells) == 2 * 2 * SETTINGS
    assert {cell.setting for cell in cells} == {
        "steps 2, guidance 1", "steps 3, guidance 1", "steps 2, guidance 1, rewritten"
    }  # fmt: skip
    for cell in cells:
        folder = whole / cell.model / cell.suite / cell.setting.replace(", ", "_").replace(" ", "_")
        assert len(cell.records) == PROMPTS * SAMPLES
        assert cell.settings.rewritten == ("rewritten" in cell.setting)
        own = {"text": {"text"}, "composition": {"composition", "composition_strict"}}[cell.suite]
        for record in cell.records:
            assert record.scores.keys() == {*own, "quality", "judge", DIVERSITY}
            assert not record.failed
            with Image.open(folder / record.image) as picture:
                picture.load()
                about: dict[str, str] = picture.text  # type: ignore[attr-defined]
                assert record.scores["judge"] == np.asarray(picture).mean() / 255
            assert (about["prompt"], about["prompt_id"]) == (record.prompt, record.prompt_id)
            assert ("read" in about) == cell.settings.rewritten
            assert json.loads(about["settings"])["steps"] == cell.settings.steps
    assert not list(whole.rglob("scores"))


def test_noise_is_of_prompt_and_sample_alone():
    prompts = [Prompt(str(place), place, "a", {}, {}, ()) for place in range(3)]
    rows = list(itertools.product(prompts, range(2)))
    every = jax.random.key_data(noise_keys(1, "text", rows))
    for order in (rows[::-1], rows[2:3], rows[1::2]):
        places = [rows.index(row) for row in order]
        np.testing.assert_array_equal(jax.random.key_data(noise_keys(1, "text", order)), every[np.array(places)])
    others = [noise_keys(2, "text", rows), noise_keys(1, "other", rows)]
    seen = {tuple(np.asarray(key)) for keys in (every, *map(jax.random.key_data, others)) for key in keys}
    assert len(seen) == 3 * len(rows)


class Killed(BaseException):
    """As nothing that a program would handle."""


def _killing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, but its call number `at` never comes back."""
    calls = itertools.count()

    def call(*args: Any, **keywords: Any) -> Any:
        if next(calls) == at:
            raise Killed
        return function(*args, **keywords)

    return call


def test_killed_often_it_leaves_the_same_bytes(
    config: StageConfig, wish: Wish, whole: Path, away: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between images, between scores, before records, between records and settings; once with a judge that is away."""
    part = dataclasses.replace(wish, also=(), suites=("text",))
    away_for(away, 3)
    points: list[tuple[Any, str, Callable[..., Any], int]] = [
        (generate, "write_png", write_png, 3),
        (generate, "write_png", write_png, 30),
        (cell_scores, "write_json", write_json, 2),
        (cell_scores, "write_cell", write_cell, 1),
        (records, "write_json", write_json, 1),
        (shutil, "rmtree", shutil.rmtree, 0),
    ]
    for module, name, function, at in points:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, _killing(function, at))
            with pytest.raises(Killed):
                evaluate_models(config, part, tmp_path)
    evaluate_models(config, part, tmp_path)
    assert _left(tmp_path) == _left(whole, lambda name: "/text/" in name and "rewritten" not in name)


def test_a_judge_that_is_away_is_listed_and_asked_again(
    config: StageConfig, small: Wish, whole: Path, away: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    away_for(away, 2)
    cells = evaluate_models(config, small, tmp_path)
    lost = [record for cell in cells for record in cell.records if record.failed]
    assert len(lost) == 2 * 4  # batches of two prompts
    assert all("judge" not in record.scores and "nobody answers" in record.failed["judge"] for record in lost)
    assert "base on text at steps 2, guidance 1: judge: 8 of 10 scores failed, most often: " in capsys.readouterr().err
    evaluate_models(config, small, tmp_path)
    assert _left(tmp_path) == _left(whole, lambda name: name.startswith("base/text") and "rewritten" not in name)
    untouched = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != "run.json"}
    evaluate_models(config, small, tmp_path)  # a third call has nothing to do
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


@pytest.mark.slow
def test_too_many_failures_stop_it_and_what_was_scored_stays(
    alone: StageConfig, small: Wish, away: Path, tmp_path: Path
):
    many = dataclasses.replace(small, prompts=40)
    away_for(away, 1000)
    with pytest.raises(TooManyFailures, match=r"rewards\.judge: 100% of its last 64 scores failed"):
        evaluate_models(alone, many, tmp_path)
    away_for(away, 0)
    kept = sorted(tmp_path.rglob("scores/*.json"))
    assert len(kept) == 32  # the prompts of 64 images
    assert json.loads(kept[0].read_text())["images"][0]["failed"].keys() == {"judge"}
    (cell,) = evaluate_models(alone, many, tmp_path)
    assert not any(record.failed for record in cell.records)


def test_another_reward_of_the_same_name_is_asked_anew(alone: StageConfig, small: Wish, tmp_path: Path):
    def scores(config: StageConfig) -> dict[str, float]:
        return dict(evaluate_models(config, dataclasses.replace(small, prompts=1), tmp_path)[0].records[0].scores)

    before = scores(alone)
    halved = {"rewards": {"judge": RewardConfig(kind="tests.main.dying_reward:judge", divide_by=2.0)}}
    after = scores(resolve(override(alone, halved)))
    assert after == {**before, "judge": before["judge"] / 2}
    assert scores(resolve(override(alone, {"rewards": {}}))) == after  # what is not asked now stands


def test_pictures_made_elsewhere_are_scored_as_they_are(config: StageConfig, wish: Wish, whole: Path, tmp_path: Path):
    for suite in wish.suites:
        shutil.copytree(whole / "base" / suite / "steps_2_guidance_1" / "images", tmp_path / "theirs" / suite)
    given = dataclasses.replace(wish, models={"theirs": str(tmp_path / "theirs")})
    cells = evaluate_models(config, given, tmp_path / "out")
    assert [(cell.suite, cell.setting, cell.settings.sampler) for cell in cells] == [
        ("text", "steps 2, guidance 1", "given"), ("composition", "steps 2, guidance 1", "given"),
    ]  # fmt: skip
    expected = {(c.suite, c.setting): c for c in read_cells(whole) if c.model == "base"}
    for cell in cells:
        assert cell.records == expected[cell.suite, cell.setting].records
    next((tmp_path / "theirs" / "text").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"--models theirs: .*/text: 1 of 5 prompts of text lack images, the first"):
        evaluate_models(config, given, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.slow
def test_own_guidance_is_the_cards(alone: StageConfig, weights: Path, small: Wish, tmp_path: Path):
    adapter, _ = load_adapter(weights / "adapter.safetensors")
    save_adapter(tmp_path / "a.safetensors", adapter, {"preset": "miniature"}, AdapterCard(guidance=3.0))
    models = {"base": "base", "tuned": str(tmp_path / "a.safetensors")}
    asked = dataclasses.replace(small, models=models, also=("own",), prompts=1, samples=1)
    cells = evaluate_models(alone, asked, tmp_path / "out")
    own = {cell.model: cell.settings.guidance for cell in cells if cell.setting == "steps 2, guidance own"}
    assert own == {"base": 1.0, "tuned": 3.0}
    assert [cell.settings.guidance for cell in cells if cell.setting == "steps 2, guidance 1"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"a": "no/such/folder"}}, "--models a: no/such/folder: no such file or folder"),
        ({"models": {"a": "other"}}, "--models a: .*weights of preset 'sd35_medium', but model.preset is 'miniature'"),
        ({"suites": ("geneval",)}, "--suites geneval: unknown word 'a' in prompt 'a photo of"),
        ({"suites": ("ocr",)}, "--suites ocr: no prompts at hand; expected --suite-data=ocr=FILE"),
        ({"suites": ("txt",)}, "--suites: found 'txt', expected some of text, composition, geneval"),
        ({"data": {"dpg": "x"}}, "--suite-data: found 'dpg', expected some of the suites text, composition"),
        ({"also": ("twice",)}, "--also: found 'twice', expected some of own, rewritten"),
        ({"prompts": 0}, "--prompts: found 0, expected at least 1"),
        ({"samples": 101}, "--samples: found 101, expected 1 to 100"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_made(
    config: StageConfig, wish: Wish, weights: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    if changes.get("models") == {"a": "other"}:
        changes = {"models": {"a": f"{weights}/other.safetensors"}}
    with pytest.raises(ValueError, match=message) as error:
        evaluate_models(config, dataclasses.replace(wish, **changes), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_images_is_refused(alone: StageConfig, small: Wish, tmp_path: Path):
    one, out = dataclasses.replace(small, prompts=1), tmp_path / "out"
    evaluate_models(alone, one, out)
    with pytest.raises(ValueError, match=r"plan\.json: holds images of other settings: .*remove the folder, or"):
        evaluate_models(resolve(override(alone, {"eval.seed": 7})), one, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"--out: .*mine holds what no evaluation has made"):
        evaluate_models(alone, one, tmp_path / "mine")
    (out / "base" / "text" / "steps_2_guidance_1" / RECORDS_FILE).write_text("{\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"records\.jsonl: damaged"):
        evaluate_models(alone, one, out)


@pytest.mark.parametrize("given", ["base=", "=x", "a/b=x", "x", "..=x"])
def test_names_of_models_are_folders(given: str):
    with pytest.raises(ValueError, match=f"--models: found {given!r}, expected NAME=SOURCE".replace("..", r"\.\.")):
        named_sources([given], "--models")
    assert named_sources(["base", "a=b=c"], "--models") == {"base": "base", "a": "b=c"}
    with pytest.raises(ValueError, match="found the name 'a' twice"):
        named_sources(["a=1", "a=2"], "--models")
