"""The report: table, `results.json` and pictures."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import Evaluation, MeshShape
from fopd_jax.evaluation import report
from fopd_jax.evaluation.report import Model, format_table, write_report
from fopd_jax.evaluation.sampler import Sampler
from fopd_jax.flow.transition import standard_normal
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.rewards.reward import Reward, Scores, collect
from fopd_jax.running.records import PACKAGES
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World

LATENT = (24, 24, 3)
MODELS = {"base": 0.5, "teacher/text": -0.25, "student": 0.0}


def _level(images: np.ndarray, prompts: Any, metadata: Any) -> Scores:
    return collect([((image.mean() - 127.5) / 127.5, {}) for image in images])


def _spread(images: np.ndarray, prompts: Any, metadata: Any) -> Scores:
    return collect([(float(image.std()), {}) for image in images])


def _world(**scores: Any) -> World:
    tasks = {name: Task(name, (), (f"{name} one", f"{name} two"), tuple(scores)) for name in ("text", "composition")}
    return World(
        LATENT,
        tasks,
        lambda prompts: Conditioning(np.zeros((len(prompts), 1, 1)), np.zeros((len(prompts), 1))),
        lambda latents: latents,
        rewards={name: Reward(name, score, (None, None), "host") for name, score in scores.items()},
    )


def _draw(variables: Any, adapter: Any, conditioning: Conditioning, null: None, keys: jax.Array) -> jax.Array:
    return 0.1 * standard_normal(keys, LATENT) + adapter


SAMPLER = Sampler(_draw, guided=False, mesh=make_mesh(MeshShape()))


SETTINGS = Evaluation(("text", "composition"), batch_size=8, seed=1, samples=3, final_samples=10)
ABOUT = {"seed": 7, "steps": 2, "config_hash": "ab"}


def _write(folder: Path, settings: Evaluation = SETTINGS, world: World | None = None, most: float = 0.2) -> None:
    models = [Model(name, {}, jnp.float32(shift)) for name, shift in MODELS.items()]
    write_report(folder, settings, ABOUT, SAMPLER, world or _world(level=_level, spread=_spread), models, most)


def test_the_table_gives_means_and_the_students_paired_lead():
    """Differences 1, 0, 0, 1: mean .5, standard deviation .577 (n - 1), standard error .289."""
    student = {"text": np.array([1.0, 0.0, 1.0, 1.0]), "quality": np.array([0.5, 0.7])}
    base = {"text": np.array([0.0, 0.0, 1.0, 0.0]), "quality": np.array([0.6, 0.7])}
    lines = format_table({"base": base, "student": student}, "student").splitlines()
    assert lines[0].split() == ["text", "quality"]
    assert re.sub(r"\s+", " ", lines[1]).strip() == "base 0.250 (+0.500 ± 0.289) 0.650 (-0.050 ± 0.050)"
    assert lines[2].split() == ["student", "0.750", "0.600"]
    assert lines[3].endswith("n = text 4, quality 2)")
    assert len(lines) == 4


def test_the_tables_columns_are_aligned():
    rng = np.random.default_rng(0)
    scores = {name: {"text": rng.random(9), "quality": rng.random(9)} for name in ("base", "teacher/text", "student")}
    lines = format_table(scores, "student").splitlines()[:-1]
    assert len({len(line) for line in lines}) == 1
    # The student's means stand under the others'.
    assert {line.index("0.") for line in lines[1:]} == {lines[1].index("0.")}


def test_a_constant_lead_has_no_error():
    """Pairing removes what the pairs have in common, however much they vary."""
    values = np.array([0.0, 0.5, 1.0])
    table = format_table({"base": {"text": values}, "student": {"text": values + 0.25}}, "student")
    assert "(+0.250 ± 0.000)" in table


def test_results_have_exactly_these_entries(tmp_path: Path):
    _write(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"models", "samples", "failed", "seed", "steps", "config_hash", "versions"}
    assert results["failed"] == {}
    assert results["models"].keys() == MODELS.keys()
    assert results["samples"] == {"level": 20, "spread": 20}
    assert (results["seed"], results["steps"]) == (7, 2)
    assert results["config_hash"] == "ab"
    assert results["versions"].keys() == set(PACKAGES)
    for name, shift in MODELS.items():
        assert results["models"][name].keys() == {"level", "spread"}
        found = results["models"][name]["level"] - results["models"]["student"]["level"]
        assert abs(found - shift) < 0.5 / 127.5  # of bytes


def test_a_student_alone_is_reported_as_it_is_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _write(tmp_path)
    among = json.loads((tmp_path / "results.json").read_text())
    rows = []
    monkeypatch.setattr(report, "draw_grid", lambda _, labels, __: (rows.extend(labels), Image.new("RGB", (1, 1)))[1])
    _write(tmp_path, dataclasses.replace(SETTINGS, alone=True))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == {**among, "models": {"student": among["models"]["student"]}}
    assert rows == ["student"]
    assert [line.split()[0] for line in (tmp_path / "table.txt").read_text().splitlines()[1:-1]] == ["student"]


def test_a_model_under_a_scale_of_its_own_is_named_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is drawn by its own sampler, at every setting; the others and all else are as ever."""

    def brighter(*arguments: Any) -> jax.Array:
        return _draw(*arguments) + 0.25

    _write(tmp_path)
    usual, own, rows = json.loads((tmp_path / "results.json").read_text()), Sampler(brighter, False, SAMPLER.mesh), []
    monkeypatch.setattr(report, "draw_grid", lambda _, labels, __: (rows.extend(labels), Image.new("RGB", (1, 1)))[1])
    changes = {"teacher/text": {"sampler": own, "others": {"steps 4": own}, "guidance": 4.5}}
    models = [Model(name, {}, jnp.float32(shift), **changes.get(name, {})) for name, shift in MODELS.items()]
    settings, world = dataclasses.replace(SETTINGS, guidance=1.0), _world(level=_level, spread=_spread)
    write_report(tmp_path, settings, ABOUT, SAMPLER, world, models, 0.2, {"steps 4": SAMPLER})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["guidance"] == {"base": 1.0, "teacher/text": 4.5, "student": 1.0}
    for scores in (found["models"], found["settings"]["steps 4"]["models"]):
        assert {name: scores[name] for name in ("base", "student")} == {
            name: usual["models"][name] for name in ("base", "student")
        }
        assert scores["teacher/text"]["level"] == pytest.approx(
            usual["models"]["teacher/text"]["level"] + 0.25, abs=1e-2
        )
    first, *_ = (tmp_path / "table.txt").read_text().split("\n\n")
    assert first.splitlines()[-1] == "guidance: base 1, teacher/text 4.5, student 1"
    assert rows == ["base", "teacher/text, guidance 4.5", "student", "student, steps 4"]


