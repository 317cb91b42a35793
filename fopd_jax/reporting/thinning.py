"""Curves of as many points as a screen shows."""

import numpy as np

from fopd_jax.reporting.reading import Series

MOST = 500


def thin(series: Series, most: int = MOST) -> Series:
    """At most `most` points: the first, the last, and of each part between them the least and the largest value.

    So no peak is lost. Where a part has no finite value its first point stands for it.
    """
    count = len(series.steps)
    if count <= most:
        return series
    inner = np.arange(1, count - 1)
    parts = np.array_split(inner, (most - 2) // 2)
    kept = [index for part in parts for index in _extremes(series.values, part)]
    chosen = np.asarray(sorted({0, *kept, count - 1}))
    return Series(series.steps[chosen], series.values[chosen])


def _extremes(values: np.ndarray, part: np.ndarray) -> list[int]:
    finite = part[np.isfinite(values[part])]
    if len(finite) == 0:
        return [int(part[0])]
    return [int(finite[np.argmin(values[finite])]), int(finite[np.argmax(values[finite])])]
