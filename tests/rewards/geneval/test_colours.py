"""Crops against Pillow, how GenEval asks CLIP against its steps by hand, pixels against scikit-image's CIELAB."""

from collections.abc import Sequence

import numpy as np
import pytest
import skimage.color
from PIL import Image, ImageColor

from fopd_jax.rewards.geneval.colours import Crop, clip_colours, cut, lab, pixel_colours
from fopd_jax.rewards.geneval.records import COLOURS


def random_image(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class MeanColourClip:
    """In place of CLIP: an image's embedding is the mean colour of what is not grey, a text's the colour that it names.

    `texts` and `images` are what it was asked.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images: list[np.ndarray] = []

    def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.images += images
        seen = [image[(image != 0x99).any(axis=-1)] for image in images]
        return _unit(np.stack([pixels.mean(axis=0) for pixels in seen]) - 127.5)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        named = [next(colour for colour in COLOURS if colour in text.replace("-", " ").split()) for text in texts]
        return _unit(np.array([ImageColor.getrgb(colour) for colour in named]) - 127.5)


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def plain(colour: str | tuple[int, int, int], name: str = "cup") -> Crop:
    rgb = ImageColor.getrgb(colour) if isinstance(colour, str) else colour
    return Crop(name, np.full((8, 9, 3), rgb, np.uint8), None)


# ---- crops


@pytest.mark.parametrize("box", [(3.4, 5.6, 20.5, 30.5), (0, 0, 60, 40), (7.5, 8.5, 9.5, 12.49)])
def test_crops_are_those_of_pillow(box: tuple[float, ...]):
    """`Image.composite` over #999, then `Image.crop` with a box that is not of whole pixels, as GenEval does it."""
    image, mask = random_image(), np.random.default_rng(1).random((40, 60)) < 0.5
    painted = Image.composite(Image.fromarray(image), Image.new("RGB", (60, 40), "#999"), Image.fromarray(mask))
    clip = MeanColourClip()
    clip_colours(clip)([cut("cup", image, np.array(box, np.float32), mask), cut("cup", image, np.array(box, float))])
    np.testing.assert_array_equal(clip.images[0], np.asarray(painted.crop(box)))
    np.testing.assert_array_equal(clip.images[1], np.asarray(Image.fromarray(image).crop(box)))


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((10, 10, 10, 10), slice(10, 11), slice(10, 11)),
        ((59.9, 39.9, 60, 40), slice(39, 40), slice(59, 60)),
        ((-5, -5, 3, 3), slice(0, 3), slice(0, 3)),
        ((50, 30, 90, 90), slice(30, 40), slice(50, 60)),
        ((-9, -9, -5, -5), slice(0, 1), slice(0, 1)),
    ],
)
def test_crops_are_never_empty_and_never_beyond_the_image(box: tuple[float, ...], rows: slice, columns: slice):
    image = random_image()
    np.testing.assert_array_equal(cut("cup", image, np.array(box, float)).image, image[rows, columns])


# ---- CLIP


def test_clip_is_asked_three_texts_a_colour_once_a_class():
    clip = MeanColourClip()
    classify = clip_colours(clip)
    assert clip.texts == []
    assert classify([plain("red"), plain("blue", "dog"), plain("green")]) == ["red", "blue", "green"]
    assert classify([plain("pink")]) == ["pink"]
    assert len(clip.texts) == 2 * 30
    assert clip.texts[:4] == [
        "a photo of a red cup",
        "a photo of a red-colored cup",
        "a photo of a red object",
        "a photo of a orange cup",
    ]
    assert clip.texts[59] == "a photo of a white object"


def test_a_colour_s_direction_is_the_mean_of_its_texts_made_unit():
    """Against the steps one by one, on embeddings without any meaning."""
    rng = np.random.default_rng(3)
    texts, images = _unit(rng.normal(size=(30, 16))), _unit(rng.normal(size=(50, 16)))

    class Random:
        def embed_images(self, images_: Sequence[np.ndarray]) -> np.ndarray:
            return images

        def embed_texts(self, texts_: Sequence[str]) -> np.ndarray:
            return texts

    expected = []
    for image in images:
        similarities = []
        for i in range(10):
            mean = (texts[3 * i] + texts[3 * i + 1] + texts[3 * i + 2]) / 3
            similarities.append(100 * float(image @ (mean / np.sqrt((mean**2).sum()))))
        expected.append(COLOURS[similarities.index(max(similarities))])
    assert clip_colours(Random())([plain("red")] * 50) == expected
    assert len(set(expected)) > 5


def test_the_mask_leaves_only_the_object_s_own_colour():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:] = ImageColor.getrgb("blue")
    image[10:30, 20:40] = ImageColor.getrgb("red")
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    whole = np.array([0.0, 0, 60, 40])
    for classify in (clip_colours(MeanColourClip()), pixel_colours):
        assert classify([cut("cup", image, whole, mask)]) == ["red"]
        assert classify([cut("cup", image, whole, ~mask)]) == ["blue"]
    assert clip_colours(MeanColourClip())([cut("cup", image, whole)]) == ["blue"]
    assert pixel_colours([cut("cup", image, whole)]) == ["red"]  # the middle of the box


def test_nothing_asked_is_nothing_done():
    clip = MeanColourClip()
    assert clip_colours(clip)([]) == pixel_colours([]) == []
    assert clip.texts == clip.images == []


# ---- pixels


def test_cielab_is_scikit_image_s():
    pixels = np.random.default_rng(0).integers(0, 256, (500, 3), dtype=np.uint8)
    pixels[:3] = [[0, 0, 0], [255, 255, 255], [3, 2, 1]]
    np.testing.assert_allclose(lab(pixels), skimage.color.rgb2lab(pixels), atol=0.02)  # its white point is rounded


@pytest.mark.parametrize("colour", COLOURS)
def test_the_ten_colours_as_css_knows_them(colour: str):
    assert pixel_colours([plain(colour)]) == [colour]


def test_most_shades_are_named_as_css_names_them():
    """Names such as darkgreen; some, such as indianred or powderblue, are a matter of taste."""
    shades = {name: [c for c in COLOURS if c in name] for name in ImageColor.colormap}
    right = [pixel_colours([plain(name)])[0] in colours for name, colours in shades.items() if colours]
    assert len(right) >= 60
    assert np.mean(right) >= 0.75


def test_the_colour_of_most_pixels_counts_and_an_empty_mask_is_none():
    image = np.full((20, 20, 3), 250, np.uint8)
    image[:, 8:] = ImageColor.getrgb("red")
    everything = np.array([0.0, 0, 20, 20])
    assert pixel_colours([cut("cup", image, everything, np.ones((20, 20), bool))]) == ["red"]
    assert pixel_colours([cut("cup", image, everything, np.zeros((20, 20), bool))]) == ["red"]
    assert pixel_colours([cut("cup", image, np.array([0.0, 0, 1, 1]))]) == ["white"]


def test_large_objects_are_judged_by_some_of_their_pixels():
    image = np.full((1024, 1024, 3), ImageColor.getrgb("green"), np.uint8)
    assert pixel_colours([Crop("cup", image, np.ones((1024, 1024), bool))]) == ["green"]
