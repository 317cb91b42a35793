"""Weights & Biases, beside what the workdir keeps: optional, and nothing depends on it."""

import html
import importlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fopd_jax.config.identity import Fields
from fopd_jax.files import write_json
from fopd_jax.parallel.distributed import is_main, warn
from fopd_jax.reading import read_regular

FILE = "wandb.json"
FINISH_S = 15  # to upload what is left at the end: less than the notice of a preemption; `wandb sync` does the rest
_SETTINGS = {"console": "off", "finish_timeout": FINISH_S}


def check(project: str) -> None:
    """Process 0 makes sure that it can write to a project, if there is one.

    Raises:
      ValueError: wandb is not installed.
    """
    if project and is_main():
        _wandb()


def _wandb() -> Any:
    """The module, imported only where it is asked for."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(f"run.wandb: wandb cannot be imported ({error}); pip install 'fopd_jax[wandb]'") from error
    if not hasattr(wandb, "init"):  # a folder of that name, such as wandb's own, in the path
        raise ValueError("run.wandb: wandb is not installed; pip install 'fopd_jax[wandb]'")
    return wandb


def start(project: str, name: str, fields: Fields, workdir: Path) -> "Tracker | None":
    """A tracker of a run with that name and config; None without a project or an answer, and on other processes."""
    if not project or not is_main():
        return None
    wandb = _wandb()
    try:
        run = wandb.init(
            project=project,
            name=name,
            id=run_id(workdir),
            resume="allow",
            config=dict(fields),
            dir=str(workdir),
            settings=_SETTINGS,
        )
        return Tracker(run, wandb.Image, wandb.Html)
    except Exception as error:  # whatever it is, of a service that a run does not need
        _give_up(error)
        return None


def run_id(workdir: Path) -> str:
    """By which a workdir's run is resumed: drawn once, kept in the workdir.

    Made from its path it would be another's, where two machines have the same paths or a workdir is started over.
    """
    path = workdir / FILE
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:16]})
    return str(json.loads(read_regular(path).decode())["id"])


class Tracker:
    """Writes to one run of Weights & Biases; the first failure is told and ends that, never the run.

    What a resumed run repeats is there already: it is the same to the bit, and histories only grow.
    """

    def __init__(self, run: Any, image: Callable[[np.ndarray], Any], page: Callable[[str], Any]) -> None:
        self._run, self._image, self._page = run, image, page
        self._first = int(run.starting_step)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._call(step, lambda: {name: float(value) for name, value in scalars.items()})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Images are uint8 `[H, W, 3]`."""
        self._call(step, lambda: {name: self._image(image) for name, image in images.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts are shown as they are, in letters of one width."""
        self._call(step, lambda: {name: self._page(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()})

    def _call(self, step: int, values: Callable[[], Mapping[str, Any]]) -> None:
        if self._run is None or step < self._first:
            return
        try:
            self._run.log(values(), step=step)
        except Exception as error:
            self._run = None
            _give_up(error)

    def close(self, status: int) -> None:
        """Upload what is left, for `FINISH_S` at most; `status`: how the program ends."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=status)
        except Exception as error:
            _give_up(error)


def _give_up(error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    warn(f"run.wandb: {reason}; nothing more is written there, and the run goes on")
