"""The picture of a distillation's health: who disagrees with whom, and where the student still does."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from fopd_jax.evaluation.labels import LINE, make_label

CELL, HEIGHT, WIDTH, MARGIN, LABEL = 88, 240, 420, 12, 110
INKS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2")
"""Of curves, in turn."""
Curves = Mapping[str, Sequence[tuple[float, float]]]
"""`(noise level, gap)` of each task, by falling noise."""


def draw_health(names: Sequence[str], between: Float[np.ndarray, "v v"], curves: Curves) -> Image.Image:
    """The mean squares between every two as a table of shades, and below it the gap's curves over noise levels.

    `names`: of the rows and columns; shades are of the roots, black at the largest.
    """
    table = _draw_table(names, np.sqrt(np.maximum(between, 0)))
    plot = _draw_curves(curves)
    canvas = Image.new("RGB", (max(table.width, plot.width), table.height + plot.height), "white")
    canvas.paste(table, (0, 0))
    canvas.paste(plot, (0, table.height))
    return canvas


def _draw_table(names: Sequence[str], roots: Float[np.ndarray, "v v"]) -> Image.Image:
    title = make_label("root mean square between velocities at fixed states", WIDTH)
    heads = [make_label(name, CELL - 4) for name in names]
    sides = [make_label(name, LABEL - 2 * MARGIN) for name in names]
    top = MARGIN + title.height + max(head.height for head in heads) + 4
    size = LABEL + CELL * len(names) + MARGIN, top + CELL * len(names) + MARGIN
    canvas = Image.new("RGB", (max(size[0], WIDTH), size[1]), "white")
    pen, largest = ImageDraw.Draw(canvas), float(roots.max()) or 1.0
    title.draw(pen, MARGIN, MARGIN // 2)
    for i, (head, side) in enumerate(zip(heads, sides, strict=True)):
        head.draw(pen, LABEL + i * CELL + 2, top - head.height - 2)
        side.draw(pen, MARGIN, top + i * CELL + (CELL - side.height) // 2)
        for j in range(len(names)):
            shade = int(255 * (1 - roots[i, j] / largest))
            x, y = LABEL + j * CELL, top + i * CELL
            pen.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=(shade, shade, 255))
            ink = "white" if shade < 110 else "black"
            pen.text((x + 8, y + CELL // 2 - LINE // 2), f"{roots[i, j]:.3f}", ink, title.font)
    return canvas


def _draw_curves(curves: Curves) -> Image.Image:
    """Straight lines between noise levels, noise at the left; the gap's axis is logarithmic."""
    canvas = Image.new("RGB", (WIDTH + LABEL, HEIGHT + 4 * LINE), "white")
    pen = ImageDraw.Draw(canvas)
    title = make_label("gap to the own teacher along its trajectory, by noise level", WIDTH)
    title.draw(pen, MARGIN, MARGIN // 2)
    values = [gap for curve in curves.values() for _, gap in curve if gap > 0]
    low, high = (_power(min(values), math.floor), _power(max(values), math.ceil)) if values else (0, 1)
    high = max(high, low + 1)
    left, top, bottom = LABEL // 2, 2 * LINE, HEIGHT
    pen.rectangle((left, top, WIDTH, bottom), outline="grey")

    def place(sigma: float, gap: float) -> tuple[float, float]:
        share = (math.log10(max(gap, 10.0**low)) - low) / (high - low)
        return left + (1 - sigma) * (WIDTH - left), bottom - share * (bottom - top)

    for power in range(low, high + 1):
        y = place(1.0, 10.0**power)[1]
        pen.line((left, y, WIDTH, y), fill="#dddddd")
        pen.text((4, y - LINE // 2), f"1e{power}", "black", title.font)
    for sigma in (1.0, 0.75, 0.5, 0.25, 0.0):
        pen.text((place(sigma, 1.0)[0] - 10, bottom + 4), f"{sigma:g}", "black", title.font)
    for k, (name, curve) in enumerate(curves.items()):
        ink, points = INKS[k % len(INKS)], [place(*each) for each in curve]
        if len(points) > 1:
            pen.line(points, fill=ink, width=2)
        for x, y in points:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
        pen.text((WIDTH + 6, top + k * LINE), name[:16], ink, title.font)
    return canvas


def _power(value: float, rounded: Callable[[float], int]) -> int:
    return rounded(math.log10(value))
