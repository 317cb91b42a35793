"""What reward hacking looks like first: pictures that go dark, lose their detail, their colours, or their differences.

A reward rises while everything it does not measure falls. In one public run on an OCR reward without an anchor
(UniRL, pull request 407) the share of dark pixels went from .451 to .926 within 100 rollouts, edges lost 60% and colour
entropy 54%, while the text read better. None of these numbers is good or bad by itself: what tells is how far they move
from where the run began.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy import ndimage

from fopd_jax.rewards.reward import Metadata, Scores

PREFIX = "monitors/"
"""Of every monitor's name: none is a score."""
EXTRA_TEXT, DIVERSITY = f"{PREFIX}extra_text", f"{PREFIX}diversity"
DARK = 0.15
"""Brightness in [0, 1] below which a pixel is dark, as in that run."""
EDGE = 0.1
"""Change of brightness a pixel beyond which there is an edge."""
SIDE = 16
"""Of the small copies that stand for images without features."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601, as Pillow's "L"


def monitor(
    images: UInt8[np.ndarray, "n h w 3"],
    groups: Int[np.ndarray, " n"],
    details: Sequence[Metadata] | None = None,
    features: Float[np.ndarray, "n d"] | None = None,
) -> dict[str, float]:
    """Means over a batch: `dark_share`, `edge_density`, `colour_entropy`, and, where they can be taken, `extra_text`
    and `diversity`.

    `groups`: the samples of one prompt have one number. `details`: the OCR reward's. `features`: such as CLIP's
    embeddings, compared by direction alone; without them small copies of the images are compared.
    """
    found = {
        **of_images(images),
        EXTRA_TEXT: extra_text(details or ()),
        DIVERSITY: diversity(pixel_features(images) if features is None else _directions(features), groups),
    }
    return {name: float(values.mean()) for name, values in found.items() if len(values)}


def of_images(images: UInt8[np.ndarray, "n h w 3"]) -> dict[str, Float[np.ndarray, " n"]]:
    """What every image has by itself."""
    return {
        f"{PREFIX}dark_share": dark_share(images),
        f"{PREFIX}edge_density": edge_density(images),
        f"{PREFIX}colour_entropy": colour_entropy(images),
    }


def extra_text_of(found: Mapping[str, Scores], count: int) -> Float[np.ndarray, " n"]:
    """Of so many images what rewards have read beyond the target, NaN where nothing was: only OCR's know of it."""
    read = next((each.details for each in found.values() if any("read" in about for about in each.details)), None)
    extra = [extra_text([about]) for about in read or [{}] * count]
    return np.array([each[0] if len(each) else np.nan for each in extra])


def dark_share(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, " n"]:
    """Share of pixels, in [0, 1], that are darker than `DARK`."""
    return np.array([(_brightness(image) < DARK).mean() for image in images])


def edge_density(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, " n"]:
    """Share of pixels, in [0, 1], where brightness changes by more than `EDGE` a pixel, by Sobel's operator.

    The operator is scaled to give a ramp's slope; beside a step of height s it gives s / 2.
    """
    return np.array([(_squared_slope(_brightness(image)) > EDGE**2).mean() for image in images])


def colour_entropy(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, " n"]:
    """Entropy in bits, from 0 to 9, of each image's histogram over 8 levels of red by green by blue."""
    return np.array([_entropy(image) for image in images])


def extra_text(details: Sequence[Metadata]) -> Float[np.ndarray, " k"]:
    """Of what an OCR reward read, the share, in [0, 1], beyond the target's length: {"read": …, "target": …}.

    One number for every image in which something was read; spaces do not count. A reward that asks for a substring
    alone does not see such text.
    """
    lengths = [
        (_length(each["read"]), _length(each["target"])) for each in details if {"read", "target"} <= each.keys()
    ]
    return np.array([max(read - target, 0) / read for read, target in lengths if read])


def diversity(features: Float[np.ndarray, "n d"], groups: Int[np.ndarray, " n"]) -> Float[np.ndarray, " k"]:
    """Of every group of two or more, the mean Euclidean distance between two of its samples.

    Samples whose features are not finite, of images that failed, take no part.
    """
    there = np.isfinite(features).all(axis=1)
    members = [features[there & (groups == group)].astype(np.float64) for group in np.unique(groups)]
    return np.array([_pairwise(each) for each in members if len(each) > 1])


