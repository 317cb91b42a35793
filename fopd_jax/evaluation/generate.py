"""Images of suites, apart from their scores: kept as PNGs in the suite's layout, so that none is made twice.

An image's noise is a function of seed, suite, prompt id and sample alone: the same for all models and settings, in any
order and batch. Images are made in batches that are the same whenever a cell is made, so that one that was killed
leaves, once it goes on, the bytes of one that was not.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from fopd_jax.console import Progress
from fopd_jax.evaluation.layouts import Given, find_given, image_name, paths_of, write_beside
from fopd_jax.evaluation.records import Settings
from fopd_jax.evaluation.sampler import Sampler, check_finite
from fopd_jax.evaluation.suites import Prompt, Suite
from fopd_jax.files import write_json, write_png
from fopd_jax.parallel.agreement import share, together
from fopd_jax.parallel.distributed import barrier, is_main
from fopd_jax.parallel.sharding import batch_ways, filled
from fopd_jax.policy.velocity import Tree
from fopd_jax.reading import is_taken, parse_json, read_regular
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.worlds.world import World

PLAN_FILE = "plan.json"
WRITERS = 4
"""Threads that compress PNGs."""


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A cell of tables in the making: images of `model` for `suite` at `setting`, below `folder`.

    `about`: where the model came from. `read`: what the network reads in a prompt's place.
    """

    folder: Path
    model: str
    suite: Suite
    setting: str
    settings: Settings
    about: Mapping[str, Any]
    read: Callable[[str], str] = str

    @property
    def named(self) -> str:
        """For people."""
        return f"{self.model} on {self.suite.name} at {self.setting}"

    def plan(self) -> dict[str, Any]:
        """All that its images are made of; where the model's hash is known, its file may be elsewhere."""
        about = {name: value for name, value in self.about.items() if name != "source" or not self.about.get("sha256")}
        return {
            "model": self.model, "about": about, "settings": dataclasses.asdict(self.settings),
            "suite": self.suite.name, "samples": self.suite.samples, "prompts": len(self.suite.prompts),
            "prompts_sha256": self.suite.digest(), "layout": self.suite.layout,
        }  # fmt: skip


def noise_keys(seed: int, suite: str, rows: Sequence[tuple[Prompt, int]]) -> Array:
    """One key an image, a function of seed, suite, prompt id and sample alone."""
    names = np.array([zlib.crc32(f"{suite}/{prompt.id}".encode()) for prompt, _ in rows], np.uint32)
    samples = np.array([sample for _, sample in rows], np.uint32)
    root = jax.random.key(seed)
    return jax.vmap(lambda name, sample: jax.random.fold_in(jax.random.fold_in(root, name), sample))(
        jnp.asarray(names), jnp.asarray(samples)
    )


# ---- what is there


def check_plan(sheet: Sheet) -> None:
    """Refuse a folder that holds images of something else.

    Raises:
      ValueError: it does; names the file, what differs and what to do.
    """
    path = sheet.folder / PLAN_FILE
    if not is_taken(path):
        return
    try:
        found = parse_json(read_regular(path))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); remove {sheet.folder}, or name another --out") from error
    expected = json.loads(json.dumps(sheet.plan()))
    if found != expected:
        name = next((each for each in expected if not isinstance(found, dict) or found.get(each) != expected[each]), "")
        there = found.get(name) if isinstance(found, dict) else found
        raise ValueError(
            f"--out: {path}: holds images of other {name or 'fields'}: {_short(there)}, now "
            f"{_short(expected.get(name))}; remove the folder, or name another --out"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:160]}…"


def missing(sheet: Sheet) -> list[int]:
    """Which of its images are not there, by their place in `Suite.rows`; all processes get what process 0 sees."""
    found: list[int] = []
    if is_main():
        found = [place for place, name in enumerate(paths_of(sheet.suite)) if not (sheet.folder / name).is_file()]
    return json.loads(share("missing images", json.dumps(found))[0])


