"""What is in the miniature's images: the text they show, the objects they hold, and how clean they look.

Closed-form stand-ins for a text recogniser, an object detector and an image-quality model. Every function takes
images [N, 24, 24, 3] whose data range is [-1, 1]; values beyond it count as the nearest end.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from fopd_jax.worlds.miniature.prompts import COLOURS, SHAPES, Phrase, Scene, parse
from fopd_jax.worlds.miniature.render import BACKGROUNDS, GLYPH_MASKS, PALETTE, SHAPE_MASKS, SIZE

MAX_GLYPHS = 3
UNKNOWN = "unknown"  # the shape of an object that resembles none

_CHUNK = 64  # images read at a time, which bounds the memory of their windows
PAD = 2  # glyphs may touch the border
WINDOW = (12, 8)  # a glyph and a margin of one pixel
MIN_CORRELATION = 0.7
MIN_CONTRAST = 0.25  # of a glyph's strokes to its surroundings, RGB distance
GLYPH_GAP = 6  # two glyphs are at least their own width apart

MIN_PIXELS = 10  # smaller components are specks; the smallest shape has 24
MIN_IOU = 0.7
PATCH = 12  # side of the crop in which an object is compared: a shape, its shifts and some excess
_MAX_SHIFT = 1
_SOFTENINGS = (0.0, 0.8, 1.0)  # pixels of blur after which a shape is still to be known
COLOUR_THRESHOLD = 0.55  # RGB distance beyond which a pixel belongs to nothing
QUALITY_WIDTH = 0.2  # RGB distance at which a pixel's quality has fallen to 1/e

COLOUR_TABLE = np.array([PALETTE[colour] for colour in COLOURS] + list(BACKGROUNDS.values()), np.float32)


def read_text(images: Float[np.ndarray, "n 24 24 3"]) -> list[str]:
    """The up to three glyphs found in each image, left to right, by normalised cross-correlation.

    Any glyph colour and background will do, and any position; what resembles no glyph is not read, so a blank or
    messy image gives a short or empty string.
    """
    starts = range(0, len(images), _CHUNK)
    return [text for start in starts for text in _read_chunk(images[start : start + _CHUNK])]


def quality_score(images: Float[np.ndarray, "n 24 24 3"]) -> Float[np.ndarray, "n"]:
    """How clean each image is, in (0, 1]: the mean over pixels of exp(-(d / 0.2)^2).

    d is the pixel's RGB distance ([0, 1] a channel) to the nearest colour of the palette or background. Noise, blur,
    tints and gradients all raise d; a clean render has d = 0 everywhere, hence exactly 1.
    """
    nearest = _squared_colour_distances(images).min(axis=-1)  # [N, 24, 24]
    return np.exp(-nearest / QUALITY_WIDTH**2).mean(axis=(1, 2), dtype=float)


def find_objects(images: Float[np.ndarray, "n 24 24 3"]) -> list[Counter[tuple[str, str]]]:
    """How many objects of each (colour, shape) every image holds; the shape may be `UNKNOWN`."""
    labels, count = _components(_colour_masks(images))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    kept = 1 + np.flatnonzero(sizes[1:] >= MIN_PIXELS)
    found: list[Counter[tuple[str, str]]] = [Counter() for _ in images]
    if kept.size:
        first = _first_planes(labels, count)[kept]  # the image and colour each object lies in
        shapes = _classify_shapes(_crops(labels, kept), sizes[kept])
        for plane, shape in zip(first, shapes, strict=True):
            found[plane // len(COLOURS)][COLOURS[plane % len(COLOURS)], shape] += 1
    return found


def to_unit(images: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Data range [-1, 1] to RGB in [0, 1]."""
    return np.clip((np.asarray(images, np.float32) + 1) / 2, 0, 1)


# Reading text


def _read_chunk(images: Float[np.ndarray, "n 24 24 3"]) -> list[str]:
    correlation = _glyph_correlation(_contrast(to_unit(images)))
    best = correlation.max(axis=1)  # over tops: [N, lefts, glyphs]
    return ["".join(_pick_glyphs(scores)) for scores in best]


