"""One metric writer, with clu's method names, over TensorBoard, `metrics.jsonl` and `performance.jsonl`."""

import contextlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fopd_jax.files import replacing
from fopd_jax.parallel.distributed import is_main, warn
from fopd_jax.reading import parse_json, read_regular
from fopd_jax.running.aside import begin_anew
from fopd_jax.running.guards import in_one_line
from fopd_jax.running.resources import Misses
from fopd_jax.running.tracking import Tracker

SCALARS, CLOCKED = "metrics.jsonl", "performance.jsonl"
EVALUATION = "eval/"
"""Prefix of an evaluation's scalars."""


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Importing it fails, unless it has been imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # as Python marks what is not to be found
    try:
        yield
    finally:
        del sys.modules[module]


with _absent("torch"):  # tensorboardX imports it where it is installed: half of a program's start, for nothing here
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import masked_crc32c


class MetricWriter:
    """Writes scalars, images and texts to a TensorBoard event file; scalars also as one JSON line per step.

    `metrics.jsonl` holds what is the same however often a run is interrupted; what depends on the clock and on the
    machine is in `performance.jsonl`. On resuming, lines beyond `resume_step` belong to updates that were lost and are
    dropped. Only process 0 writes: on the others nothing here does anything. `tracker`: where all of it is written to
    as well.

    What cannot be written is told, kept in memory and tried again with what comes next.
    """

    def __init__(self, workdir: Path, resume_step: int, tracker: Tracker | None = None) -> None:
        self._misses = Misses("metrics written", "line")
        self._writes = is_main()
        if not self._writes:
            return
        self._tracker, self._step = tracker, resume_step
        board = workdir / "tensorboard"
        self._lines, self._clocked = (_resumed(workdir / name, resume_step) for name in (SCALARS, CLOCKED))
        self._board = _Tail(board / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}")
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))  # hides what it repeats
        self._flush(resume_step)

    @property
    def _files(self) -> tuple["_Tail", ...]:
        return self._lines, self._clocked, self._board

    @property
    def trouble(self) -> str:
        """Why nothing can be written, once that has failed too often in a row; empty otherwise."""
        return self._misses.told

    def write_scalars(
        self, step: int, scalars: Mapping[str, float], clocked: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """`clocked`: those that depend on the clock or the machine."""
        if not self._writes or not (scalars or clocked):
            return
        for lines, values in ((self._lines, scalars), (self._clocked, clocked)):
            if values:
                lines.add((json.dumps({"step": step, **{k: float(v) for k, v in values.items()}}) + "\n").encode())
        for name, value in {**scalars, **clocked}.items():
            self._add(Event(step=step, summary=summary.scalar(name, value)))
        self._flush(step)
        if self._tracker:
            self._tracker.write_scalars(step, {**scalars, **clocked})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Images are uint8 `[H, W, 3]`."""
        if not self._writes:
            return
        for name, image in images.items():
            self._add(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))
        self._flush(step)
        if self._tracker:
            self._tracker.write_images(step, images)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts are shown as they are, in letters of one width."""
        if not self._writes:
            return
        for name, text in texts.items():
            self._add(Event(step=step, summary=summary.text(name, f"```\n{text.rstrip()}\n```")))
        self._flush(step)
        if self._tracker:
            self._tracker.write_texts(step, texts)

    def _add(self, event: Event) -> None:
        """A record of TensorBoard's: length, its checksum, the event, its checksum."""
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._board.add(length + next(checks) + data + next(checks))

    def _flush(self, step: int) -> None:
        self._step = step
        try:
            self._board.path.parent.mkdir(exist_ok=True)
            for each in self._files:
                each.flush()
        except OSError as error:
            self._misses.missed(step, in_one_line(error))
        else:
            self._misses.worked()

    def close(self, status: int = 0) -> None:
        """Write what is left; `status`: how the program ends."""
        if not self._writes:
            return
        if any(each.waiting for each in self._files):
            self._flush(self._step)
        if lost := self._lines.waiting.count(b"\n"):
            warn(f"{self._lines.path}: the last {lost} lines could not be written")
        if self._tracker:
            self._tracker.close(status)


class _Tail:
    """Appends to a file, opened anew each time: its disk may have been away. `waiting`: bytes not written yet."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, b""

    def add(self, data: bytes) -> None:
        self.waiting += data

    def flush(self) -> None:
        """Write what waits.

        Raises:
          OSError: some of it could not be written, and still waits.
        """
        if not self.waiting:
            return
        with self.path.open("ab", buffering=0) as file:
            while self.waiting:
                self.waiting = self.waiting[file.write(self.waiting) or 0 :]


def logged(workdir: Path, step: int, prefix: str) -> dict[str, float]:
    """Scalars of that step that have been written under names with that prefix, without it."""
    return {name: value for at, values in all_logged(workdir, prefix) if at == step for name, value in values.items()}


def all_logged(workdir: Path, prefix: str) -> list[tuple[int, dict[str, float]]]:
    """Step and scalars of every line that has such names, in their order."""
    path = workdir / SCALARS
    lines = read_regular(path).splitlines() if path.exists() else []
    read = [values for values in map(_parse, lines) if type(values.get("step")) is int]
    named = (
        (line["step"], {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)})
        for line in read
    )
    return [(at, values) for at, values in named if values]


def _resumed(path: Path, step: int) -> _Tail:
    """A file that is there from the beginning, before its first line, and up to that step."""
    path.touch()
    _drop_after(path, step)
    return _Tail(path)


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`. Where some cannot be read, the file as it was is set aside, with a line."""
    lines = read_regular(path).splitlines()
    steps = [_step_of(line) for line in lines]
    kept = [line + b"\n" for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(kept))
        if None in steps:
            begin_anew(path, f"{steps.count(None)} of {len(lines)} lines, the first is line {steps.index(None) + 1}")
    if step and not kept:
        warn(f"{path}: holds nothing of the {step} updates before")


def _parse(line: bytes) -> dict[str, Any]:
    """A line's numbers; nothing where it holds none."""
    try:
        values = parse_json(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _step_of(line: bytes) -> int | None:
    step = _parse(line).get("step")
    return step if type(step) is int else None
