"""Images as rewards see them: bytes."""

from typing import TypeVar

import numpy as np
from jax import Array

Images = TypeVar("Images", np.ndarray, Array)


def to_pixels(images: Images) -> Images:
    """Images in [-1, 1] `[*n, h, w, 3]` as uint8, rounded to nearest; values beyond are clipped.

    The same to the bit of numpy and, within a program, of JAX: clipping stands between product and sum, so that no
    compiler joins them to one operation, which would round once.
    """
    return ((images * 127.5).clip(-128, 127) + 128).astype(np.uint8)
