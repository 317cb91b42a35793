"""Resampling of images as Pillow does it, bit by bit, and as torchvision does it of float tensors.

A scorer's published values come from pictures that Pillow made smaller, in integers: along rows, rounded to 8 bits,
then along columns. (Since 13, Pillow takes columns first where that is less work, as with tall pictures; published
values are from before.) Both directions are matrix products here, with tables `[outputs, inputs]` made in numpy, so
that cropping and padding are rows of a table that are left out or zero, and images of any size share one program.
Pillow's integers have 23 bits and a sign, which no matrix unit multiplies: a table is split into three digits to the
base of 256, from -128 to 127. bfloat16 holds these and a pixel exactly, and float32 their sums up to 2²⁴, so that the
products are exact at the lowest precision of every platform. Einsum letters: B batch, H rows, W columns, C channels,
O outputs, D digits.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

Kernel = Literal["bilinear", "bicubic"]
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
_BITS = 32 - 8 - 2
"""Pillow's fixed point: 32 bits without a pixel's 8 and two for sums beyond them."""
_BASE, _DIGITS = 256, 3
_MOST_TAPS = 2**24 // (_BASE // 2 * 255)
"""Pixels behind one output, up to which a digit's sum is exact in float32."""


# ---- tables, in numpy


def weights(inputs: int, outputs: int, kernel: Kernel, kept: range | None = None) -> Float[np.ndarray, "o i"]:
    """How much of each of a line's pixels goes into each pixel of the resized line, `[outputs, inputs]`; rows sum to 1.

    `kept`: the outputs that are made, by default all. The kernel widens with the reduction (antialiasing), and what
    falls outside of the line is left out. Computed in Pillow's order of operations in float64, on which the last bits
    of `fixed_point` depend.

    Raises:
      ValueError: a length is not positive.
    """
    if inputs < 1 or outputs < 1:
        raise ValueError(f"resize: found {inputs} to {outputs} pixels, expected at least 1")
    scale = inputs / outputs
    stretch = max(scale, 1.0)
    support = _SUPPORT[kernel] * stretch
    kept = range(outputs) if kept is None else kept
    centers = (np.arange(kept.start, kept.stop) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), inputs)
    taps = first[:, None] + np.arange(int((last - first).max()))[None]
    inside = taps < last[:, None]
    values = np.where(inside, _kernel((taps - centers[:, None] + 0.5) * (1.0 / stretch), kernel), 0.0)
    values = values / np.cumsum(values, axis=1)[:, -1:]  # added up one by one: numpy's sum adds in pairs
    table = np.zeros((len(kept), inputs))
    rows = np.broadcast_to(np.arange(len(kept))[:, None], taps.shape)
    table[rows[inside], taps[inside]] = values[inside]
    return table


def _kernel(x: Float[np.ndarray, "o t"], kernel: Kernel) -> Float[np.ndarray, "o t"]:
    """A triangle, or Keys' cubic with a = -1/2."""
    x = np.abs(x)
    if kernel == "bilinear":
        return np.where(x < 1.0, 1.0 - x, 0.0)
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def fixed_point(table: Float[np.ndarray, "o i"]) -> Int32[np.ndarray, "o i"]:
    """Weights as Pillow's integers, rounded away from zero at halves.

    Raises:
      ValueError: more pixels go into one than can be added exactly: a reduction to less than 1/128.
    """
    if (taps := int((table != 0).sum(axis=1).max())) > _MOST_TAPS:
        raise ValueError(f"resize: found {taps} pixels that go into one, expected at most {_MOST_TAPS}")
    scaled = table * (1 << _BITS)
    return np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int32)


# ---- programs


def resample(
    images: UInt8[Array, "b h w c"], rows: Int32[Array, "b oh h"], columns: Int32[Array, "b ow w"]
) -> UInt8[Array, "b oh ow c"]:
    """Images by an integer table each, along each row (`columns`), then along each column (`rows`), as Pillow."""
    wide = _round(jnp.einsum("bdow,bhwc->dbhoc", _digits(columns), _exact(images), **_EXACT))
    return _round(jnp.einsum("bdoh,bhwc->dbowc", _digits(rows), _exact(wide), **_EXACT))


