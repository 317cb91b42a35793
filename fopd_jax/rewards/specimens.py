"""Pictures with known answers, drawn on the spot: texts, a landscape and its ruins, objects that detectors know."""

import functools
import io
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage

SIDE = 512
Picture = UInt8[np.ndarray, "512 512 3"]

_SKY, _HAZE = np.array([70.0, 130, 215]), np.array([215.0, 225, 235])
_RIDGES = (((105.0, 125, 155), 0.42, 0.10), ((70.0, 105, 85), 0.52, 0.08), ((45.0, 80, 40), 0.64, 0.05))
"""Of each ridge of mountains, from far to near: colour, height of its line in the picture, and how far that varies."""


def plain(red: int, green: int, blue: int) -> Picture:
    """One colour."""
    return np.full((SIDE, SIDE, 3), (red, green, blue), np.uint8)


def written(lines: Sequence[str]) -> Picture:
    """Black text on white, a line below the other."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        at = SIDE // 2, SIDE * (i + 1) // (len(lines) + 1)
        draw.text(at, line, fill="black", font=ImageFont.load_default(size=56), anchor="mm")
    return np.asarray(image)


@functools.cache
def landscape() -> Picture:
    """Mountains behind a meadow under a blue sky with a sun: smooth parts and rough ones, as photographs have."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    image = _SKY + (_HAZE - _SKY) * np.clip(y / 0.5, 0, 1)[..., None]
    image += 160 * np.exp(-((x - 0.75) ** 2 + (y - 0.18) ** 2) / 0.004)[..., None]
    for colour, height, varies in _RIDGES:
        line = height + varies * _rough((1, SIDE), 5, rng)
        texture = 1 + 0.25 * _rough((SIDE, SIDE), 7, rng)
        image = np.where((y > line)[..., None], np.array(colour) * texture[..., None], image)
    grass = 1 + 0.3 * _rough((SIDE, SIDE), 8, rng) + 0.15 * rng.standard_normal((SIDE, SIDE))
    image = np.where((y > 0.78)[..., None], np.array([95.0, 150, 55]) * grass[..., None], image)
    picture = np.clip(image, 0, 255).astype(np.uint8)
    picture.flags.writeable = False  # there is one
    return picture


def noisy(picture: Picture) -> Picture:
    """With noise as strong as the picture itself."""
    noise = 80 * np.random.default_rng(1).standard_normal(picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def blurred(picture: Picture) -> Picture:
    """Out of focus by 12 pixels."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(12)))


def squeezed(picture: Picture) -> Picture:
    """Through a JPEG of the lowest quality."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=1)
    return np.asarray(Image.open(file).convert("RGB"))


Thing = Callable[[ImageDraw.ImageDraw, float, float, float], None]
"""Draws one object, `(draw, x, y of its centre, radius)`."""


def side_by_side(*things: Thing) -> Picture:
    """Objects in the landscape, from left to right."""
    image = Image.fromarray(landscape())
    draw = ImageDraw.Draw(image)
    for i, thing in enumerate(things):
        thing(draw, SIDE * (i + 0.5) / len(things), SIDE * 0.4, 150.0 if len(things) == 1 else 105.0)
    return np.asarray(image)


def stop_sign(
    draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, int, int] = (190, 20, 35)
) -> None:
    """An octagon on a post with the word on it."""
    draw.rectangle((x - radius / 12, y, x + radius / 12, SIDE * 0.97), fill=(120, 120, 125))
    for size, fill in ((1.0, (255, 255, 255)), (0.93, colour)):
        draw.regular_polygon((x, y, radius * size), 8, rotation=22.5, fill=fill)
    font = ImageFont.load_default(size=radius * 0.6)
    draw.text((x, y), "STOP", fill="white", font=font, anchor="mm", stroke_width=2, stroke_fill="white")


def clock(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    """A white face in a wooden ring, ten past ten."""
    font = ImageFont.load_default(size=radius * 0.22)
    for size, fill in ((1.0, (120, 70, 30)), (0.88, (245, 243, 235))):
        draw.circle((x, y), radius * size, fill=fill)
    for hour in range(1, 13):
        draw.line((_at(x, y, hour, 0.74 * radius), _at(x, y, hour, 0.84 * radius)), fill="black", width=4)
        draw.text(_at(x, y, hour, 0.6 * radius), str(hour), fill="black", font=font, anchor="mm")
    for hour, length, width in ((10.17, 0.42, 7), (2, 0.6, 5)):
        draw.line(((x, y), _at(x, y, hour, length * radius)), fill="black", width=width)


def _at(x: float, y: float, hour: int | float, length: float) -> tuple[float, float]:
    """Where the hour is, so far from the centre (x, y) of a clock."""
    angle = np.pi * hour / 6
    return x + length * float(np.sin(angle)), y - length * float(np.cos(angle))


def _rough(shape: tuple[int, int], octaves: int, rng: np.random.Generator) -> Float[np.ndarray, "h w"]:
    """Noise of all sizes, the finer the weaker, about within ±1."""
    total = np.zeros(shape)
    for octave in range(1, octaves + 1):
        coarse = rng.uniform(-1, 1, [min(side, 2**octave + 1) for side in shape])
        zoom = [side / there for side, there in zip(shape, coarse.shape, strict=True)]
        total += ndimage.zoom(coarse, zoom, order=1)[: shape[0], : shape[1]] / 2**octave
    return total
