"""Captioned images from folders, as latents: which ones a batch holds, and how a file becomes an array."""

import dataclasses
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageOps

from fopd_jax.config.schema import Pairs
from fopd_jax.config.sizes import describe_size
from fopd_jax.console import note, progress
from fopd_jax.parallel.distributed import barrier, is_main, total
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.foreseen import foresee
from fopd_jax.worlds.world import Encode, check_shares

CHECKING_TIMEOUT_S = 7200.0
_THREADS = min(32, os.cpu_count() or 1)
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


# ---- which ones


@dataclasses.dataclass(frozen=True)
class Draw:
    """One row of a batch."""

    task: str
    image: Path
    caption: str


@dataclasses.dataclass(frozen=True)
class Draws:
    """Rows of batches: tasks by share, images uniformly, captions wrong or empty as often as asked.

    A function of (seed, step), as long as the folders stay as they are. `world`: the tasks with their images.

    Raises:
      ValueError: no task has a share; images are to be degraded, or an only image to have a wrong caption; names the
        field.
    """

    world: Mapping[str, Task]
    tasks: Mapping[str, Pairs]
    batch_size: int
    empty_caption: float
    seed: int

    def __post_init__(self) -> None:
        check_shares(self.tasks)
        for name, pairs in self.tasks.items():
            if pairs.degraded:
                raise ValueError(
                    f"tasks.{name}.degraded: found {pairs.degraded}, expected 0: images of files stay as they are"
                )
            if pairs.wrong_caption and len(self.world[name].images) < 2:
                raise ValueError(
                    f"tasks.{name}.wrong_caption: found {pairs.wrong_caption}, expected 0 for one image alone"
                )

    def __call__(self, step: int) -> list[Draw]:
        """The whole batch of a step."""
        rng = np.random.default_rng((self.seed, step))
        shares = np.asarray([pairs.share for pairs in self.tasks.values()])
        names = rng.choice(list(self.tasks), self.batch_size, p=shares / shares.sum())
        return [self._row(str(name), rng) for name in names]

    def captions(self) -> Iterator[str]:
        """All that may be drawn."""
        if self.empty_caption:
            yield ""
        for name, pairs in self.tasks.items():
            yield from self.world[name].train if pairs.share else ()

    def _row(self, name: str, rng: np.random.Generator) -> Draw:
        task, pairs = self.world[name], self.tasks[name]
        count = len(task.images)
        image = caption = int(rng.integers(count))
        if rng.random() < pairs.wrong_caption:
            caption = (image + int(rng.integers(1, count))) % count  # another image's
        empty = rng.random() < self.empty_caption
        return Draw(name, task.images[image], "" if empty else task.train[caption])


# ---- as latents


class CaptionedImages:
    """See `worlds.world.CaptionedLatents`: each process reads and encodes its own rows alone.

    `encode` makes conditioning of captions; `encode_images(images, (seed, step, row) of each)` makes latents.
    `size`: height and width that images are read at.

    Raises:
      ValueError: an image cannot be read; names the file. All are read once, shared out over the processes.
    """

    def __init__(
        self,
        draws: Draws,
        size: tuple[int, int],
        encode: Encode,
        encode_images: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        self._draws, self._size = draws, size
        self._encode, self._encode_images = encode, encode_images
        for name in draws.tasks:
            check_images(draws.world[name].images, size, f"tasks.{name}.images")

    def batch(self, step: int, rows: Int[np.ndarray, " n"]) -> dict[str, Any]:
        """`{"x0": [n, h, w, c] float32, "conditioning": …}`."""
        drawn = self._draws(step)
        mine = [drawn[row] for row in rows]
        with ThreadPoolExecutor(_THREADS) as threads:
            images = list(threads.map(lambda each: read_image(each.image, self._size), mine))
        places = np.asarray([(self._draws.seed, step, row) for row in rows], np.uint32)
        return {
            "x0": self._encode_images(np.stack(images), places),
            "conditioning": self._encode([each.caption for each in mine]),
        }

    def upto(self, steps: int) -> Iterator[str]:
        """The distinct captions of the first `steps` batches, see `foresee`."""
        draws = self._draws
        return foresee(lambda step: [each.caption for each in draws(step)], steps, draws.captions())

    def describe(self, step: int, rows: Sequence[int]) -> list[str]:
        """Task, file and caption of some rows of a batch."""
        drawn = self._draws(step)
        return [f"{drawn[row].task}: {drawn[row].image}: {drawn[row].caption!r}" for row in rows]


# ---- files


def check_images(paths: Sequence[Path], size: tuple[int, int], field: str) -> None:
    """Read every image once; tells how many are enlarged more than twice to be of `size`. All processes call it.

    Raises:
      ValueError: one cannot be read; names field and file.
    """
    mine = paths[jax.process_index() :: jax.process_count()]
    found: list[tuple[int, int]] = []
    with ThreadPoolExecutor(_THREADS) as threads, progress("check images", len(mine), "images") as done:
        for each in threads.map(lambda path: _load(path, field).size, mine):
            found.append(each)
            done(1)
    height, width = size
    small = [path for path, (w, h) in zip(mine, found, strict=True) if 2 * h < height or 2 * w < width]
    barrier(f"{field} are checked", CHECKING_TIMEOUT_S)
    count = total(len(small))
    if small and is_main():
        least = f"{height // 2} pixels a side" if height == width else describe_size((height // 2, width // 2))
        what = f"{count} of {len(paths)} images are below {least} and will be blurred"
        note(f"{field}: {what}, such as {small[0]}")


def read_image(path: Path, size: tuple[int, int]) -> Float[np.ndarray, "height width 3"]:
    """An image file in [-1, 1]: upright, on white where it is transparent, resized to cover `size`, its middle cut out.

    Raises:
      ValueError: it cannot be read; names it.
    """
    image = _load(path)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    height, width = size
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.float32) / 127.5 - 1


def _load(path: Path, field: str = "image") -> Image.Image:
    """The whole image, turned as its EXIF orientation says."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
    except _UNREADABLE as error:
        raise ValueError(f"{field}: {path}: no image that can be read ({' '.join(str(error).split())})") from error
    if upright.mode.startswith(("I", "F")):
        raise ValueError(f"{field}: {path}: found pixels of mode {upright.mode!r}, expected 8 bits a channel")
    return upright
