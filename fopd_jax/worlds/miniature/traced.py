"""What is in the miniature's images, within a jitted program: the rules of `scores`, one image at a time.

Nothing here is approximate but by rounding, and ties fall as they do there. What a prompt asks for are arrays here,
which `rewards` makes of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from fopd_jax.worlds.miniature.prompts import COLOURS, GLYPHS, SHAPES
from fopd_jax.worlds.miniature.render import SIZE
from fopd_jax.worlds.miniature.scores import (
    COLOUR_TABLE,
    COLOUR_THRESHOLD,
    GLYPH_GAP,
    MAX_GLYPHS,
    MIN_CONTRAST,
    MIN_CORRELATION,
    MIN_IOU,
    MIN_PIXELS,
    PAD,
    PATCH,
    QUALITY_WIDTH,
    WINDOW,
    glyph_templates,
    shape_templates,
    to_unit,
)

Image = UInt8[Array, "24 24 3"]
PIXELS = SIZE * SIZE
MOST_OBJECTS = PIXELS // MIN_PIXELS
"""More do not fit into an image."""
NO_GLYPH, NOTHING, UNKNOWN_SHAPE = -1, -1, len(COLOURS) * len(SHAPES)
_SQUARINGS = 16  # of a matrix, until eigenvalues that differ by 1/1000 are one and nothing
_TOPS, _LEFTS = (SIZE + 2 * PAD - side + 1 for side in WINDOW)
_UNIT = to_unit((np.arange(256, dtype=np.float32) - 127.5) / 127.5)
"""A byte's value in [0, 1], in the host's own operations."""


def quality(image: Image) -> Float[Array, ""]:
    """As `scores.quality_score`."""
    nearest, _ = _nearest_colour(_planes(image))
    return jnp.exp(-nearest / QUALITY_WIDTH**2).mean()


def _planes(image: Image) -> Float[Array, "3 p"]:
    """RGB in [0, 1]."""
    return jnp.asarray(_UNIT)[image.reshape(PIXELS, 3).T.astype(jnp.int32)]


def _nearest_colour(planes: Float[Array, "3 p"]) -> tuple[Float[Array, " p"], Int[Array, " p"]]:
    """Each pixel's squared distance to the nearest colour of `COLOUR_TABLE`, and its place there, the first of ties."""
    nearest, place = jnp.full(PIXELS, jnp.inf), jnp.zeros(PIXELS, jnp.int32)
    for i, colour in enumerate(COLOUR_TABLE):
        distance = jnp.square(planes - jnp.asarray(colour)[:, None]).sum(axis=0)
        place = jnp.where(distance < nearest, i, place)
        nearest = jnp.minimum(distance, nearest)
    return nearest, place


_MOMENTS = np.stack([np.ones(PIXELS), *np.divmod(np.arange(PIXELS), SIZE)], axis=-1).astype(np.int32)
"""Of each pixel one, its row and its column."""


# ---- reading text


def read_text(image: Image) -> Int[Array, " 3"]:
    """As `scores.read_text`: places in `GLYPHS`, left to right, `NO_GLYPH` after the last."""
    best = _glyph_correlation(_contrast(image)).max(axis=0)
    glyphs, places = [], []
    for _ in range(MAX_GLYPHS):
        left, glyph = jnp.divmod(best.argmax(), len(GLYPHS))
        found = best.max() >= MIN_CORRELATION
        glyphs.append(jnp.where(found, glyph, NO_GLYPH))
        places.append(jnp.where(found, left, _LEFTS))
        near = jnp.abs(jnp.arange(_LEFTS) - left) < GLYPH_GAP
        best = jnp.where(near[:, None], -1.0, best)
    return jnp.stack(glyphs)[jnp.argsort(jnp.stack(places))]


def _contrast(image: Image) -> Float[Array, "24 24"]:
    difference = _planes(image) - _medians(image)[:, None]
    scatter = (difference[:, None] * difference[None]).sum(axis=-1)
    grey = (difference * _leading_direction(scatter)[:, None]).sum(axis=0)
    return (grey * jnp.where(grey.sum() < 0, -1.0, 1.0)).reshape(SIZE, SIZE)


