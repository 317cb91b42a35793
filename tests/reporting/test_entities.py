"""Names and colours of runs and models; colours against a simulation of colour vision."""

from pathlib import Path

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from fopd_jax.reporting.entities import DARK, GROUND, LIGHT, named_folder, slots, unique_names
from fopd_jax.reporting.evaluations import read_evaluation
from fopd_jax.reporting.workdirs import read_run
from tests.reporting import made

# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def rgb(colour: str) -> np.ndarray:
    return np.asarray([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])


def linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded(values: np.ndarray) -> np.ndarray:
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("row", "ground"), [(LIGHT, GROUND["light"]), (DARK, GROUND["dark"])])
def test_colours_are_told_apart_by_everybody(row: tuple[str, ...], ground: str):
    colours = np.stack([rgb(each) for each in row])
    for vision in VISION.values():
        lab = rgb2lab(encoded(linear(colours) @ np.asarray(vision).T))
        apart = [deltaE_ciede2000(lab[i], lab[k]) for i in range(len(row)) for k in range(i)]
        assert min(apart) > 12
    light = linear(np.vstack([colours, rgb(ground)])) @ [0.2126, 0.7152, 0.0722] + 0.05
    contrast = np.maximum(light[:-1], light[-1]) / np.minimum(light[:-1], light[-1])
    assert contrast.min() > 3  # WCAG 2.2, 1.4.11


def test_names_are_unique():
    folders = [("", Path("a/run")), ("", Path("b/run")), ("mine", Path("c")), ("mine", Path("d")), ("", Path("e"))]
    assert unique_names(folders) == ["a/run", "b/run", "mine", "mine (2)", "e"]


def test_a_name_may_stand_before_a_folder(tmp_path: Path):
    (tmp_path / "a=b").mkdir()
    assert named_folder("mine=runs/x") == ("mine", "runs/x")
    assert named_folder("runs/lr=3/x") == ("", "runs/lr=3/x")
    assert named_folder(str(tmp_path / "a=b")) == ("", str(tmp_path / "a=b"))
    assert named_folder("=x") == ("", "=x")


def test_a_model_has_the_colour_of_the_run_that_made_it(tmp_path: Path):
    runs = [read_run(f"run {name}", made.make_run(tmp_path / "runs" / name, name)) for name in ("sft", "opd")]
    kept, _ = read_evaluation(made.make_evaluation(tmp_path / "eval", 1, tmp_path / "runs", side=8))
    found = slots(runs, kept)
    assert found == {"run sft": 0, "run opd": 1, "opd": 1, "base": 2, "grpo-mix": 3, "teacher-composition": 4}