def _pick_glyphs(scores: Float[np.ndarray, "lefts glyphs"]) -> list[str]:
    """Takes the best match again and again, each time blanking its surroundings; then sorts by position."""
    glyphs, scores = list(GLYPH_MASKS), scores.copy()
    picked: list[tuple[int, str]] = []
    while len(picked) < MAX_GLYPHS and scores.max() >= MIN_CORRELATION:
        left, glyph = divmod(int(scores.argmax()), len(glyphs))
        picked.append((left, glyphs[glyph]))
        scores[max(0, left - GLYPH_GAP + 1) : left + GLYPH_GAP] = -1
    return [glyph for _, glyph in sorted(picked)]


def _contrast(unit: Float[np.ndarray, "n 24 24 3"]) -> Float[np.ndarray, "n 24 24"]:
    """Grey images in which strokes are bright on dark, whatever the colours.

    The background is the median colour; pixels are projected on the direction in which they differ from it most, which
    keeps only a third of the noise.
    """
    difference = unit - np.median(unit, axis=(1, 2), keepdims=True)
    scatter = np.einsum("nyxi,nyxj->nij", difference, difference)
    direction = np.linalg.eigh(scatter)[1][..., -1]
    grey = np.einsum("nyxi,ni->nyx", difference, direction)
    return grey * np.where(grey.sum(axis=(1, 2), keepdims=True) < 0, -1, 1)


