"""How rollouts look: monitors of reward hacking as metrics, and a picture of one group with its rewards."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from fopd_jax.evaluation.grid import draw_grid
from fopd_jax.rewards import monitors
from fopd_jax.running.means import WEIGHTS

MOST = 64
"""Images a process looks at, the first of its rows: .7 s of one core at 512 pixels, while rewards score."""
NAMES = tuple(monitors.BANDS)
"""Of the metrics."""
COLUMNS = 12
"""Images of a picture."""
_FEATURES = "features"


def look(pixels: UInt8[np.ndarray, "n h w 3"]) -> dict[str, np.ndarray]:
    """Of each image what it has by itself, NaN beyond the first `MOST`, and what it is compared by."""
    seen = {**monitors.of_images(pixels[:MOST]), _FEATURES: monitors.pixel_features(pixels[:MOST])}
    beyond = len(pixels) - len(pixels[:MOST])
    pads = {name: [(0, beyond), *[(0, 0)] * (values.ndim - 1)] for name, values in seen.items()}
    return {name: np.pad(values, pads[name], constant_values=np.nan) for name, values in seen.items()}


def metrics(seen: Mapping[str, np.ndarray], groups: Int[np.ndarray, " b"]) -> dict[str, float]:
    """Means over a whole batch of what `look` and `monitors.extra_text_of` saw, and how many each is of."""
    found = {name: values[~np.isnan(values)] for name, values in seen.items() if name != _FEATURES}
    found[monitors.DIVERSITY] = monitors.diversity(seen[_FEATURES], groups)
    means = {name: float(values.mean()) if len(values) else 0.0 for name, values in found.items()}
    return means | {f"{WEIGHTS}{name}": float(len(values)) for name, values in found.items()}


def draw_group(
    prompt: str, pixels: UInt8[np.ndarray, "n h w 3"], rank: Float[np.ndarray, " n"], labels: Sequence[str]
) -> UInt8[np.ndarray, "height width 3"]:
    """Images of one prompt from the best to the worst by `rank`, at most `COLUMNS` of them, each with its label."""
    order = np.argsort(-rank, kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), COLUMNS)).round().astype(int))]
    images = (pixels[order].astype(np.float32) - 127.5) / 127.5
    return np.asarray(draw_grid(images[None], [prompt], [labels[int(i)] for i in order]))
