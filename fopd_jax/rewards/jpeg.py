"""The reward `jpeg_compressibility`: how small an image gets as a JPEG (DDPO, Black et al., 2305.13301).

A real reward that needs no network and no weights: smooth pictures win. Training on it is known to remove background
and detail, which is what it asks for; it is there to try a training program, not to make pictures better.
"""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.rewards.options import read_options
from fopd_jax.rewards.reward import Metadata, Reward, Scores, collect


@dataclasses.dataclass(frozen=True)
class Options:
    """`quality`: of the JPEG, as Pillow counts it; DDPO's is 95.

    Raises:
      ValueError: it is none of Pillow's.
    """

    quality: int = 95

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality: found {self.quality}, expected 1 to 95")


def jpeg_kilobytes(image: UInt8[np.ndarray, "h w 3"], quality: int) -> float:
    """Size as a JPEG in kB, of 1000 bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / 1000


def make(name: str, settings: RewardConfig, server: Server | None) -> Reward:
    """Minus the kilobytes of each image's JPEG; options: `Options`.

    Raises:
      ValueError: names the setting that is wrong.
    """
    if settings.weights:
        raise ValueError(f"rewards.{name}.weights: found {settings.weights!r}, expected '': the reward has no network")
    quality = read_options(Options, settings.options, f"rewards.{name}.options").quality

    def score(images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        return collect([(-jpeg_kilobytes(image, quality), {}) for image in images])

    return Reward(name, score, (None, 0.0), "host")