def _glyph_correlation(grey: Float[np.ndarray, "n 24 24"]) -> Float[np.ndarray, "n tops lefts glyphs"]:
    """Normalised cross-correlation in [-1, 1] of every window with every glyph; flat windows give about 0."""
    padded = np.pad(grey, ((0, 0), (PAD, PAD), (PAD, PAD)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=(1, 2))
    flat = windows.reshape(*windows.shape[:3], -1)
    variance = flat.var(axis=-1, keepdims=True)
    floor = (MIN_CONTRAST / 2) ** 2  # half strokes, half margin: their standard deviation is half the contrast
    norm = np.sqrt(np.maximum(variance, floor) * flat.shape[-1])
    return flat @ glyph_templates() / norm


@functools.cache
def glyph_templates() -> Float[np.ndarray, "pixels glyphs"]:
    """Zero-mean, unit-norm windows, slightly blurred to match soft edges as well as sharp ones."""
    framed = np.stack([np.pad(mask, 1) for mask in GLYPH_MASKS.values()]).astype(np.float32)
    soft = ndimage.gaussian_filter(framed, (0, 0.5, 0.5), mode="constant").reshape(len(framed), -1)
    soft -= soft.mean(axis=1, keepdims=True)
    return (soft / np.linalg.norm(soft, axis=1, keepdims=True)).T


# Finding objects


def _squared_colour_distances(images: Float[np.ndarray, "n 24 24 3"]) -> Float[np.ndarray, "n 24 24 colours"]:
    """Squared RGB distance of every pixel to each palette colour, then to each background."""
    difference = to_unit(images)[..., None, :] - COLOUR_TABLE
    return np.einsum("...i,...i->...", difference, difference)


def _colour_masks(images: Float[np.ndarray, "n 24 24 3"]) -> Bool[np.ndarray, "planes 24 24"]:
    """One plane per image and palette colour: the pixels nearest to that colour and near enough."""
    distances = _squared_colour_distances(images)
    nearest = np.where(distances.min(axis=-1) < COLOUR_THRESHOLD**2, distances.argmin(axis=-1), -1)
    planes = nearest[:, None] == np.arange(len(COLOURS))[:, None, None]  # [N, colours, 24, 24]
    return planes.reshape(-1, SIZE, SIZE)


def _components(planes: Bool[np.ndarray, "planes 24 24"]) -> tuple[Int[np.ndarray, "planes 24 24"], int]:
    """Labels 1.. of the regions joined by edges within a plane, never across planes; and how many there are."""
    within_plane = np.zeros((3, 3, 3), bool)
    within_plane[1] = ndimage.generate_binary_structure(2, 1)
    labels: Any = ndimage.label(planes, within_plane)
    return labels


def _first_planes(labels: Int[np.ndarray, "planes 24 24"], count: int) -> Int[np.ndarray, "labels"]:
    """The plane of every label, 0 being the background's."""
    plane, y, x = np.nonzero(labels)
    planes = np.zeros(count + 1, int)
    planes[labels[plane, y, x]] = plane
    return planes


def _crops(
    labels: Int[np.ndarray, "planes 24 24"], kept: Int[np.ndarray, "objects"]
) -> Bool[np.ndarray, "objects side side"]:
    """Each kept object's mask in a window centred on its centre of mass."""
    plane, y, x = np.nonzero(np.isin(labels, kept))
    index = np.searchsorted(kept, labels[plane, y, x])
    size = np.bincount(index)
    offsets = []
    for coordinate in (y, x):
        centre = np.bincount(index, weights=coordinate) / size
        offsets.append(coordinate - np.floor(centre + 0.5).astype(int)[index] + PATCH // 2)
    inside = np.all([(offset >= 0) & (offset < PATCH) for offset in offsets], axis=0)
    crops = np.zeros((len(kept), PATCH, PATCH), bool)
    crops[index[inside], offsets[0][inside], offsets[1][inside]] = True
    return crops


def _classify_shapes(crops: Bool[np.ndarray, "objects side side"], sizes: Int[np.ndarray, "objects"]) -> list[str]:
    """The shape whose shifted mask has the largest intersection over union with each object, if it is large enough."""
    templates, template_sizes = shape_templates()
    overlap = crops.reshape(len(crops), -1).astype(np.float32) @ templates
    iou = overlap / (sizes[:, None] + template_sizes - overlap)
    by_shape = iou.reshape(len(crops), len(SHAPES), -1).max(axis=-1)
    best = by_shape.argmax(axis=-1)
    return [SHAPES[i] if row[i] >= MIN_IOU else UNKNOWN for row, i in zip(by_shape, best, strict=True)]


@functools.cache
def shape_templates() -> tuple[Float[np.ndarray, "pixels shifted"], Float[np.ndarray, "shifted"]]:
    """Every shape's variants in a crop, shape by shape, and their sizes."""
    flat = np.stack([mask.ravel() for shape in SHAPES for mask in _variants(SHAPE_MASKS[shape])]).astype(np.float32)
    return flat.T, flat.sum(axis=1)


def _variants(mask: Bool[np.ndarray, "height width"]) -> Iterator[Bool[np.ndarray, "side side"]]:
    """The mask in the middle of a crop at every softening and every small shift.

    Blur rounds corners off: the tip of a triangle vanishes, and it would pass for a circle.
    """
    centred = np.pad(mask, (PATCH - mask.shape[0]) // 2).astype(np.float32)
    shifts = range(-_MAX_SHIFT, _MAX_SHIFT + 1)
    for sigma, dy, dx in itertools.product(_SOFTENINGS, shifts, shifts):
        yield np.roll(ndimage.gaussian_filter(centred, sigma) > 0.5, (dy, dx), axis=(0, 1))


# Comparing with the prompt


def scene_of(prompt: str) -> Scene:
    """What a composition prompt asks for.

    Raises:
      ValueError: it is none.
    """
    content = parse(prompt)
    if not isinstance(content, Scene):
        raise ValueError(f"prompt {prompt!r} asks for text: composition scores need one like 'two red squares'")
    return content


def share_right(found: Counter[tuple[str, str]], scene: Scene) -> float:
    """How much of a scene is there, in [0, 1]: 1 exactly where colours, shapes and numbers are the scene's.

    The mean over phrases of min(found, asked) / max(found, asked), times asked / (asked + extra) with `extra` the
    number of objects of kinds that no phrase names. It falls with every missing or surplus object, and is 0 where
    nothing asked for is found.
    """
    asked = sum(phrase.count for phrase in scene.phrases)
    extra = sum(found.values()) - sum(found[phrase.kind] for phrase in scene.phrases)
    phrases = sum(_phrase_share(found[phrase.kind], phrase) for phrase in scene.phrases) / len(scene.phrases)
    return phrases * asked / (asked + extra)


def _phrase_share(found: int, phrase: Phrase) -> float:
    return min(found, phrase.count) / max(found, phrase.count)