def pixel_features(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
    """Small copies as rows, so scaled that two rows' distance is the root of the mean squared difference, in [0, 1]."""
    small = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)) for image in images]
    rows = np.array(small, np.float32).reshape(len(images), SIDE * SIDE * 3) / 255
    return rows / np.float32(np.sqrt(rows.shape[1]))


def _brightness(image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
    return image @ _LUMA / np.float32(255)


def _squared_slope(brightness: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    x, y = (ndimage.sobel(brightness, axis, mode="nearest") for axis in (1, 0))
    return (x * x + y * y) / np.float32(64)


def _entropy(image: UInt8[np.ndarray, "h w 3"]) -> float:
    red, green, blue = np.moveaxis(image >> 5, -1, 0).astype(int)
    share = np.bincount((red * 64 + green * 8 + blue).reshape(-1)) / red.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum()) + 0.0  # no -0


def _length(text: str) -> int:
    return len(text.replace(" ", ""))


def _directions(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _pairwise(rows: Float[np.ndarray, "k d"]) -> float:
    first, second = np.triu_indices(len(rows), 1)
    return float(np.linalg.norm(rows[first] - rows[second], axis=1).mean())


# ---- alarms


@dataclasses.dataclass(frozen=True)
class Band:
    """Where a monitor should stay: as multiples of its baseline, or `absolute`ly.

    `least`: no smaller baseline is multiplied by `high`, so that nothing doubles from next to nothing.
    """

    low: float = 0.0
    high: float = np.inf
    absolute: bool = False
    least: float = 0.0


BANDS: Mapping[str, Band] = {
    f"{PREFIX}dark_share": Band(high=2.0, least=0.1),
    f"{PREFIX}edge_density": Band(low=0.5, high=3.0, least=0.05),
    f"{PREFIX}colour_entropy": Band(low=0.4),
    DIVERSITY: Band(low=0.5),
    EXTRA_TEXT: Band(high=0.5, absolute=True),
}
"""Half or twice of where a run began; of sharp photographs 1% to 8% of the pixels are edges, of noise half of them.

Colours may lose more than half of their entropy by becoming clean: the miniature's do under rewards of what is drawn.
"""


@dataclasses.dataclass(frozen=True)
class Watch:
    """Compares monitors with the mean of the first `updates` that measured them: the baseline.

    `sums`: of each monitor, [sum, number] of the values in its baseline so far; as JSON it outlives a restart.
    """

    bands: Mapping[str, Band] = dataclasses.field(default_factory=lambda: BANDS)
    updates: int = 10
    sums: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def see(self, values: Mapping[str, float]) -> "tuple[Watch, dict[str, str]]":
        """The watch after one more update, and of each monitor that is outside of its band how it is, in words.

        Monitors without a baseline yet are in their band, unless that is absolute.
        """
        told = {name: self._judge(name, value) for name, value in values.items() if name in self.bands}
        sums = dict(self.sums)
        for name, value in values.items():
            total, count = sums.get(name, (0.0, 0.0))
            if name in self.bands and not self.bands[name].absolute and count < self.updates:
                sums[name] = [total + value, count + 1]
        return dataclasses.replace(self, sums=sums), {name: words for name, words in told.items() if words}

    def _judge(self, name: str, value: float) -> str:
        band, (total, count) = self.bands[name], self.sums.get(name, (0.0, 0.0))
        if band.absolute:
            inside, expected = band.low <= value <= band.high, f"{band.low:g} … {band.high:g}"
            return "" if inside else f"{name} is {value:.4g}, expected {expected}"
        if count < self.updates:
            return ""
        baseline = total / count
        low, high = band.low * baseline, band.high * max(baseline, band.least)
        if low <= value <= high:
            return ""
        began = f"it began at {baseline:.4g}, the mean of {count:g} updates"
        return f"{name} is {value:.4g}, expected {low:.4g} … {high:.4g}: {began}"
