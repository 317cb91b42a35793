"""Boxes (x0, y0, x1, y1) in pixels: how much they overlap, and of those that overlap the best alone."""

import numpy as np
from jaxtyping import Float


def overlaps(box: Float[np.ndarray, "4"], boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Intersection over union with each; sides count their last pixel (+ 1), as in Pascal VOC and in GenEval."""
    shared = _areas(np.concatenate([np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])], axis=-1))
    return shared / (_areas(box[None]) + _areas(boxes) - shared)


def keep_apart(boxes: Float[np.ndarray, "n 4"], limit: float) -> list[int]:
    """Non-maximum suppression of boxes that are given best first: places of those that stay, in the same order.

    One is dropped if it overlaps a better one that stays by `limit` or more; a limit of 1 drops none.
    """
    if limit >= 1:
        return list(range(len(boxes)))
    kept, waiting = [], np.arange(len(boxes))
    while waiting.size:
        best, waiting = waiting[0], waiting[1:]
        kept.append(int(best))
        waiting = waiting[overlaps(boxes[best], boxes[waiting]) < limit]
    return kept


def _areas(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    return np.maximum(boxes[:, 2:] - boxes[:, :2] + 1, 0).prod(axis=-1)
