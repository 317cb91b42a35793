"""One metric writer, with clu's method names, over TensorBoard and `metrics.jsonl`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter


class MetricWriter:
    """Writes scalars and images to TensorBoard event files and one JSON line per step to `metrics.jsonl`.

    On resuming, lines beyond `resume_step` belong to updates that were lost and are dropped.
    """

    def __init__(self, workdir: Path, resume_step: int) -> None:
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            _drop_after(self._path, resume_step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        self._lines = self._path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if not scalars:
            return
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step, **{k: float(v) for k, v in scalars.items()}}) + "\n")
        self._lines.flush()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Images are uint8 `[H, W, 3]`."""
        for name, image in images.items():
            self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()
        self._lines.close()


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`; a line cut off by a kill is dropped too."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
