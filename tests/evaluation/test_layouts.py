"""Names of images as the suites' own scorers read them, and pictures made elsewhere."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fopd_jax.evaluation.layouts import check_names, find_given, image_name, paths_of, read_image, write_beside
from fopd_jax.evaluation.suites import Prompt, Suite

RECORD = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}


def _suite(layout: str, samples: int = 4) -> Suite:
    prompts = [
        Prompt(f"{name}{place}", place, f"a photo of {name}", RECORD, {"category": "color"}, ())
        for place, name in ((3, "two cats"), (7, "dogs"))
    ]
    return Suite("pictures", layout, samples, tuple(prompts))


def _picture(shade: int) -> np.ndarray:
    return np.full((4, 6, 3), shade, np.uint8)


def _fill(folder: Path, suite: Suite) -> None:
    for shade, name in enumerate(paths_of(suite)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_picture(shade)).save(path)


def test_geneval_has_a_folder_of_each_prompt_with_its_record(tmp_path: Path):
    suite = _suite("geneval")
    assert image_name(suite, suite.prompts[0], 2) == "00003/samples/0002.png"
    _fill(tmp_path, suite)
    write_beside(tmp_path, suite)
    assert json.loads((tmp_path / "00007" / "metadata.jsonl").read_text()) == {**RECORD, "prompt": "a photo of dogs"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00003", "00007"]


def test_compbench_numbers_run_on_across_prompts():
    suite = _suite("compbench", 10)
    assert image_name(suite, suite.prompts[1], 9) == "color/samples/a photo of dogs_000079.png"


def test_dpg_has_grids_of_its_single_images(tmp_path: Path):
    suite = _suite("dpg")
    _fill(tmp_path, suite)
    write_beside(tmp_path, suite)
    grid = read_image(tmp_path / "grids" / "dogs7.png")
    assert grid.shape == (8, 12, 3)
    assert [grid[0, 0, 0], grid[0, 11, 0], grid[7, 0, 0], grid[7, 11, 0]] == [4, 5, 6, 7]
    for name in ("grids", "nothing"):  # a grid gives its quarters, where the single ones are elsewhere
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "singles").rename(tmp_path / "aside")
    found = find_given(tmp_path, suite)
    assert [found["dogs7", sample]()[0, 0, 0] for sample in range(4)] == [4, 5, 6, 7]


@pytest.mark.parametrize("layout", ["geneval", "compbench", "dpg", "plain"])
def test_pictures_made_elsewhere_are_found_by_layout(tmp_path: Path, layout: str):
    suite = _suite(layout, 2)
    _fill(tmp_path / "pictures", suite)  # a part of the suite's name
    found = find_given(tmp_path, suite)
    assert [int(found[prompt.id, sample]()[0, 0, 0]) for prompt, sample in suite.rows()] == [0, 1, 2, 3]


def test_other_numbers_of_digits_other_formats_and_no_folder(tmp_path: Path):
    suite = _suite("geneval", 2)
    for prompt in suite.prompts:
        folder = tmp_path / f"{prompt.place:05d}" / "samples"
        folder.mkdir(parents=True)
        for sample in range(3):  # more than are asked for
            Image.fromarray(_picture(100 * sample)).save(folder / f"{sample:05d}.jpg")
    assert [int(find_given(tmp_path, suite)["dogs7", sample]()[0, 0, 0]) for sample in range(2)] == [0, 100]
    flat = _suite("plain", 1)
    for prompt in flat.prompts:
        Image.fromarray(_picture(9)).save(tmp_path / f"{prompt.place:05d}_00.webp", lossless=True)
    assert find_given(tmp_path, flat)["dogs7", 0]()[0, 0, 0] == 9


def test_missing_images_and_other_prompts_are_refused(tmp_path: Path):
    suite = _suite("geneval", 2)
    _fill(tmp_path, suite)
    (tmp_path / "00007" / "samples" / "0001.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 prompts of pictures lack images, .*expected 00007/samples/0000\.png"):
        find_given(tmp_path, suite)
    (tmp_path / "00003" / "metadata.jsonl").write_text('{"prompt": "a cow"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="found the prompt 'a cow', expected 'a photo of two cats'"):
        find_given(tmp_path, suite)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png: no picture that can be read"):
        read_image(tmp_path / "broken.png")


@pytest.mark.parametrize("text", ["either/or", "x" * 300])
def test_prompts_that_cannot_be_names_are_refused(text: str):
    suite = Suite("s", "compbench", 1, (Prompt("0", 0, text, {}, {"category": "color"}, ()),))
    with pytest.raises(ValueError, match="cannot be part of a file's name"):
        check_names(suite)
    check_names(Suite("s", "plain", 1, suite.prompts))
