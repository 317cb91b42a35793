"""Where a suite's images lie below a folder, as its own scorer reads them.

geneval    00012/metadata.jsonl and 00012/samples/0000.png, by the prompt's place in the published list
compbench  CATEGORY/samples/PROMPT_000120.png, the number running on across the category's prompts
dpg        grids/NAME.png, four images as 2 × 2; beside it the single ones, singles/NAME_00.png
plain      images/00012_00.png
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fopd_jax.evaluation.suites import Prompt, Suite
from fopd_jax.files import write_png, write_text

GRID = 4
"""Images of DPG-Bench's grids."""
FORMATS = (".png", ".jpg", ".jpeg", ".webp")
_LONGEST = 250  # bytes of a file's name, of which file systems take 255


def image_name(suite: Suite, prompt: Prompt, sample: int) -> str:
    """Below the folder of a suite, as PNG."""
    match suite.layout:
        case "geneval":
            return f"{prompt.place:05d}/samples/{sample:04d}.png"
        case "compbench":
            number = prompt.place * suite.samples + sample
            return f"{prompt.tags['category']}/samples/{prompt.text}_{number:06d}.png"
        case "dpg":
            return f"singles/{prompt.id}_{sample:02d}.png"
        case _:
            return f"images/{prompt.place:05d}_{sample:02d}.png"


def check_names(suite: Suite) -> None:
    """Refuse prompts that cannot be names of files, where a layout has them there.

    Raises:
      ValueError: names suite and prompt.
    """
    for prompt in suite.prompts:
        name = image_name(suite, prompt, suite.samples - 1)
        parts = name.count("/"), len(name.rpartition("/")[2].encode())
        expected = {"geneval": 2, "compbench": 2}.get(suite.layout, 1)
        if parts[0] != expected or parts[1] > _LONGEST or "\0" in name:
            raise ValueError(f"--suites {suite.name}: prompt {prompt.text!r} cannot be part of a file's name")


def write_beside(folder: Path, suite: Suite) -> None:
    """What the suite's scorer reads beside the images, which are all there: GenEval's records, DPG-Bench's grids."""
    for prompt in suite.prompts:
        if suite.layout == "geneval":
            record = {**prompt.metadata, "prompt": prompt.text}
            write_text(folder / f"{prompt.place:05d}" / "metadata.jsonl", f"{json.dumps(record)}\n")
        elif suite.layout == "dpg" and suite.samples == GRID:
            path = folder / "grids" / f"{prompt.id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                images = [read_image(folder / image_name(suite, prompt, sample)) for sample in range(GRID)]
                rows = np.concatenate(images[:2], axis=1), np.concatenate(images[2:], axis=1)
                write_png(path, Image.fromarray(np.concatenate(rows)), {"prompt": prompt.text})


def read_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """
    Raises:
      ValueError: it is no picture that can be read; names it.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: no picture that can be read ({error})") from error


# ---- pictures made elsewhere

Given = Callable[[], UInt8[np.ndarray, "h w 3"]]
"""Reads one picture."""


def find_given(folder: Path, suite: Suite) -> dict[tuple[str, int], Given]:
    """A suite's images among pictures made elsewhere, by prompt's id and sample; read when they are asked for.

    They lie in `folder`, or in its part of the suite's name, in the suite's layout: PNG, JPEG or WebP. Samples of
    GenEval may have any number of digits; of DPG-Bench grids do as well; the folder `images` may be left out.

    Raises:
      ValueError: some are missing, or are of other prompts; says how many, and what is expected of the first.
    """
    root = folder / suite.name if (folder / suite.name).is_dir() else folder
    found: dict[tuple[str, int], Given] = {}
    lacking = []
    for prompt in suite.prompts:
        _check_record(root, suite, prompt)
        there = list(_given_of(root, suite, prompt))
        lacking += [prompt] if len(there) < suite.samples else []
        found |= {(prompt.id, sample): read for sample, read in enumerate(there)}
    if lacking:
        first = image_name(suite, lacking[0], 0)
        more = f" to {Path(image_name(suite, lacking[0], suite.samples - 1)).name}" if suite.samples > 1 else ""
        raise ValueError(
            f"{root}: {len(lacking)} of {len(suite.prompts)} prompts of {suite.name} lack images, the first "
            f"{lacking[0].text!r}, expected {first}{more}"
        )
    return found


def _given_of(root: Path, suite: Suite, prompt: Prompt) -> Iterator[Given]:
    """Of one prompt, in the order of its samples."""
    if suite.layout == "geneval":
        taken = (root / f"{prompt.place:05d}" / "samples").glob("*")
        numbered = {int(each.stem): each for each in taken if re.fullmatch(r"\d+", each.stem) and _is_picture(each)}
        yield from (lambda path=numbered[n]: read_image(path) for n in sorted(numbered)[: suite.samples])
        return
    grid = (
        _as_picture(root / "grids" / f"{prompt.id}.png", root / f"{prompt.id}.png") if suite.layout == "dpg" else None
    )
    for sample in range(suite.samples):
        name = image_name(suite, prompt, sample)
        if path := _as_picture(root / name, root / name.partition("/")[2]):
            yield lambda path=path: read_image(path)
        elif grid is not None and suite.samples == GRID:
            yield lambda path=grid, sample=sample: _quarter(read_image(path), sample)


def _as_picture(*paths: Path) -> Path | None:
    """The first of them that is there, in any format."""
    spelled = (path.with_name(path.name.removesuffix(".png") + form) for path in paths for form in FORMATS)
    return next((path for path in spelled if path.is_file()), None)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in FORMATS and path.is_file()


def _quarter(grid: UInt8[np.ndarray, "h w 3"], sample: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    height, width = grid.shape[0] // 2, grid.shape[1] // 2
    top, left = sample // 2 * height, sample % 2 * width
    return grid[top : top + height, left : left + width]


def _check_record(root: Path, suite: Suite, prompt: Prompt) -> None:
    """GenEval's folders say whose images they hold.

    Raises:
      ValueError: it is another prompt; names the file.
    """
    path = root / f"{prompt.place:05d}" / "metadata.jsonl"
    if suite.layout != "geneval" or not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8").strip().partition("\n")[0])["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no record of GenEval's ({error})") from error
    if found != prompt.text:
        raise ValueError(f"{path}: found the prompt {found!r}, expected {prompt.text!r}")


def paths_of(suite: Suite) -> Sequence[str]:
    """Of all images, in the order of `Suite.rows`."""
    return [image_name(suite, prompt, sample) for prompt, sample in suite.rows()]
