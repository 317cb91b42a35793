"""One metric writer, with clu's method names, over TensorBoard and `metrics.jsonl`."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from fopd_jax.files import write_text
from fopd_jax.parallel.distributed import is_main
from fopd_jax.running.tracking import Tracker


class MetricWriter:
    """Writes scalars and images to TensorBoard event files and one JSON line per step to `metrics.jsonl`.

    On resuming, lines beyond `resume_step` belong to updates that were lost and are dropped. Only process 0 writes:
    on the others nothing here does anything. `tracker`: where all of it is written to as well.
    """

    def __init__(self, workdir: Path, resume_step: int, tracker: Tracker | None = None) -> None:
        self._writes = is_main()
        if not self._writes:
            return
        self._tracker = tracker
        path = workdir / "metrics.jsonl"
        if path.exists():
            _drop_after(path, resume_step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        self._lines = path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if not scalars or not self._writes:
            return
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step, **{k: float(v) for k, v in scalars.items()}}) + "\n")
        self._lines.flush()
        if self._tracker:
            self._tracker.write_scalars(step, scalars)

    def write_shares(self, step: int, shares: Mapping[str, float]) -> None:
        """Where the time went; not into `metrics.jsonl`, which does not depend on the clock."""
        if not self._writes:
            return
        named = {f"goodput/{name}": share for name, share in shares.items()}
        for name, share in named.items():
            self._board.add_scalar(name, share, step)
        if self._tracker:
            self._tracker.write_scalars(step, named)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Images are uint8 `[H, W, 3]`."""
        if not self._writes:
            return
        for name, image in images.items():
            self._board.add_image(name, image, step, dataformats="HWC")
        if self._tracker:
            self._tracker.write_images(step, images)

    def close(self, status: int = 0) -> None:
        """Write what is left; `status`: how the program ends."""
        if not self._writes:
            return
        self._board.close()
        self._lines.close()
        if self._tracker:
            self._tracker.close(status)


def is_logged(workdir: Path, step: int, prefix: str) -> bool:
    """Whether a scalar of that step whose name has that prefix has been written."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any(name.startswith(prefix) for line in lines if _step_of(line) == step for name in json.loads(line))


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`; a line cut off by a kill is dropped too."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    write_text(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
