"""Image grids: size, placement, colours, labels."""

import numpy as np
import pytest
from PIL import ImageFont

from fopd_jax.evaluation.grid import draw_grid

MARGIN, FONT_SIZE = 6, 13


def _levels(rows: int, columns: int, side: int) -> np.ndarray:
    """Flat grey images, each with its own level."""
    levels = np.linspace(-1, 1, rows * columns, dtype=np.float32).reshape(rows, columns, 1, 1, 1)
    return np.broadcast_to(levels, (rows, columns, side, side, 3))


def _corner(row_labels: list[str], lines: int) -> tuple[int, int]:
    """Where the first image starts, right of the longest label and below the column labels."""
    font = ImageFont.load_default(FONT_SIZE)
    left = int(max(font.getlength(label) for label in row_labels)) + 2 * MARGIN
    return left, lines * (FONT_SIZE + 4) + 2 * MARGIN


@pytest.mark.parametrize(("side", "cell"), [(24, 96), (32, 96), (36, 108), (128, 128)])
def test_size_and_place_of_every_image(side: int, cell: int):
    rows, columns = ["base", "student with a long name"], ["a", "b", "c"]
    picture = draw_grid(_levels(2, 3, side), rows, columns)
    left, top = _corner(rows, 1)
    assert picture.size == (left + 3 * (cell + MARGIN), top + 2 * (cell + MARGIN))
    pixels = np.asarray(picture)
    expected = np.linspace(0, 255, 6).reshape(2, 3)
    for r in range(2):
        for c in range(3):
            y, x = top + r * (cell + MARGIN), left + c * (cell + MARGIN)
            image = pixels[y : y + cell, x : x + cell]
            assert np.ptp(image) == 0
            assert abs(float(image[0, 0, 0]) - expected[r, c]) <= 0.5


def test_small_images_are_enlarged_pixel_by_pixel():
    image = np.random.default_rng(0).choice([-1.0, 1.0], (1, 1, 24, 24, 3)).astype(np.float32)
    left, top = _corner(["x"], 1)
    drawn = np.asarray(draw_grid(image, ["x"], ["y"]))[top : top + 96, left : left + 96]
    np.testing.assert_array_equal(drawn, (127.5 * (image[0, 0] + 1)).astype(np.uint8).repeat(4, 0).repeat(4, 1))


def test_values_outside_the_range_are_clipped():
    images = np.stack([np.full((24, 24, 3), value, np.float32) for value in (-3.0, 3.0)])[None]
    left, top = _corner(["x"], 1)
    drawn = np.asarray(draw_grid(images, ["x"], ["low", "high"]))
    assert drawn[top, left].tolist() == [0, 0, 0]
    assert drawn[top, left + 96 + MARGIN].tolist() == [255, 255, 255]


def test_long_prompts_are_wrapped_above_their_column():
    prompt = "two red squares and one blue circle"
    short, long = (draw_grid(_levels(1, 1, 24), ["x"], [label]) for label in ("red", prompt))
    assert long.width == short.width
    assert (long.height - short.height) % (FONT_SIZE + 4) == 0
    assert long.height >= short.height + 2 * (FONT_SIZE + 4)
