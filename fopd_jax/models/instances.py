"""Pictures to Mask2Former's input, and its logits to instances, as mmdet 2 does in GenEval; all of fixed shapes.

Input: the short side to 800, the long one to at most 1333, by cv2's bilinear resize of bytes; grey up to multiples of
32; ImageNet's mean and deviation. Output: the 100 best pairs of a query and a class; a mask is where the logit, resized
to the filled-up input, cut and resized to the picture, is positive; a score is the class's probability times the mean
probability within the mask. transformers' own pipeline differs: Pillow's resize, which smooths when it shrinks, black
instead of grey, and masks of 384 x 384, enlarged without interpolation.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from fopd_jax.models.mask2former import STRIDE, Mask2Former

SHORT, LONG, GREY = 800, 1333, 128
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MOST = 100
_BITS = 11  # of cv2's weights
Size = tuple[int, int]
Taps = tuple[np.ndarray, np.ndarray]


class Instances(NamedTuple):
    """The best pairs of a query and a class, best class first. `masks` are the queries', eight pixels of a row a byte,
    the first one in its highest bit; boxes (x0, y0, x1, y1) are in the picture's pixels, zeros for an empty mask."""

    scores: Float[Array, "b k"]
    labels: Int[Array, "b k"]
    queries: Int[Array, "b k"]
    boxes: Float[Array, "b k 4"]
    masks: UInt8[Array, "b q h w8"]


def detect(network: Mask2Former, params: Any, images: UInt8[Array, "b h w 3"]) -> Instances:
    """The instances of RGB pictures; one program for each size of pictures."""
    height, width = images.shape[1:3]
    made: Any = network.apply({"params": params}, make_input(images))
    classes, masks = made
    return find_instances(classes, masks, input_size(height, width), (height, width))


# ---- input


def input_size(height: int, width: int) -> Size:
    """Sides after the resize: as large as neither limit forbids, halves rounded up."""
    factor = min(LONG / max(height, width), SHORT / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def make_input(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b y x 3"]:
    """RGB pictures, resized, filled up and normalised."""
    size = input_size(*images.shape[1:3])
    fill = [(0, -side % STRIDE) for side in size]
    pixels = jnp.pad(resize_bytes(images, size), ((0, 0), *fill, (0, 0)), constant_values=GREY)
    mean, std = (jnp.array(each, jnp.float32)[None, None, None] for each in (MEAN, STD))
    return (pixels.astype(jnp.float32) - mean) / std


def resize_bytes(images: UInt8[Array, "b h w 3"], size: Size) -> Int[Array, "b y x 3"]:
    """cv2's `INTER_LINEAR` of bytes, bit by bit: two taps an axis, weights of 11 bits, and its very roundings."""
    rows, columns = (_taps(*sides) for sides in zip(images.shape[1:3], size, strict=True))
    (left, right), (a, b) = columns
    x = images.astype(jnp.int32)
    x = x[:, :, left] * jnp.asarray(a)[None, None, :, None] + x[:, :, right] * jnp.asarray(b)[None, None, :, None]
    (above, below), (a, b) = rows
    x = x >> 4
    upper = x[:, above] * jnp.asarray(a)[None, :, None, None] >> 16
    lower = x[:, below] * jnp.asarray(b)[None, :, None, None] >> 16
    return (upper + lower + 2) >> 2


def _taps(length: int, wanted: int) -> tuple[Taps, Taps]:
    """The two source positions of each wanted one, and their integer weights."""
    at = ((np.arange(wanted) + 0.5) * (1 / (wanted / length)) - 0.5).astype(np.float32)
    first = np.floor(at).astype(np.int32)
    part = at - first.astype(np.float32)
    weights = (np.rint(each * np.float32(2**_BITS)).astype(np.int32) for each in (1 - part, part))
    return tuple(np.clip(first + i, 0, length - 1) for i in (0, 1)), tuple(weights)  # type: ignore[return-value]


# ---- output


def interpolation(length: int, wanted: int) -> np.ndarray:
    """PyTorch's bilinear resize of one axis as a matrix, `[wanted, length]`, without smoothing when it shrinks."""
    at = np.clip((np.arange(wanted) + 0.5) * length / wanted - 0.5, 0, length - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(length)))


def find_instances(
    classes: Float[Array, "b q c"], masks: Float[Array, "b q y x"], inner: Size, size: Size
) -> Instances:
    """The instances of pictures of `size`, which were resized to `inner` before they were filled up.

    `classes`: logits, "no object" last; `masks`: logits at a quarter of the filled-up input. Both resizes of a mask are
    linear, so they are one product an axis.
    """
    steps = zip(masks.shape[2:], inner, size, strict=True)
    y, x = (interpolation(cut, side) @ interpolation(small, 4 * small)[:cut] for small, cut, side in steps)
    y, x = jnp.asarray(y, jnp.float32), jnp.asarray(x, jnp.float32)
    logits = jnp.einsum("BQyx,Yy,Xx->BQYX", masks, y, x, precision="highest")
    inside = logits > 0
    area = inside.sum((2, 3), dtype=jnp.float32)
    quality = jnp.where(inside, nn.sigmoid(logits), 0).sum((2, 3)) / (area + 1e-6)
    kinds = classes.shape[-1] - 1
    chances = nn.softmax(classes)[..., :-1].reshape(classes.shape[0], -1)
    chances, best = jax.lax.top_k(chances, min(MOST, chances.shape[-1]))
    queries, labels = best // kinds, best % kinds
    return Instances(
        scores=chances * jnp.take_along_axis(quality, queries, 1),
        labels=labels,
        queries=queries,
        boxes=jnp.take_along_axis(mask_boxes(inside), queries[..., None], 1),
        masks=jnp.packbits(inside, axis=-1),
    )


def mask_boxes(masks: Bool[Array, "b q h w"]) -> Float[Array, "b q 4"]:
    """(x0, y0, x1, y1) around each mask, ends excluded; zeros where it is empty."""
    (x0, x1), (y0, y1) = (_extent(masks.any(axis)) for axis in (2, 3))
    return jnp.stack([x0, y0, x1, y1], -1).astype(jnp.float32)


def _extent(line: Bool[Array, "b q n"]) -> tuple[Int[Array, "b q"], Int[Array, "b q"]]:
    first, last = line.argmax(-1), line.shape[-1] - line[..., ::-1].argmax(-1)
    return first, jnp.where(line.any(-1), last, 0)
