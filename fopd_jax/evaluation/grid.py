"""Labelled image grids."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

_FONT_SIZE, _MARGIN, _LEAST_CELL = 13, 6, 96


def to_pixels(images: Float[np.ndarray, "*n h w 3"]) -> UInt8[np.ndarray, "*n h w 3"]:
    """Images in [-1, 1] as bytes, rounded to nearest; values beyond are clipped."""
    return np.clip(images * 127.5 + 128.0, 0, 255).astype(np.uint8)


def from_pixels(pixels: UInt8[np.ndarray, "*n h w 3"]) -> Float[np.ndarray, "*n h w 3"]:
    """Bytes as images in [-1, 1], which `to_pixels` turns into the same bytes."""
    return (pixels.astype(np.float32) - 127.5) / 127.5


def draw_grid(
    images: Float[np.ndarray, "rows columns h w 3"], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Images in [-1, 1] as one picture, row labels at the left, column labels (wrapped) on top.

    Small images are enlarged by whole factors, without smoothing.
    """
    rows, columns, height, width, _ = images.shape
    factor = max(1, -(-_LEAST_CELL // width))
    cell_w, cell_h = width * factor, height * factor
    font = ImageFont.load_default(_FONT_SIZE)
    wrapped = [_wrap(label, cell_w, font) for label in column_labels]
    left = int(max(font.getlength(label) for label in row_labels)) + 2 * _MARGIN
    top = max(text.count("\n") + 1 for text in wrapped) * (_FONT_SIZE + 4) + 2 * _MARGIN
    canvas = Image.new("RGB", (left + columns * (cell_w + _MARGIN), top + rows * (cell_h + _MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    pixels = to_pixels(images)
    for c, text in enumerate(wrapped):
        draw.multiline_text((left + c * (cell_w + _MARGIN), _MARGIN), text, "black", font)
    for r, label in enumerate(row_labels):
        y = top + r * (cell_h + _MARGIN)
        draw.text((_MARGIN, y + cell_h // 2 - _FONT_SIZE // 2), label, "black", font)
        for c in range(columns):
            x = left + c * (cell_w + _MARGIN)
            canvas.paste(Image.fromarray(pixels[r, c]).resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x - 1, y - 1, x + cell_w, y + cell_h), outline="grey")
    return canvas


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Break a label between words so that no line exceeds `width` pixels (a longer word keeps a line of its own)."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