def _medians(image: Image) -> Float[Array, " 3"]:
    """Of each colour's values in [0, 1], by halving the range of levels: the mean of the two in the middle."""
    levels = image.reshape(PIXELS, 3).T.astype(jnp.int32)
    low = jnp.zeros(3, jnp.int32)
    for bit in (128, 64, 32, 16, 8, 4, 2, 1):
        fewer = (levels < (low + bit)[:, None]).sum(axis=1) < PIXELS // 2
        low = jnp.where(fewer, low + bit, low)
    above = jnp.where(levels > low[:, None], levels, 255).min(axis=1)
    high = jnp.where((levels <= low[:, None]).sum(axis=1) > PIXELS // 2, low, above)
    table = jnp.asarray(_UNIT)
    return (table[low] + table[high]) / 2


def _leading_direction(scatter: Float[Array, "3 3"]) -> Float[Array, " 3"]:
    """The eigenvector of the largest eigenvalue, of unit norm; 0 of no scatter."""
    smallest = float(np.finfo(np.float32).tiny)

    def scaled(matrix: Array) -> Array:
        return matrix / jnp.maximum(jnp.trace(matrix), smallest)

    def square(_: Any, matrix: Array) -> Array:
        return scaled((matrix[:, :, None] * matrix[None]).sum(axis=1))

    projector = jax.lax.fori_loop(0, _SQUARINGS, square, scaled(scatter))
    column = projector[:, jnp.diagonal(projector).argmax()]
    return column / jnp.maximum(jnp.linalg.norm(column), smallest)


def _glyph_correlation(grey: Float[Array, "24 24"]) -> Float[Array, "tops lefts glyphs"]:
    padded = jnp.pad(grey, PAD, mode="edge")
    strips = jnp.stack([padded[top : top + WINDOW[0]].reshape(-1) for top in range(_TOPS)])
    area = WINDOW[0] * WINDOW[1]
    sums, boxes = _strip_templates()
    precision = jax.lax.Precision.HIGHEST
    found = jnp.matmul(strips, jnp.asarray(sums), precision=precision).reshape(_TOPS, _LEFTS, len(GLYPHS))
    mean = jnp.matmul(strips, jnp.asarray(boxes), precision=precision) / area
    square = jnp.matmul(jnp.square(strips), jnp.asarray(boxes), precision=precision) / area
    floor = (MIN_CONTRAST / 2) ** 2
    return found / jnp.sqrt(jnp.maximum(square - jnp.square(mean), floor) * area)[..., None]


def _strip_templates() -> tuple[np.ndarray, np.ndarray]:
    """What a strip of the image as high as a window is multiplied by: glyphs at every place, and a box at every place.

    One large product does what many small ones would.
    """
    height, width = WINDOW
    glyphs = glyph_templates().reshape(height, width, len(GLYPHS))
    sums = np.zeros((height, SIZE + 2 * PAD, _LEFTS, len(GLYPHS)), np.float32)
    boxes = np.zeros((height, SIZE + 2 * PAD, _LEFTS), np.float32)
    for left in range(_LEFTS):
        sums[:, left : left + width, left] = glyphs
        boxes[:, left : left + width, left] = 1
    return sums.reshape(-1, _LEFTS * len(GLYPHS)), boxes.reshape(-1, _LEFTS)


def rate_text(read: Int[Array, " 3"], target: Int[Array, " t"], length: Int[Array, ""]) -> Float[Array, ""]:
    """As `rewards.ocr.rate` of a target's first `length` places; NaN of a length of 0."""
    wanted = jnp.arange(len(target)) < length
    filled = jnp.concatenate([read, jnp.full(len(target), NO_GLYPH, read.dtype)])
    offsets = range(MAX_GLYPHS)
    inside = jnp.stack([((filled[i : i + len(target)] == target) | ~wanted).all() for i in offsets]).any()
    distance = jnp.where(inside, 0, jnp.minimum(_edit_distance(read, target, length), length))
    return jnp.where(length > 0, 1.0 - distance / jnp.maximum(length, 1), jnp.nan)


def _edit_distance(read: Int[Array, " 3"], target: Int[Array, " t"], length: Int[Array, ""]) -> Int[Array, ""]:
    """Levenshtein's, row by row; insertions along a row are a running minimum."""
    columns = jnp.arange(len(target) + 1)
    rows = [columns]
    for i in range(MAX_GLYPHS):
        row = jnp.minimum(rows[-1][:-1] + (read[i] != target).astype(jnp.int32), rows[-1][1:] + 1)
        row = jnp.concatenate([jnp.full(1, i + 1), row])
        rows.append(jax.lax.cummin(row - columns) + columns)
    return jnp.stack(rows)[(read != NO_GLYPH).sum(), length]


# ---- finding objects


def find_objects(image: Image) -> Int[Array, " objects"]:
    """As `scores.find_objects`: each object's kind, colour · shapes + shape; `UNKNOWN_SHAPE` or `NOTHING`."""
    nearest, colour = _nearest_colour(_planes(image))
    seen = (nearest < COLOUR_THRESHOLD**2) & (colour < len(COLOURS))
    colour = jnp.where(seen, colour, -1)
    labels = _components(colour)
    sums = jnp.zeros((PIXELS, 3), jnp.int32).at[labels].add(jnp.where(seen[:, None], jnp.asarray(_MOMENTS), 0))
    roots = jnp.nonzero(sums[:, 0] >= MIN_PIXELS, size=MOST_OBJECTS, fill_value=PIXELS)[0]
    there = roots < PIXELS
    roots = jnp.minimum(roots, PIXELS - 1)
    size, *moments = jnp.moveaxis(sums[roots], -1, 0)
    centres = [(2 * moment + size) // jnp.maximum(2 * size, 1) for moment in moments]
    shape = _classify(_crops(labels, seen, roots, *centres), size)
    kinds = jnp.where(shape < len(SHAPES), colour[roots] * len(SHAPES) + shape, UNKNOWN_SHAPE)
    return jnp.where(there, kinds, NOTHING)


def _components(colour: Int[Array, " p"]) -> Int[Array, " p"]:
    """Of each pixel the first one of the region of its colour that is joined to it by edges; -1 is no colour.

    A pixel's label leads towards that first one. As long as a neighbour's is smaller, what the label points at takes
    the smaller one, and the way to the end is halved: a few rounds, however the region winds.
    """
    grid = colour.reshape(SIZE, SIZE)
    sides = [(axis, step) for axis in (0, 1) for step in (1, -1)]
    joined = [(grid >= 0) & (_shifted(grid, *side, -1) == grid) for side in sides]

    def hook(state: tuple[Array, Array]) -> tuple[Array, Array]:
        labels = state[0]
        least = grid = labels.reshape(SIZE, SIZE)
        for side, same in zip(sides, joined, strict=True):
            least = jnp.where(same, jnp.minimum(least, _shifted(grid, *side, PIXELS)), least)
        found = labels.at[labels].min(least.reshape(PIXELS))
        found = found[found]
        return found, (found != labels).any()

    return jax.lax.while_loop(lambda state: state[1], hook, (jnp.arange(PIXELS), jnp.asarray(True)))[0]


def _shifted(grid: Int[Array, "24 24"], axis: int, step: int, filling: int) -> Int[Array, "24 24"]:
    """Each pixel's neighbour, `filling` beyond the border."""
    ends = [(0, 0, 0), (0, 0, 0)]
    ends[axis] = (step, -step, 0)
    return jax.lax.pad(grid, jnp.asarray(filling, grid.dtype), ends)


def _crops(
    labels: Int[Array, " p"], seen: Bool[Array, " p"], roots: Int[Array, " k"], y: Int[Array, " k"], x: Int[Array, " k"]
) -> Bool[Array, "k side side"]:
    """Each object's mask in a window around its centre."""
    grid = jnp.pad(jnp.where(seen, labels, -1).reshape(SIZE, SIZE), PATCH // 2, constant_values=-1)
    windows = jax.vmap(lambda y, x: jax.lax.dynamic_slice(grid, (y, x), (PATCH, PATCH)))(y, x)
    return windows == roots[:, None, None]


def _classify(crops: Bool[Array, "k side side"], sizes: Int[Array, " k"]) -> Int[Array, " k"]:
    """Each object's shape, a place in `SHAPES`, or as many as there are for one that resembles none."""
    templates, template_sizes = (jnp.asarray(each) for each in shape_templates())
    overlap = crops.reshape(len(crops), -1).astype(jnp.float32) @ templates
    iou = overlap / (sizes[:, None].astype(jnp.float32) + template_sizes[None] - overlap)
    by_shape = iou.reshape(len(crops), len(SHAPES), -1).max(axis=-1)
    return jnp.where(by_shape.max(axis=-1) >= MIN_IOU, by_shape.argmax(axis=-1), len(SHAPES))


def share_right(
    found: Int[Array, " objects"], kinds: Int[Array, " 2"], counts: Int[Array, " 2"]
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """As `scores.share_right`, NaN of no phrase, and whether all is right; a count of 0 is no phrase."""
    asked, phrases = counts.sum(), (counts > 0).sum()
    there = jnp.where(counts > 0, (found[None] == kinds[:, None]).sum(axis=1), 0)
    extra = (found != NOTHING).sum() - there.sum()
    shares = jnp.minimum(there, counts) / jnp.maximum(jnp.maximum(there, counts), 1)
    share = shares.sum() / phrases.astype(jnp.float32) * asked.astype(jnp.float32) / (asked + extra).astype(jnp.float32)
    return share, (there == counts).all() & (extra == 0)
