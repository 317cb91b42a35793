"""Pictures of a page: small, each once, no more than fit."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from fopd_jax.reporting.pictures import THUMBNAIL, Album


def decoded(uri: str) -> Image.Image:
    assert uri.startswith("data:image/webp;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_large_ones_shrink_and_look_the_same(tmp_path: Path):
    x = np.linspace(0, 255, 512)
    image = np.stack([np.tile(x, (512, 1)), np.tile(x[:, None], (1, 512)), np.full((512, 512), 90)], -1)
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "a.png")
    album = Album(10**6)
    small = decoded(album.pictures[album.add(tmp_path / "a.png")])
    assert small.size == (THUMBNAIL, THUMBNAIL)
    expected = Image.open(tmp_path / "a.png").resize(small.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(small, np.float64) - np.asarray(expected, np.float64)).mean() < 3
    assert album.bytes < 8000


def test_small_ones_stay_exact(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    album = Album(10**6)
    np.testing.assert_array_equal(decoded(album.pictures[album.add(tmp_path / "a.png")]), pixels)


def test_each_is_held_once_and_no_more_than_fit(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    album = Album(5500)
    names = [album.add(tmp_path / f"{name}.png") for name in "abc"]
    assert names[0] == names[1] != ""
    assert names[2] == ""
    assert (len(album.pictures), album.full) == (1, 1)


def test_what_is_no_picture_is_told(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n half of it")
    (tmp_path / "b.png").mkdir()
    album = Album(10**6)
    assert [album.add(tmp_path / name) for name in ("a.png", "b.png", "missing.png")] == ["", "", ""]
    assert [name in problem for name, problem in zip(("a.png", "b.png", "missing.png"), album.problems, strict=True)]


def test_a_file_that_changes_is_read_again(tmp_path: Path):
    path = tmp_path / "a.png"
    found = []
    for seed in (0, 1):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16 + seed, 16, 3), np.uint8)).save(path)
        found.append(Album(10**6).add(path))
    assert found[0] != found[1]
