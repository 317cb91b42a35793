"""What colour an object has, of GenEval's ten: by CLIP, as GenEval asks it, or by its pixels, without any weights."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from fopd_jax.rewards.geneval.records import COLOURS

TEMPLATES: tuple[str, ...] = (
    "a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object",
)  # fmt: skip
GREY = 0x99
"""What GenEval shows CLIP in place of all that the object's mask leaves out."""
REFERENCES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((200, 30, 35), (255, 0, 0), (140, 20, 25)),
    "orange": ((240, 130, 30), (255, 165, 0)),
    "yellow": ((245, 215, 50), (255, 255, 0), (240, 230, 140)),
    "green": ((50, 140, 60), (0, 255, 0), (20, 70, 30), (150, 205, 140)),
    "blue": ((40, 85, 180), (0, 0, 255), (0, 0, 140), (25, 35, 100), (175, 210, 230), (125, 185, 240), (95, 155, 170)),
    "purple": ((120, 50, 145), (200, 0, 200), (60, 20, 90), (165, 120, 215)),
    "pink": ((245, 150, 185), (255, 105, 180), (215, 110, 145), (250, 140, 130)),
    "brown": ((110, 65, 35), (155, 85, 45), (160, 50, 45), (65, 40, 25), (190, 150, 110)),
    "black": ((20, 20, 20), (50, 50, 50)),
    "white": ((245, 245, 245), (200, 200, 200)),
}
"""sRGB of what people call so: one colour each would make light blue white, and pure blue, as CIELAB goes, purple."""
_ENOUGH = 4096
"""Pixels to judge by."""


@runtime_checkable
class Clip(Protocol):
    """CLIP's two towers, rows of length 1; images of any sizes, which it prepares itself. GenEval's is ViT-L/14."""

    def embed_images(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "n d"]: ...
    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]: ...


class Crop(NamedTuple):
    """An object cut out of its image along its box; `inside` are its own pixels, None where it has no mask."""

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    inside: Bool[np.ndarray, "h w"] | None


Classify = Callable[[Sequence[Crop]], list[str]]
"""A colour of `COLOURS` for each."""


def cut(
    name: str,
    image: UInt8[np.ndarray, "h w 3"],
    box: Float[np.ndarray, "4"],
    mask: Bool[np.ndarray, "h w"] | None = None,
) -> Crop:
    """The part of an image within a box, its sides rounded to pixels, at least one pixel of the image."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = (round(float(side)) for side in box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    rows, columns = slice(y0, max(y1, y0 + 1)), slice(x0, max(x1, x0 + 1))
    return Crop(name, image[rows, columns], None if mask is None else mask[rows, columns])


def clip_colours(clip: Clip) -> Classify:
    """GenEval's classifier: the colour whose texts lie nearest to the crop, with all but the object painted grey.

    A colour's direction is the mean of its three templates' embeddings. Directions of a class are kept.
    """

    @functools.cache
    def directions(name: str) -> Float[np.ndarray, "10 d"]:
        texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
        means = clip.embed_texts(texts).reshape(len(COLOURS), len(TEMPLATES), -1).mean(axis=1)
        return means / np.linalg.norm(means, axis=-1, keepdims=True)

    def classify(crops: Sequence[Crop]) -> list[str]:
        if not crops:
            return []
        embedded = clip.embed_images([_on_grey(crop) for crop in crops])
        return [COLOURS[int(np.argmax(directions(crop.name) @ row))] for crop, row in zip(crops, embedded, strict=True)]

    return classify


def pixel_colours(crops: Sequence[Crop]) -> list[str]:
    """The colour that most of an object's pixels are nearest to, in CIELAB; without a mask, of the middle of its box.

    Not GenEval's: it needs no weights, knows nothing of shade or of what the object usually looks like.
    """
    return [COLOURS[int(np.bincount(_nearest(_own_pixels(crop))).argmax())] for crop in crops]


def _on_grey(crop: Crop) -> UInt8[np.ndarray, "h w 3"]:
    if crop.inside is None:
        return crop.image
    return np.where(crop.inside[..., None], crop.image, np.uint8(GREY))


def _own_pixels(crop: Crop) -> UInt8[np.ndarray, "n 3"]:
    if crop.inside is not None and crop.inside.any():
        pixels = crop.image[crop.inside]
    else:
        height, width = crop.image.shape[:2]
        middle = crop.image[height // 4 : height - height // 4, width // 4 : width - width // 4]
        pixels = middle.reshape(-1, 3)
    return pixels[:: 1 + len(pixels) // _ENOUGH]


def _nearest(pixels: UInt8[np.ndarray, "n 3"]) -> Shaped[np.ndarray, " n"]:
    """Places in `COLOURS`."""
    owners = np.repeat(np.arange(len(COLOURS)), [len(REFERENCES[colour]) for colour in COLOURS])
    references = lab(np.array([each for colour in COLOURS for each in REFERENCES[colour]], np.uint8))
    return owners[((lab(pixels)[:, None] - references[None]) ** 2).sum(axis=-1).argmin(axis=-1)]


def lab(pixels: UInt8[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """CIELAB (D65) of sRGB: distances are roughly as large as differences look."""
    light = pixels / 255
    light = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    relative = light @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    root = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