_EXACT = {"precision": jax.lax.Precision.DEFAULT, "preferred_element_type": jnp.float32}
"""A single pass through bfloat16 on TPUs and TF32 on GPUs loses nothing of integers up to 256."""


def _exact(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return images.astype(jnp.float32)


def _digits(table: Int32[Array, "b o i"]) -> Float[Array, "b d o i"]:
    """Digits to the base of 256, the lowest first, each from -128 to 127."""
    digits, rest = [], table
    for _ in range(_DIGITS - 1):
        digit = ((rest + _BASE // 2) & (_BASE - 1)) - _BASE // 2
        digits.append(digit)
        rest = (rest - digit) >> 8
    return jnp.stack([*digits, rest], axis=1).astype(jnp.float32)


def _round(sums: Float[Array, "d b h w c"]) -> UInt8[Array, "b h w c"]:
    """Digits' sums → pixels. Whatever overflows on the way, the whole fits 32 bits, as in Pillow."""
    low, middle, high = sums.astype(jnp.int32)
    whole = low + (middle << 8) + (high << 16) + (1 << (_BITS - 1))
    return jnp.clip(whole >> _BITS, 0, 255).astype(jnp.uint8)


def resample_float(
    images: UInt8[Array, "b h w c"], rows: Float[Array, "b oh h"], columns: Float[Array, "b ow w"]
) -> Float[Array, "b oh ow c"]:
    """Images in [0, 1] by a table of weights each, in float32 without rounding: torchvision's resize of tensors.

    Cubic weights overshoot, and nothing is clipped.
    """
    pixels = images.astype(jnp.float32) / 255
    wide = jnp.einsum("bow,bhwc->bhoc", columns, pixels, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("boh,bhwc->bowc", rows, wide, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("height", "width", "kernel"))
def resize(
    images: UInt8[Array, "b h w c"], height: int, width: int, kernel: Kernel
) -> UInt8[Array, "b height width c"]:
    """`PIL.Image.resize` of a batch, bit by bit; compiled anew for each pair of sizes.

    Raises:
      ValueError: as `weights` and `fixed_point`.
    """
    count = len(images)
    tables = (
        fixed_point(weights(inputs, outputs, kernel))
        for inputs, outputs in zip(images.shape[1:3], (height, width), strict=True)
    )
    rows, columns = (jnp.broadcast_to(table[None], (count, *table.shape)) for table in tables)
    return resample(images, rows, columns)


# ---- sizes


def shortest_to(size: int, height: int, width: int) -> tuple[int, int]:
    """Height and width with the shorter side of `size`, as transformers and torchvision round them."""
    short, long = sorted((height, width))
    other = int(size * long / short)
    return (size, other) if height <= width else (other, size)


def longest_to(size: int, height: int, width: int) -> tuple[int, int]:
    """Height and width with the longer side of `size`, as OpenCLIP rounds them; no side is less than a pixel."""
    scale = size / max(height, width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def centre(length: int, size: int, rounding: Literal["floor", "even"]) -> range:
    """What a centre crop to `size` leaves of a line; where half a pixel is over, transformers (`floor`) takes the lower
    place and torchvision (`even`) the even one."""
    spare = length - size
    start = spare // 2 if rounding == "floor" else round(spare / 2)
    return range(start, start + size)


def padded(table: np.ndarray, size: int) -> np.ndarray:
    """A table with zero rows on both sides up to `size`, the odd one at the end: black pixels around the picture."""
    spare = size - len(table)
    return np.pad(table, ((spare // 2, spare - spare // 2), (0, 0)))


def bucket(length: int) -> int:
    """A power of two, at least 64, to which lines are filled up so that few programs serve all sizes."""
    return max(64, 1 << math.ceil(math.log2(length)))
