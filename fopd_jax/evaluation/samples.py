"""Sampled images as files: what stands in their metadata, how they are named, which folder they may go to."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fopd_jax.config.sizes import describe_size
from fopd_jax.evaluation.grid import draw_grid
from fopd_jax.evaluation.provenance import provenance
from fopd_jax.evaluation.sampler import Request
from fopd_jax.files import write_png
from fopd_jax.rewards.pixels import to_pixels

GRID_FILE, GRID_COLUMNS, GRID_ROWS = "grid.png", 8, 8
BASE = "base"
SCORES_FILE = "scores.jsonl"
_OURS = re.compile(r"grid\.png|scores\.jsonl|\d{5,}(_[\w.-]+)?\.png|\..+\.tmp")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is sampled: prompts, so many images of each, their seeds, and the prompt that guidance leads away from.

    Every image has a seed of its own, `seed` and those that follow it; if `shared`, every prompt has the same ones.
    `provenance`: the files say so in other tools' terms, too, see `evaluation.provenance`.
    """

    prompts: Sequence[str]
    per_prompt: int
    seed: int
    shared: bool = False
    negative: str = ""
    provenance: bool = False

    def seeds(self, prompt: int) -> range:
        """Of the images of a prompt, by its place."""
        first = self.seed + (0 if self.shared else prompt * self.per_prompt)
        return range(first, first + self.per_prompt)

    def requests(self) -> list[Request]:
        """Prompt by prompt."""
        return [(prompt, seed) for place, prompt in enumerate(self.prompts) for seed in self.seeds(place)]


def name_policies(sources: Sequence[str]) -> list[str]:
    """Short names of adapters, each another one: as many last parts of their paths as that takes; empty: the base.

    They are parts of names of files, so that they hold no slash.
    """
    parts = [_parts(source) for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        names = [_joined(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i}_{_joined(each)}" for i, each in enumerate(parts)]


def _joined(parts: Sequence[str]) -> str:
    return re.sub(r"[^\w.-]+", "_", "_".join(parts))


def _parts(source: str) -> tuple[str, ...]:
    *folders, last = Path(source.rpartition(":")[2]).parts or (BASE,)
    return (*folders, last.removesuffix(".safetensors"))


def file_name(index: int, policy: str, alone: bool) -> str:
    """Of an image; with several policies they say whose it is."""
    return f"{index:05d}.png" if alone else f"{index:05d}_{policy}.png"


def check_folder(out: Path, force: bool) -> None:
    """Refuse to write among what is not ours.

    Raises:
      ValueError: `out` is a file, or holds what sampling has not made and there is no `force`; names it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    others = [] if force or not out.exists() else [path.name for path in sorted(out.iterdir()) if not _is_ours(path)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(f"out: {out} holds {others[0]}{more}, which sampling has not made: name another, or --force")


def _is_ours(path: Path) -> bool:
    if not _OURS.fullmatch(path.name) or path.is_dir():
        return False
    if path.suffix == ".tmp":
        return True
    try:
        if path.name == SCORES_FILE:
            return "scores" in json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
        with Image.open(path) as picture:
            return "settings" in picture.info
    except (OSError, ValueError, TypeError):
        return False


def write_image(
    path: Path,
    image: np.ndarray,
    request: Request,
    asked: Asked,
    settings: Mapping[str, Any],
    adapter: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
) -> None:
    """One image `[h, w, 3]`, with all that made it. `adapter`: its source and hash, or nothing.

    `scores`: what rewards say of it, see `sample_scores.Scored`; nothing where none were asked.
    """
    prompt, seed = request
    about = {**settings, "adapter": adapter or None}
    text = {"prompt": prompt, "negative_prompt": asked.negative, "seed": str(seed), "settings": json.dumps(about)}
    if scores:
        text["scores"] = json.dumps(scores)
    if asked.provenance:
        text |= provenance(settings, [adapter])
    write_png(path, Image.fromarray(to_pixels(image)), text)


def shown(asked: Asked, policies: int) -> tuple[int, int]:
    """How many prompts the grid has as columns, and how many images of each as rows of a policy."""
    return min(GRID_COLUMNS, len(asked.prompts)), min(max(1, GRID_ROWS // policies), asked.per_prompt)


def write_grid(
    path: Path,
    cells: np.ndarray,
    asked: Asked,
    policies: Sequence[str],
    settings: Mapping[str, Any],
    adapters: Sequence[Mapping[str, Any]],
) -> None:
    """An overview of `cells [policies · images of each, prompts, h, w, 3]`, with settings above and in its metadata."""
    columns, rows = shown(asked, len(policies))
    heads = [_column_label(asked, place, rows) for place in range(columns)]
    picture = draw_grid(
        cells,
        [_row_label(asked, name, r, rows) for name in policies for r in range(rows)],
        heads,
        _title(asked, settings),
    )
    text = {
        "prompts": json.dumps(list(asked.prompts[:columns]), ensure_ascii=False),
        "negative_prompt": asked.negative,
        "seeds": json.dumps([list(asked.seeds(place))[:rows] for place in range(columns)]),
        "settings": json.dumps({**settings, "adapters": [each or None for each in adapters]}),
    }
    if asked.provenance:
        text |= provenance(settings, adapters)
    write_png(path, picture, text)


def _column_label(asked: Asked, place: int, rows: int) -> str:
    prompt, seeds = " ".join(asked.prompts[place].split()) or "(empty prompt)", asked.seeds(place)
    if asked.shared:
        return prompt
    return f"{prompt}\nseed {seeds[0]}" if rows == 1 else f"{prompt}\nseeds {seeds[0]} to {seeds[rows - 1]}"


def _row_label(asked: Asked, policy: str, row: int, rows: int) -> str:
    if asked.shared:
        return f"{policy}\nseed {asked.seed + row}"
    return policy if rows == 1 else f"{policy}\nimage {row + 1}"


def _title(asked: Asked, settings: Mapping[str, Any]) -> str:
    size = describe_size((settings["height"], settings["width"]))
    noise = f" {settings['noise_level']:g}" if "noise_level" in settings else ""
    parts = [
        str(settings["model"]), f"{settings['steps']} steps", f"guidance {settings['guidance']:g}",
        f"{settings['transition']}{noise}", f"shift {settings['shift']:g}", settings["dtype"], f"{size} pixels",
    ]  # fmt: skip
    return ", ".join(parts) + (f"\nnegative prompt: {' '.join(asked.negative.split())}" if asked.negative else "")
