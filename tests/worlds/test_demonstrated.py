"""Demonstrations as captioned latents: rows by (seed, step, row), teachers' velocities at their states, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fopd_jax.config.schema import Pairs
from fopd_jax.tasks.demonstrations import Demonstrations
from fopd_jax.worlds.demonstrated import DemonstratedLatents, are_demonstrated
from fopd_jax.worlds.world import CaptionedLatents
from tests.tasks.test_demonstrations import LAYOUT, make

SIZE = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("demonstrated") / "set")


def _encode(prompts: Any) -> Any:
    return np.array([len(prompt) for prompt in prompts])


def _pairs(folder: Path, **changes: Any) -> dict[str, Pairs]:
    return {"text": Pairs(share=3.0, images=str(folder), **changes), "other": Pairs(images=str(folder))}


def _made(folder: Path, **changes: Any) -> DemonstratedLatents:
    given = {"batch_size": SIZE, "empty_caption": 0.25, "seed": 1, "target": "data"} | changes
    return DemonstratedLatents(_pairs(folder), _encode, LAYOUT.latents, **given)


def test_rows_are_teachers_latents_by_share_with_their_prompts(folder: Path):
    made, rows = _made(folder), np.arange(SIZE)
    assert isinstance(made, CaptionedLatents)
    batch, told = made.batch(3, rows), made.describe(3, rows.tolist())
    assert batch["x0"].shape == (SIZE, *LAYOUT.latents)
    assert batch["x0"].dtype == np.float32
    sets = {name: Demonstrations(folder, name, "f") for name in ("text", "other")}
    known = {f"{name}: {each['prompt']!r}": each for name, s in sets.items() for each in s.rows(range(len(s)))}
    for latents, line in zip(batch["x0"], told, strict=True):
        np.testing.assert_array_equal(latents, known[line]["latents"].astype(np.float32))
    share = np.mean([line.startswith("text") for line in told])
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / SIZE)
    empty = batch["conditioning"] == 0
    assert abs(empty.mean() - 0.25) < 5 * np.sqrt(0.75 * 0.25 / SIZE)
    lengths = np.array([len(known[line]["prompt"]) for line in told])
    np.testing.assert_array_equal(batch["conditioning"][~empty], lengths[~empty])


def test_a_row_is_a_function_of_seed_step_and_row(folder: Path):
    made = _made(folder)
    some = np.array([7, 2, 300])
    np.testing.assert_array_equal(made.batch(5, some)["x0"], made.batch(5, np.arange(SIZE))["x0"][some])
    assert made.describe(5, range(SIZE)) != made.describe(6, range(SIZE))
    assert made.describe(5, range(SIZE)) != _made(folder, seed=2).describe(5, range(SIZE))


def test_velocities_stand_at_their_states_and_levels_alike(folder: Path):
    made = _made(folder, target="velocity", empty_caption=0.0)
    batch, told = made.batch(0, np.arange(SIZE)), made.describe(0, range(SIZE))
    assert batch.keys() == {"x", "v", "sigma", "conditioning"}
    sets = {name: Demonstrations(folder, name, "f") for name in ("text", "other")}
    known = {f"{name}: {each['prompt']!r}": each for name, s in sets.items() for each in s.rows(range(len(s)))}
    for x, v, sigma, line in zip(batch["x"], batch["v"], batch["sigma"], told, strict=True):
        t = {1.0: 0, 0.5: 1}[float(sigma)]
        np.testing.assert_array_equal(x, known[line]["states"][t].astype(np.float32))
        np.testing.assert_array_equal(v, known[line]["velocities"][t].astype(np.float32))
    assert abs((batch["sigma"] == 1).mean() - 0.5) < 5 * np.sqrt(0.25 / SIZE)


def test_prompts_to_come_are_told_once(folder: Path):
    sets = [Demonstrations(folder, name, "f").prompts for name in ("text", "other")]
    every = {prompt for prompts in sets for prompt in prompts}
    found = list(_made(folder).upto(10))
    assert sorted(found) == sorted({"", *every})
    assert list(_made(folder).upto(0)) == []


@pytest.mark.parametrize(
    ("changes", "pairs", "message"),
    [
        ({"latents": (2, 3, 5)}, {}, r"tasks\.text\.images: .* latents of shape \(2, 3, 4\), expected \(2, 3, 5\)"),
        ({}, {"wrong_caption": 0.1}, r"tasks\.text\.wrong_caption: found 0\.1, expected 0: demonstrations stay"),
        ({}, {"degraded": 0.1}, r"tasks\.text\.degraded: found 0\.1, expected 0"),
        ({"target": "velocity"}, {}, r"empty_caption: found 0\.25, expected 0: a teacher's velocity"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, changes: dict[str, Any], pairs: dict[str, Any], message: str):
    latents = changes.pop("latents", LAYOUT.latents)
    given = {"batch_size": 4, "empty_caption": 0.25, "seed": 1, "target": "data"} | changes
    with pytest.raises(ValueError, match=message):
        DemonstratedLatents(_pairs(folder, **pairs), _encode, latents, **given)


def test_tasks_are_sets_all_or_none(folder: Path, tmp_path: Path):
    assert are_demonstrated(_pairs(folder))
    assert not are_demonstrated({"text": Pairs(), "other": Pairs(images=str(tmp_path))})
    with pytest.raises(ValueError, match=r"tasks\.other\.images: found '', expected a set of demonstrations as the"):
        are_demonstrated({**_pairs(folder), "other": Pairs()})


def test_sets_of_another_bases_teachers_are_told(folder: Path, tmp_path: Path):
    assert list(_made(folder).of_others("1" * 64)) == []  # this one does not say
    other = make(tmp_path / "other")
    claim = json.loads((other / "demonstrations.json").read_text())
    claim["identity"]["base"] = "0" * 64
    (other / "demonstrations.json").write_text(json.dumps(claim))
    made = _made(other)
    assert list(made.of_others("0" * 64)) == list(made.of_others("")) == []
    assert [line.split(":")[0] for line in made.of_others("1" * 64)] == ["tasks.text.images", "tasks.other.images"]
