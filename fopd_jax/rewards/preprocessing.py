"""Pictures of any size → what a vision tower reads, on the device, as each published scorer does it.

The kernel, the rounding and the crop differ from scorer to scorer and change values in the third digit, so each has its
name here. Sizes are powers of two on the way to the device: a crop, a pad and a size are in the tables of
`models.resize`, so one program serves a whole range of sizes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from fopd_jax.models.clip_vision import normalise
from fopd_jax.models.resize import (
    Kernel,
    bucket,
    centre,
    fixed_point,
    longest_to,
    padded,
    resample,
    resample_float,
    shortest_to,
    weights,
)
from fopd_jax.parallel.parts import in_parts

Pictures = Sequence[UInt8[np.ndarray, "_ _ 3"]]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From a picture to a square, normalised with CLIP's mean and deviation.

    `fit`: the shorter side becomes the square's and the centre is cut out, or the longer one does and black is put
    around, or both do. `integer`: resized as Pillow does, else as torchvision does with float tensors. `crop`: which of
    two places is the centre, see `models.resize.centre`.
    """

    kernel: Kernel = "bicubic"
    fit: Literal["shortest", "longest", "both"] = "shortest"
    integer: bool = True
    crop: Literal["floor", "even"] = "floor"

    def tables(self, size: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The tables of a picture's columns and rows, each `[size, height or width filled up to its bucket]`.

        Raises:
          ValueError: the picture is empty or far too large.
        """
        if min(height, width) < 1:
            raise ValueError(f"found a picture of {height} x {width} pixels, expected at least 1 x 1")
        fits = {"shortest": shortest_to, "longest": longest_to, "both": lambda size, *_: (size, size)}
        target = fits[self.fit](size, height, width)
        return _table(self, size, height, target[0]), _table(self, size, width, target[1])


@functools.lru_cache(maxsize=64)
def _table(how: Preprocessing, size: int, inputs: int, outputs: int) -> np.ndarray:
    kept = centre(outputs, size, how.crop) if how.fit == "shortest" else range(outputs)
    table = weights(inputs, outputs, how.kernel, kept)
    table = padded(fixed_point(table) if how.integer else table.astype(np.float32), size)
    return np.pad(table, ((0, 0), (0, bucket(inputs) - inputs)))


TRANSFORMERS = Preprocessing()
"""transformers' CLIPImageProcessor with Pillow: PickScore, the aesthetic predictor."""
OPEN_CLIP = Preprocessing(crop="even")
"""OpenCLIP's own transform, on Pillow's pictures: GenEval's colours. ImageReward's is the same."""
FLOW_GRPO = Preprocessing(kernel="bilinear", integer=False, crop="even")
"""Flow-GRPO's CLIP score: torchvision's default resize of float tensors, antialiased as since torchvision 0.17."""
BLIP_VQA = Preprocessing(fit="both")
"""BLIP's own transform for questions, on Pillow's pictures: they are stretched to a square."""
HPSV2 = Preprocessing(fit="longest", integer=False)
"""HPSv2's transform, which resizes float tensors."""


def preprocess(
    images: Pictures, how: Preprocessing, size: int, mesh: Mesh, rows: int
) -> Float[np.ndarray, "n size size 3"]:
    """Pictures of any sizes, so many at once; the same however they are grouped.

    Raises:
      ValueError: as `Preprocessing.tables`.
    """
    program = _integer if how.integer else _float
    tables = [how.tables(size, *image.shape[:2]) for image in images]
    shapes = [(vertical.shape[1], horizontal.shape[1]) for vertical, horizontal in tables]
    pixels = np.empty((len(images), size, size, 3), np.float32)
    for shape in sorted(set(shapes)):
        own = [i for i, each in enumerate(shapes) if each == shape]
        batch = np.zeros((len(own), *shape, 3), np.uint8)
        for row, i in enumerate(own):
            height, width = images[i].shape[:2]
            batch[row, :height, :width] = images[i]
        vertical, horizontal = (np.stack([tables[i][axis] for i in own]) for axis in (0, 1))
        pixels[own] = in_parts(program, (batch, vertical, horizontal), mesh, rows)
    return pixels


def preprocess_within(images: UInt8[Array, "b h w 3"], how: Preprocessing, size: int) -> Float[Array, "b size size 3"]:
    """As `preprocess`, of pictures of one size within a program.

    Raises:
      ValueError: as `Preprocessing.tables`.
    """
    height, width = images.shape[1:3]
    vertical, horizontal = how.tables(size, height, width)
    tables = jnp.asarray(vertical[None, :, :height]), jnp.asarray(horizontal[None, :, :width])
    program = _integer if how.integer else _float
    return jax.vmap(lambda image: program((image[None], *tables))[0])(images)


@jax.jit
def _integer(arrays: tuple[Array, Array, Array]) -> Float[Array, "b s s 3"]:
    return normalise(resample(*arrays).astype("float32") / 255)


@jax.jit
def _float(arrays: tuple[Array, Array, Array]) -> Float[Array, "b s s 3"]:
    return normalise(resample_float(*arrays))