def begin(sheets: Sequence[Sheet]) -> None:
    """Make the folders, and note what their images are of; process 0 does. What a killed write has left goes."""
    if is_main():
        for sheet in sheets:
            for folder in {sheet.folder, *((sheet.folder / name).parent for name in paths_of(sheet.suite))}:
                folder.mkdir(parents=True, exist_ok=True)
                for begun in folder.glob(".*.tmp"):
                    begun.unlink()
            if not (sheet.folder / PLAN_FILE).exists():
                write_json(sheet.folder / PLAN_FILE, sheet.plan())
    barrier("the folders of images are there")


# ---- making them


def generate(
    sheet: Sheet,
    lacking: Sequence[int],
    sampler: Sampler,
    world: World,
    policy: tuple[Tree, Tree],
    batch_size: int,
    progress: Progress,
) -> None:
    """Make the images at the `lacking` places of `Suite.rows`; all processes sample, each writes its own.

    `policy`: variables and effective adapter; some `batch_size` are made at once, what the mesh divides. Of a batch of
    which any is lacking all are made, since which others stand beside it may change an image by rounding.

    Raises:
      ValueError: an image is not finite; names it, and nothing of its batch is written.
      OSError: one cannot be written.
    """
    rows, size = sheet.suite.rows(), filled(batch_size, batch_ways(sampler.mesh))
    for number in sorted({place // size for place in lacking}):
        batch = rows[number * size : (number + 1) * size]
        whole = batch + [batch[-1]] * (size - len(batch))
        keys = noise_keys(sheet.settings.seed, sheet.suite.name, whole)
        images = sampler.held(world, *policy, [sheet.read(prompt.text) for prompt, _ in whole], keys)
        mine = [int(row) for row in sampler.rows(size)]
        together("images of a batch", lambda images=images, mine=mine, batch=batch: _keep(sheet, images, mine, batch))
        progress(sum(number * size <= place < (number + 1) * size for place in lacking))
    _finish(sheet)


def _keep(
    sheet: Sheet, images: Float[np.ndarray, "n h w 3"], mine: Sequence[int], batch: Sequence[tuple[Prompt, int]]
) -> None:
    """Write this process's rows of a batch, without its surplus."""
    kept = [(image, *batch[row]) for image, row in zip(images, mine, strict=True) if row < len(batch)]
    names = [f"{sheet.named}, prompt {prompt.text!r}, sample {sample}" for _, prompt, sample in kept]
    if not kept:
        return
    check_finite(np.stack([image for image, *_ in kept]), names)
    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(lambda each: _write(sheet, to_pixels(each[0]), *each[1:]), kept))


def _write(sheet: Sheet, pixels: UInt8[np.ndarray, "h w 3"], prompt: Prompt, sample: int) -> None:
    read = sheet.read(prompt.text)
    about = {"model": sheet.model, **sheet.about, **dataclasses.asdict(sheet.settings)}
    text = {
        "prompt": prompt.text, **({"read": read} if read != prompt.text else {}), "suite": sheet.suite.name,
        "prompt_id": prompt.id, "sample": str(sample), "seed": str(sheet.settings.seed),
        "settings": json.dumps(about, sort_keys=True),
    }  # fmt: skip
    write_png(sheet.folder / image_name(sheet.suite, prompt, sample), Image.fromarray(pixels), text)


def _finish(sheet: Sheet) -> None:
    barrier("the images of a cell are there")
    together("what stands beside images", lambda: write_beside(sheet.folder, sheet.suite) if is_main() else None)


# ---- pictures made elsewhere


def take_over(sheet: Sheet, lacking: Sequence[int], source: Path, progress: Progress) -> None:
    """Write the lacking images from pictures made elsewhere, as they are; each process some of them.

    Raises:
      ValueError: as `find_given`, or one cannot be read; names it.
    """
    rows, found = sheet.suite.rows(), find_given(source, sheet.suite)
    mine = lacking[jax.process_index() :: jax.process_count()]

    def copy(place: int) -> None:
        prompt, sample = rows[place]
        read: Given = found[prompt.id, sample]
        _write(sheet, read(), prompt, sample)
        progress(jax.process_count())

    together("pictures made elsewhere", lambda: [copy(place) for place in mine])
    _finish(sheet)
