"""Labelled image grids."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from fopd_jax.evaluation.labels import make_label
from fopd_jax.rewards.pixels import to_pixels

_MARGIN, _LEAST_CELL, _WIDEST_ROW_LABEL, _LEAST_TITLE = 6, 96, 240, 480


def draw_grid(
    images: Float[np.ndarray, "rows columns h w 3"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Images in [-1, 1] as one picture, row labels at the left, column labels on top, the title above all.

    Small images are enlarged by whole factors, without smoothing. Labels are wrapped.
    """
    rows, columns, height, width, _ = images.shape
    factor = max(1, -(-_LEAST_CELL // width))
    cell_w, cell_h = width * factor, height * factor
    row_heads = [make_label(text, _WIDEST_ROW_LABEL) for text in row_labels]
    column_heads = [make_label(text, cell_w) for text in column_labels]
    left = max(label.width for label in row_heads) + 2 * _MARGIN
    full = left + columns * (cell_w + _MARGIN)
    head = make_label(title, max(full, _LEAST_TITLE) - 2 * _MARGIN) if title else None
    above = head.height + _MARGIN if head else 0
    top = above + max(label.height for label in column_heads) + 2 * _MARGIN
    lowest = [max(cell_h, label.height) for label in row_heads]  # a row is as high as its label at least
    tops = [top + sum(lowest[:r]) + r * _MARGIN for r in range(rows)]
    size = (max(full, head.width + 2 * _MARGIN if head else 0), tops[-1] + lowest[-1] + _MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    pixels = to_pixels(images)
    if head:
        head.draw(draw, _MARGIN, _MARGIN)
    for c, label in enumerate(column_heads):
        label.draw(draw, left + c * (cell_w + _MARGIN), above + _MARGIN)
    for r, (label, y) in enumerate(zip(row_heads, tops, strict=True)):
        label.draw(draw, _MARGIN, y + max(0, (cell_h - label.height) // 2))
        for c in range(columns):
            x = left + c * (cell_w + _MARGIN)
            canvas.paste(Image.fromarray(pixels[r, c]).resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x - 1, y - 1, x + cell_w, y + cell_h), outline="grey")
    return canvas