def test_a_second_report_is_the_same_and_leaves_no_temporary_files(tmp_path: Path):
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    _write(tmp_path)
    before = contents()
    _write(tmp_path)
    assert contents() == before
    assert before.keys() == {"results.json", "samples.png", "table.txt"}


def test_without_scores_there_are_pictures_and_no_empty_results(tmp_path: Path):
    _write(tmp_path, world=_world())
    assert {path.name for path in tmp_path.iterdir()} == {"samples.png"}


def test_the_report_uses_other_noise_than_the_periodic_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seeds = []
    evaluate = report.evaluate
    monkeypatch.setattr(
        report, "evaluate", lambda *args: (seeds.append((args[2].seed, args[2].samples)), evaluate(*args))[1]
    )
    _write(tmp_path)
    assert set(seeds) == {(2, 10)}  # eval.seed + 1, final_samples


@pytest.mark.parametrize(("batch_size", "per_task", "ways"), [(8, 6, 1), (4, 4, 1), (4, 4, 5)])
def test_pictures_stand_under_their_own_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, per_task: int, ways: int
):
    """Twelve columns by task, or as many as one batch holds; the same ones where a mesh fills the batch up."""
    monkeypatch.setattr(report, "batch_ways", lambda _: ways)
    drawn: dict[str, Any] = {}

    def draw_grid(images: np.ndarray, rows: Any, columns: Any) -> Image.Image:
        drawn.update(images=images, rows=list(rows), columns=list(columns))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(report, "draw_grid", draw_grid)
    _write(tmp_path, dataclasses.replace(SETTINGS, batch_size=batch_size))
    assert drawn["rows"] == list(MODELS)
    assert drawn["images"].shape[:2] == (3, len(drawn["columns"]))
    spread = [i * batch_size // per_task for i in range(per_task)]  # evenly over the batch
    assert drawn["columns"] == [f"{name} {('one', 'two')[i % 2]}" for name in _world().tasks for i in spread]
    # The same noise in every row: rows differ by the models' shifts alone.
    np.testing.assert_allclose(drawn["images"][0] - drawn["images"][2], 0.5, atol=1e-6)


def test_the_picture_is_written(tmp_path: Path):
    _write(tmp_path)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 12 * 96


def _flawed(images: np.ndarray, prompts: Any, metadata: Any) -> Scores:
    """Of each batch the second fails."""
    return collect([(0.5, {}) if i != 1 else TimeoutError("no answer") for i in range(len(images))])


def test_too_many_failures_are_named_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(
        FloatingPointError, match=r"scores of base: level: 4 of 20 failed: TimeoutError: no answer \(run"
    ):
        _write(tmp_path, world=_world(level=_flawed), most=0.19)
    assert not list(tmp_path.iterdir())


def test_failures_are_counted_told_and_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _write(tmp_path, world=_world(level=_flawed, spread=_spread))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failed"] == {name: {"level": 4} for name in MODELS}
    assert results["samples"] == {"level": 20, "spread": 20}
    assert {each["level"] for each in results["models"].values()} == {0.5}
    *_, counts, failed = (tmp_path / "table.txt").read_text().splitlines()
    assert counts.endswith("n = level 20, spread 20)")
    assert failed.startswith(
        "* of the pairs whose scores did not fail; failed: base level 4, teacher/text level 4, stu"
    )
    warned = capsys.readouterr().err.splitlines()
    assert "warning: scores of base: level: 4 of 20 failed: TimeoutError: no answer" in warned


def test_a_lead_is_over_the_pairs_that_both_have():
    """Differences 1, 0 of the second and the last pair: mean .5, standard deviation .707, standard error .5."""
    student = {"text": np.array([np.nan, 1.0, 1.0, 1.0]), "ocr": np.array([1.0, 1.0, np.nan, np.nan])}
    base = {"text": np.array([0.0, 0.0, np.nan, 1.0]), "ocr": np.array([np.nan, np.nan, 0.5, 0.5])}
    full = {"text": np.zeros(4), "ocr": np.zeros(4)}
    lines = format_table({"base": base, "full": full, "student": student}, "student").splitlines()
    plain = [re.sub(r"\s+", " ", line).strip() for line in lines]
    assert plain[1] == "base 0.333* (+0.500 ± 0.500) 0.500* (no pair has both)"
    assert plain[2] == "full 0.000 (+1.000 ± 0.000) 0.000 (+1.000 ± 0.000)"
    assert plain[3] == "student 1.000* 1.000*"
    assert lines[-1].endswith("failed: base text 1, base ocr 2, student text 1, student ocr 2")
    assert lines[3].index("1.000*") == lines[2].index("0.000") == lines[1].index("0.333")


def test_a_picture_of_images_that_are_not_finite_is_not_drawn(tmp_path: Path):
    models = [Model("fine", {}, jnp.float32(0)), Model("broken", {}, jnp.float32(jnp.inf))]
    with pytest.raises(ValueError, match="images: 12 of 12 are not finite, the first of broken, prompt 'text one'"):
        write_report(tmp_path, SETTINGS, ABOUT, SAMPLER, _world(), models, 0.2)
    assert not (tmp_path / "samples.png").exists()
