import io

import numpy as np
import pytest
from PIL import Image

from fopd_jax.rewards.served.png import decode_png, encode_png, png_size
from tests.rewards.served.malformed import pictures, png


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 5, 3), (64, 33, 3)])
def test_pixels_come_back_as_they_were(shape: tuple[int, ...]):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    file = encode_png(image)
    np.testing.assert_array_equal(decode_png(file, 2**20), image)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), image)
    assert png_size(file, 2**20) == shape[:2]


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_every_filter_and_level_is_read_as_pillow_reads_it(level: int):
    """A smooth picture: Pillow's encoder chooses among all five filters."""
    y, x = np.mgrid[:48, :40]
    image = np.stack([x * 5, y * 4, (x * y) % 256], -1).astype(np.uint8)
    image[20:] = np.random.default_rng(1).integers(0, 256, image[20:].shape)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=level, dpi=(72, 72))
    np.testing.assert_array_equal(decode_png(buffer.getvalue(), 2**20), image)


def test_each_filter_by_itself_is_read_as_pillow_reads_it():
    rows = np.random.default_rng(2).integers(0, 256, (5, 25), np.uint8)
    rows[:, 0] = range(5)
    file = png(height=5, data=rows.tobytes())
    np.testing.assert_array_equal(decode_png(file, 40), np.asarray(Image.open(io.BytesIO(file))))


@pytest.mark.parametrize("name", pictures())
def test_what_is_no_plain_rgb_picture_is_refused(name: str):
    with pytest.raises(ValueError, match="found"):
        decode_png(pictures()[name], 2**20)


def test_a_picture_has_at_most_so_many_pixels():
    assert decode_png(png(8, 8), 64).shape == (8, 8, 3)
    with pytest.raises(ValueError, match="found a PNG of 8x8 pixels, expected from 1 to 63 in all"):
        decode_png(png(8, 8), 63)
