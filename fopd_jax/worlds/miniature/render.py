"""Draws the miniature world's prompts as 24x24 images, clean or degraded.

Images are float32 [24, 24, 3] in [-1, 1]; colours are written here as RGB in [0, 1].
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from fopd_jax.worlds.miniature.prompts import COLOURS, GLYPHS, SHAPES, Phrase, Scene, Sign, parse

SIZE = 24  # pixels a side
CELL = 8  # one glyph or one object a cell: a multiple of the model's patch
GLYPH_TOPS = (3, 7, 11)  # a patch apart, so that glyphs fall alike on the patch grid

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.9, 0.05, 0.25),
    "green": (0.0, 0.75, 0.3),
    "blue": (0.2, 0.4, 1.0),
    "yellow": (1.0, 0.8, 0.0),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}

_FONT = {
    "A": "010 101 111 101 101",
    "B": "110 101 110 101 110",
    "C": "111 100 100 100 111",
    "J": "001 001 001 101 111",
    "K": "101 101 110 101 101",
    "P": "111 101 111 100 100",
    "Y": "101 101 010 010 010",
    "Z": "111 001 010 100 111",
    "4": "101 101 111 001 001",
    "7": "111 001 001 010 010",
}
_SHAPE_BITS = {
    "square": "111111 111111 111111 111111 111111 111111",
    "circle": "001100 011110 111111 111111 011110 001100",
    "triangle": "001100 001100 011110 011110 111111 111111",
}


def _mask(bits: str) -> Bool[np.ndarray, "height width"]:
    return np.array([[bit == "1" for bit in row] for row in bits.split()])


GLYPH_MASKS = {glyph: _mask(_FONT[glyph]).repeat(2, axis=0).repeat(2, axis=1) for glyph in GLYPHS}  # 10 x 6
SHAPE_MASKS = {shape: _mask(_SHAPE_BITS[shape]) for shape in SHAPES}  # 6 x 6


def render(prompt: str, rng: np.random.Generator) -> Float[np.ndarray, "24 24 3"]:
    """A clean image of a prompt; background, position and (for signs) colour are drawn from `rng`.

    Raises:
      ValueError: the prompt cannot be parsed.
    """
    content = parse(prompt)
    background = list(BACKGROUNDS.values())[rng.integers(len(BACKGROUNDS))]
    canvas = np.full((SIZE, SIZE, 3), background, np.float32)
    if isinstance(content, Sign):
        _draw_sign(canvas, content, rng)
    else:
        _draw_scene(canvas, content, rng)
    return canvas * 2 - 1


def degrade(image: Float[np.ndarray, "24 24 3"], rng: np.random.Generator) -> Float[np.ndarray, "24 24 3"]:
    """The image with two random flaws of random strength, still legible and within [-1, 1].

    The flaws are two of: pixel noise, blur, a tint, an uneven background, specks.
    """
    unit = (image + 1) / 2
    for index in sorted(rng.choice(len(_FLAWS), size=2, replace=False)):
        unit = _FLAWS[index](unit, rng)
    return np.clip(unit * 2 - 1, -1, 1).astype(np.float32)


def _draw_sign(canvas: Float[np.ndarray, "24 24 3"], sign: Sign, rng: np.random.Generator) -> None:
    colour = COLOURS[rng.integers(len(COLOURS))]
    top = GLYPH_TOPS[rng.integers(len(GLYPH_TOPS))]
    for cell, glyph in enumerate(sign.text):
        _stamp(canvas, GLYPH_MASKS[glyph], top, cell * CELL + 1, colour)


def _draw_scene(canvas: Float[np.ndarray, "24 24 3"], scene: Scene, rng: np.random.Generator) -> None:
    rows = (1,) if len(scene.phrases) == 1 else (0, 2)
    for row, phrase in zip(rows, scene.phrases, strict=True):
        _draw_phrase(canvas, phrase, row, rng)


def _draw_phrase(canvas: Float[np.ndarray, "24 24 3"], phrase: Phrase, row: int, rng: np.random.Generator) -> None:
    for column in rng.choice(SIZE // CELL, size=phrase.count, replace=False):
        _stamp(canvas, SHAPE_MASKS[phrase.shape], row * CELL + 1, int(column) * CELL + 1, phrase.colour)


def _stamp(
    canvas: Float[np.ndarray, "24 24 3"], mask: Bool[np.ndarray, "height width"], top: int, left: int, colour: str
) -> None:
    height, width = mask.shape
    canvas[top : top + height, left : left + width][mask] = PALETTE[colour]


def _noise(unit: Float[np.ndarray, "24 24 3"], rng: np.random.Generator) -> Float[np.ndarray, "24 24 3"]:
    return unit + rng.uniform(0.05, 0.2) * rng.standard_normal(unit.shape, np.float32)


def _blur(unit: Float[np.ndarray, "24 24 3"], rng: np.random.Generator) -> Float[np.ndarray, "24 24 3"]:
    sigma = rng.uniform(0.5, 1.0)
    return ndimage.gaussian_filter(unit, (sigma, sigma, 0), mode="nearest")


def _tint(unit: Float[np.ndarray, "24 24 3"], rng: np.random.Generator) -> Float[np.ndarray, "24 24 3"]:
    return _mix(unit, rng.random(3), rng.uniform(0.05, 0.2))


def _uneven(unit: Float[np.ndarray, "24 24 3"], rng: np.random.Generator) -> Float[np.ndarray, "24 24 3"]:
    """A tint that grows from nothing at one edge to its full strength at the opposite one."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    ramp = (x * np.cos(angle) + y * np.sin(angle)) / (abs(np.cos(angle)) + abs(np.sin(angle)))
    return _mix(unit, rng.random(3), rng.uniform(0.1, 0.3) * (ramp[..., None] + 1) / 2)


def _specks(unit: Float[np.ndarray, "24 24 3"], rng: np.random.Generator) -> Float[np.ndarray, "24 24 3"]:
    """Random pixels pulled halfway to random colours."""
    hit = rng.random((SIZE, SIZE, 1)) < rng.uniform(0.05, 0.25)
    return _mix(unit, rng.random(unit.shape), 0.5 * hit)


def _mix(
    unit: Float[np.ndarray, "24 24 3"], colour: Float[np.ndarray, "*#rgb"], share: float | Float[np.ndarray, "*#share"]
) -> Float[np.ndarray, "24 24 3"]:
    return unit + share * (colour - unit)


# In order of application: a camera would see colours first, then blur them, then add its noise.
_FLAWS: tuple[Callable, ...] = (_tint, _uneven, _blur, _noise, _specks)
