"""Captioned images from files: which ones a batch holds, and what becomes of a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import Pairs
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.images import CaptionedImages, Draws, check_images, read_image

COUNT, SIDE = 6, 8


def _save(path: Path, pixels: Any, **options: Any) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def _plane(colour: Sequence[int], height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.broadcast_to(np.asarray(colour, np.uint8), (height, width, len(colour)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    """Two tasks; image i of a task has colour i, and says so in its caption."""
    folder, tasks = tmp_path_factory.mktemp("images"), {}
    for name in ("one", "two"):
        images = tuple(_save(folder / f"{name}{i}.png", _plane((40 * i, 0, 0))) for i in range(COUNT))
        tasks[name] = Task(name, tuple(f"{name} {i}" for i in range(COUNT)), ("held out",), images=images)
    return tasks


def _draws(world: dict[str, Task], size: int = 64, empty: float = 0.0, seed: int = 0, **pairs: Pairs) -> Draws:
    return Draws(world, pairs or {"one": Pairs(), "two": Pairs()}, size, empty, seed)


# ---- which ones


def test_a_batch_is_a_function_of_seed_and_step(world: dict[str, Task]):
    first = _draws(world)(5)
    assert _draws(world)(5) == first
    assert first not in (_draws(world)(6), _draws(world, seed=1)(5), _draws(world, seed=5)(0))


def test_images_have_their_own_captions_and_tasks_their_shares(world: dict[str, Task]):
    rows = [row for step in range(8) for row in _draws(world, one=Pairs(share=3.0), two=Pairs(share=1.0))(step)]
    assert all(row.caption == f"{row.task} {row.image.stem[-1]}" for row in rows)
    assert {row.image for row in rows} == {*world["one"].images, *world["two"].images}
    share = sum(row.task == "one" for row in rows) / len(rows)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / len(rows)) ** 0.5


def test_captions_are_another_images_or_empty_as_often_as_asked(world: dict[str, Task]):
    rows = [row for step in range(16) for row in _draws(world, empty=0.25, one=Pairs(wrong_caption=0.5))(step)]
    empty = [row for row in rows if not row.caption]
    told = [row for row in rows if row.caption]
    wrong = [row for row in told if row.caption[-1] != row.image.stem[-1]]
    assert abs(len(empty) / len(rows) - 0.25) < 4 * (0.25 * 0.75 / len(rows)) ** 0.5
    assert abs(len(wrong) / len(told) - 0.5) < 4 * 0.5 / len(told) ** 0.5
    always = _draws(world, one=Pairs(wrong_caption=1.0))(0)
    assert all(row.caption[-1] != row.image.stem[-1] for row in always)
    assert all(row.caption.startswith("one ") for row in always)


def test_what_files_cannot_be_is_refused(world: dict[str, Task]):
    with pytest.raises(ValueError, match=r"^tasks\.one\.degraded: found 0\.5, expected 0"):
        _draws(world, one=Pairs(degraded=0.5))
    alone = {"one": Task("one", ("a",), ("b",), images=world["one"].images[:1])}
    with pytest.raises(ValueError, match=r"^tasks\.one\.wrong_caption: found 0\.5, expected 0"):
        _draws(alone, one=Pairs(wrong_caption=0.5))
    with pytest.raises(ValueError, match="share above 0"):
        _draws(world, one=Pairs(share=0.0))


# ---- as latents


def test_a_process_makes_its_rows_of_the_whole_batch(world: dict[str, Task]):
    seen: list[np.ndarray] = []

    def encode(captions: Sequence[str]) -> Conditioning:
        lengths = np.asarray([[len(caption), int(caption[-1])] for caption in captions], np.float32)
        return Conditioning(lengths[:, None], lengths)

    def encode_images(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        seen.append(draws)
        return images.mean((1, 2), keepdims=True) + draws[:, 2, None, None, None].astype(np.float32)

    source = CaptionedImages(_draws(world, seed=7), (SIDE, SIDE), encode, encode_images)
    whole, rows = source.batch(3, np.arange(64)), np.asarray([2, 40, 41])
    part = source.batch(3, rows)
    np.testing.assert_array_equal(part["x0"], whole["x0"][rows])
    np.testing.assert_array_equal(part["conditioning"].pooled, whole["conditioning"].pooled[rows])
    np.testing.assert_array_equal(seen[-1], [[7, 3, row] for row in rows])
    reds = whole["x0"][:, 0, 0, 0] - np.arange(64)  # an image goes with its caption
    np.testing.assert_allclose(reds, 40 * whole["conditioning"].pooled[:, 1] / 127.5 - 1, atol=1e-5)
    drawn = _draws(world, seed=7)(3)
    draws = _draws(world, seed=7)
    assert list(source.upto(4)) == list(dict.fromkeys(row.caption for step in range(4) for row in draws(step)))
    assert source.describe(3, [40]) == [f"{drawn[40].task}: {drawn[40].image}: {drawn[40].caption!r}"]


# ---- files


def test_an_image_covers_its_square_and_loses_its_edges(tmp_path: Path):
    """Twice as wide as high: the middle stays, red margins go, at half the size."""
    pixels = np.concatenate([_plane((255, 0, 0), 16, 8), _plane((0, 255, 0), 16, 16), _plane((255, 0, 0), 16, 8)], 1)
    found = read_image(_save(tmp_path / "wide.png", pixels), (SIDE, SIDE))
    assert (found.shape, found.dtype) == ((SIDE, SIDE, 3), np.float32)
    expected = np.broadcast_to(np.float32([-1, 1, -1]), found.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.15)  # the filter sees a little of what is cut off


@pytest.mark.parametrize(("size", "kept"), [((8, 16), (16, 32)), ((16, 8), (16, 8))])
def test_an_image_covers_what_is_higher_or_wider(size: tuple[int, int], kept: tuple[int, int], tmp_path: Path):
    """Of 16 rows and 32 columns the middle in the shape asked for, its margins gone, resized to it."""
    height, width = kept
    margin = (32 - width) // 2
    pixels = np.broadcast_to(np.uint8([255, 0, 0]), (height, 32, 3)).copy()
    pixels[:, margin : 32 - margin] = (0, 255, 0)
    found = read_image(_save(tmp_path / "a.png", pixels), size)
    assert found.shape == (*size, 3)
    np.testing.assert_allclose(found, np.broadcast_to(np.float32([-1, 1, -1]), found.shape), rtol=0, atol=0.15)


def test_small_images_are_told_by_the_side_that_is_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [_save(tmp_path / f"{h}x{w}.png", _plane((0, 0, 0), h, w)) for h, w in ((8, 4), (7, 9), (9, 3), (64, 64))]
    check_images(paths, (16, 8), "tasks.a.images")
    told = "tasks.a.images: 2 of 4 images are below height 8, width 4 and will be blurred, such as "
    assert f"{told}{paths[1]}" in capsys.readouterr().err.splitlines()


def test_pixels_of_the_right_size_are_kept_as_they_are(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3))
    found = read_image(_save(tmp_path / "a.png", pixels), (SIDE, SIDE))
    np.testing.assert_allclose(found, pixels / 255 * 2 - 1, atol=1e-6)


def test_a_photo_is_turned_as_its_camera_says(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: its left side is up
    pixels = np.concatenate([_plane((255, 255, 255), SIDE, SIDE // 2), _plane((0, 0, 0), SIDE, SIDE // 2)], 1)
    found = read_image(_save(tmp_path / "a.png", pixels, exif=exif), (SIDE, SIDE))
    assert (found[: SIDE // 2] == 1).all()
    assert (found[SIDE // 2 :] == -1).all()


@pytest.mark.parametrize(("pixels", "expected"), [((9, 9, 9, 0), 1.0), ((0, 0, 0, 255), -1.0)])
def test_what_is_transparent_lies_on_white(pixels: tuple[int, ...], expected: float, tmp_path: Path):
    assert (read_image(_save(tmp_path / "a.png", _plane(pixels)), (SIDE, SIDE)) == expected).all()


def test_grey_images_are_images(tmp_path: Path):
    found = read_image(_save(tmp_path / "a.png", np.full((SIDE, SIDE), 255)), (SIDE, SIDE))
    assert found.shape == (SIDE, SIDE, 3)
    assert (found == 1).all()


def _truncated(path: Path) -> Path:
    _save(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def test_files_that_are_no_images_are_named(tmp_path: Path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(deep)
    bad = [text, deep, _truncated(tmp_path / "half.jpg"), _truncated(tmp_path / "half.png"), tmp_path / "gone.png"]
    good = _save(tmp_path / "good.png", _plane((0, 0, 0)))
    for path in bad:
        with pytest.raises(ValueError, match=f"^tasks.a.images: {path}: ") as error:
            check_images([good, path, good], (SIDE, SIDE), "tasks.a.images")
        assert "\n" not in str(error.value)


def test_small_images_are_counted_and_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [_save(tmp_path / f"{i}.png", _plane((0, 0, 0), 64, size)) for i, size in enumerate((8, 9, 3, 2))]
    check_images(paths, (16, 16), "tasks.a.images")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tasks.a.images: ")]
    assert notes == [f"tasks.a.images: 2 of 4 images are below 8 pixels a side and will be blurred, such as {paths[2]}"]
