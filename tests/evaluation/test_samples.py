"""Sampled images as files: seeds, names, folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fopd_jax.evaluation.sampler import check_finite
from fopd_jax.evaluation.samples import Asked, check_folder, file_name, name_policies, shown, write_grid, write_image

SETTINGS = {"model": "m", "steps": 4, "guidance": 1.5, "transition": "sde", "noise_level": 0.7, "shift": 3.0,
            "dtype": "float32", "height": 16, "width": 24}  # fmt: skip


def test_every_image_has_a_seed_of_its_own_or_every_prompt_the_same():
    assert Asked(("a", "b"), 2, 7).requests() == [("a", 7), ("a", 8), ("b", 9), ("b", 10)]
    assert Asked(("a", "b"), 2, 7, shared=True).requests() == [("a", 7), ("a", 8), ("b", 7), ("b", 8)]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ([""], ["base"]),
        (["", "packaged:teacher_text.safetensors"], ["base", "teacher_text"]),
        (["", "runs/a/student.safetensors", "runs/b/student.safetensors"], ["base", "a_student", "b_student"]),
        (["", "base.safetensors", "x/base"], ["0_base", "1_base", "2_x_base"]),
        (["x/a b.safetensors", "y/peft folder/"], ["a_b", "peft_folder"]),
    ],
)
def test_policies_have_short_names_each_another(sources: list[str], names: list[str]):
    assert name_policies(sources) == names


def test_files_say_whose_image_they_are_where_there_are_several():
    assert file_name(3, "base", alone=True) == "00003.png"
    assert file_name(123456, "a_student", alone=False) == "123456_a_student.png"


def test_a_grid_has_a_row_of_every_policy_at_least():
    asked = Asked(("a",) * 20, 9, 0)
    assert [shown(asked, count) for count in (1, 3, 20)] == [(8, 8), (8, 2), (8, 1)]


def test_a_folder_of_samples_is_written_into_again_and_no_other(tmp_path: Path):
    asked = Asked(("猫",), 1, 0, negative="b")
    check_folder(tmp_path / "new", force=False)
    check_folder(tmp_path, force=False)
    image = np.zeros((16, 24, 3), np.float32)
    write_image(tmp_path / "00000.png", image, ("猫", 0), asked, SETTINGS, {})
    write_image(tmp_path / "00000_a.b-c.png", image, ("猫", 0), asked, SETTINGS, {"source": "x"})
    write_grid(tmp_path / "grid.png", image[None, None], asked, ["base"], SETTINGS, [{}])
    (tmp_path / ".grid.png.0123.tmp").touch()  # of a process that was killed
    check_folder(tmp_path, force=False)
    for name in ("notes.txt", "00001.jpg", "00001.png", "grid.png"):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
        with pytest.raises(ValueError, match=rf"^out: {tmp_path} holds {name}, which sampling has not made: "):
            check_folder(tmp_path, force=False)
        check_folder(tmp_path, force=True)
        (tmp_path / name).unlink() if before is None else (tmp_path / name).write_bytes(before)
    (tmp_path / "00002.png").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"holds 00002.png and 1 more, which"):
        check_folder(tmp_path, force=False)
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        check_folder(tmp_path / "grid.png", force=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_images_that_are_not_finite_are_named(value: float):
    images = np.zeros((3, 2, 2, 3), np.float32)
    check_finite(images, ["a", "b", "c"])
    images[1, 0, 1, 2] = value
    with pytest.raises(ValueError, match=r"^images: 1 of 3 are not finite, the first of b$"):
        check_finite(images, ["a", "b", "c"])
