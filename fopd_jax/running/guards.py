"""The host's side of the guards: updates that did not land, and metrics that leave their bounds."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fopd_jax.files import write_json, write_tensors
from fopd_jax.parallel.distributed import is_main, largest, warn
from fopd_jax.policy.velocity import Tree

FOLDER = "nonfinite"
SAMPLES = "samples/"  # metrics of this prefix are arrays `[B]`, one value per sample
Bounds = Mapping[str, tuple[float, float]]
Describe = Callable[[int, Sequence[int]], Sequence[str]]
"""`(i, rows)` → what those rows of batch i are, in words."""


class Guard:
    """Counts the updates that were skipped because loss or gradient was not finite, and keeps what explains them.

    Each leaves `nonfinite/step_N.safetensors`, the batch, and `.json`; they are also the count, so that restarts do not
    begin a new one. `folder` None keeps nothing. `origin`: what else to write into the JSON file.
    """

    def __init__(self, folder: Path | None = None, most: int = 0, origin: Mapping[str, Any] | None = None) -> None:
        self._folder = None if folder is None else folder / FOLDER
        self._most, self._origin = most, dict(origin or {})
        self._count = 0

    def resume(self, step: int) -> None:
        """Count the updates up to `step` that earlier runs skipped."""
        names = [] if self._folder is None else [path.name for path in self._folder.glob("step_*.json")]
        found = [int(match[1]) for name in names if (match := re.fullmatch(r"step_([0-9]+)\.json", name))]
        self._count = largest(sum(at <= step for at in found))

    def skip(
        self,
        step: int,
        values: Mapping[str, float],
        samples: Mapping[str, np.ndarray],
        batch: Callable[[], Tree],
        describe: Describe | None,
    ) -> None:
        """Note that update `step` did not land: `values` are its metrics, `samples` those per sample.

        Every process calls it; `batch` returns the whole batch on each.

        Raises:
          FloatingPointError: it is one more than is allowed; names step, metrics and samples.
        """
        self._count += 1
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        rows = bad_rows(samples)
        words = describe(step - 1, rows) if describe and rows else [""] * len(rows)
        told = [f"{row} ({what})" if what else str(row) for row, what in zip(rows, words, strict=True)]
        about = {"step": step, "metrics": values, "rows": rows, "samples": list(words), **self._origin}
        kept = self._keep(step, batch(), about) if self._folder is not None else ""
        message = f"step {step}: {_list(f'{name} is {values[name]}' for name in bad) or 'not finite'}; bad samples: "
        message += f"{_list(told) or 'none alone'}{kept}; the update did not land"
        if self._count > self._most:
            limit = (
                f"run.max_skipped_steps is {self._most}, this is number {self._count}; the last checkpoint is intact"
            )
            raise FloatingPointError(f"{message}; {limit}")
        warn(f"{message}, the run goes on ({self._count} of at most {self._most})")

    def _keep(self, step: int, batch: Tree, about: Mapping[str, Any]) -> str:
        """Write what reproduces the failure; returns where, in words."""
        assert self._folder is not None
        path = self._folder / f"step_{step}.safetensors"
        if is_main():
            try:
                self._folder.mkdir(exist_ok=True)
                write_tensors(path, named_arrays(batch))
                write_json(path.with_suffix(".json"), _plain(about))  # last: it is what counts
            except OSError as error:
                return f"; its batch could not be kept ({error})"
        return f"; its batch is in {path}"


class Alarms:
    """Metrics that should stay within bounds: leaving them is told once, and never stops a run."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self._bounds = dict(bounds or {})
        self._outside: set[str] = set()

    def check(self, step: int, values: Mapping[str, float], unmeasured: Collection[str] = ()) -> dict[str, float]:
        """`alarms/<metric>` for every metric with bounds: 1 outside, 0 inside or not measured at this step.

        Raises:
          ValueError: there is no such metric; names it and those there are.
        """
        for name in self._bounds.keys() - values.keys():
            raise ValueError(f"run.alarms: no metric {name!r}, expected some of {_list(sorted(values))}")
        measured = {name: bounds for name, bounds in self._bounds.items() if name not in unmeasured}
        outside = {name for name, (low, high) in measured.items() if not low <= values[name] <= high}
        for name in sorted(outside - self._outside):
            low, high = self._bounds[name]
            warn(f"alarm: step {step}: {name} is {values[name]:.6g}, outside of {low:g} … {high:g}")
        self._outside = outside
        return {f"alarms/{name}": float(name in outside) for name in self._bounds}


def bad_rows(samples: Mapping[str, np.ndarray]) -> list[int]:
    """Rows of the batch with a value that is not finite."""
    return sorted({int(row) for values in samples.values() for row in np.flatnonzero(~np.isfinite(values))})


def named_arrays(tree: Tree) -> dict[str, np.ndarray]:
    """A tree's arrays by their paths, joined by "/"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(leaf) for place, leaf in leaves}


def in_one_line(error: BaseException) -> str:
    """What an error says, on one line, behind its type where that alone tells what it is."""
    words = " ".join(str(error).split())
    return words if words and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {words}"


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: metrics as numbers where they are some, as words otherwise."""
    metrics = {name: value if math.isfinite(value) else str(value) for name, value in about["metrics"].items()}
    return json.loads(json.dumps({**about, "metrics": metrics}))


def _list(words: Any) -> str:
    found = list(words)
    shown = ", ".join(found[:8])
    return f"{shown} and {len(found) - 8} more" if len(found) > 8 else shown
