"""What rewards have said of a run's rollouts, kept until checkpoints hold what was learnt of them: `workdir/scores`.

Updates between the last checkpoint and a kill are made again, from rollouts that are the same to the bit. What a judge
has said of them stands: it costs nothing a second time, and a judge that never says the same twice makes no other run
of it. Failures stand as well, as in a run that nothing interrupts, unless they are what ended the run.

    scores/<step>_<process>.jsonl    a line a reward: its name, of what, its values (null: failed) and their details
                                     where they ended the run, a line that says so follows
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from fopd_jax.console import note
from fopd_jax.files import replacing
from fopd_jax.reading import parse_json, read_regular
from fopd_jax.rewards.reward import Metadata, Scores
from fopd_jax.running.aside import begin_anew
from fopd_jax.running.guards import in_one_line

FOLDER = "scores"
_FILE = re.compile(r"(\d+)_\d+\.jsonl")
_REJECTED, _DAMAGED = b'{"rejected": "failures"}\n', object()


def fingerprint(
    identity: str, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], metadata: Sequence[Metadata]
) -> str:
    """One hash of all that scores depend on; `identity`: of the config, which says what each reward is."""
    about = json.dumps([identity, images.shape, list(prompts), [dict(each) for each in metadata]], default=str)
    return hashlib.sha256(about.encode() + b"\n" + np.ascontiguousarray(images).data).hexdigest()


class Journal:
    """One process's scores, a file for each step, so that nothing is ever rewritten but what is damaged.

    A line that a kill has torn counts as none. What cannot be written is told once: it costs its scores a second time,
    if the run is killed, and nothing else. Threads may add at once.
    """

    def __init__(self, workdir: Path, process: int) -> None:
        self._folder, self._process = workdir / FOLDER, process
        self._lock, self._told = threading.Lock(), False

    def find(self, step: int, of: str) -> dict[str, Scores]:
        """By reward, the scores of what has that fingerprint; to be asked before anything is added to a step."""
        with self._lock:
            entries = self._read(step)
        found: dict[str, Scores] = {}
        for entry in entries:
            if entry is None:
                found = {name: scores for name, scores in found.items() if not scores.failed.any()}
            elif entry.of == of:
                found[entry.reward] = entry.scores
        return found

    def add(self, step: int, of: str, name: str, scores: Scores) -> None:
        """Keep a reward's scores; they are on the disk when this returns."""
        self._append(step, lambda: _spell(_Entry(name, of, scores)))

    def reject(self, step: int) -> None:
        """Failures of that step ended the run, so that no update was made with them: the next run asks again."""
        self._append(step, lambda: _REJECTED)

    def prune(self, before: int) -> None:
        """Remove the steps before that one, those of all processes: checkpoints have what was learnt of them."""
        found = [(path, _FILE.fullmatch(path.name)) for path in self._folder.glob("*.jsonl")]
        try:
            for path in (path for path, match in found if match and int(match[1]) < before):
                path.unlink(missing_ok=True)
        except OSError as error:
            self._tell(error)

    def _file(self, step: int) -> Path:
        return self._folder / f"{step}_{self._process}.jsonl"

    def _append(self, step: int, spell: Callable[[], bytes]) -> None:
        with self._lock:
            try:
                line = spell()
                self._folder.mkdir(exist_ok=True)
                with self._file(step).open("ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except (OSError, ValueError, TypeError) as error:
                self._tell(error)

    def _read(self, step: int) -> list["_Entry | None"]:
        """What a step's file holds, None for a rejection. What is torn or damaged is not there any more then."""
        path = self._file(step)
        try:
            *lines, torn = read_regular(path).split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            begin_anew(path, error)
            return []
        read = [(line, entry) for line in lines if (entry := _parse(line)) is not _DAMAGED]
        damaged = len(lines) - len(read)
        try:
            if damaged:
                begin_anew(path, f"{damaged} of {len(lines)} lines hold no scores")
            if damaged or torn:
                with replacing(path) as temporary:
                    temporary.write_bytes(b"".join(line + b"\n" for line, _ in read))
        except OSError as error:
            self._tell(error)
        return [entry for _, entry in read]

    def _tell(self, error: Exception) -> None:
        if not self._told:
            note(f"warning: {self._folder}: cannot keep scores ({in_one_line(error)}); the run goes on")
        self._told = True


class _Entry(NamedTuple):
    """What a reward says of what has that fingerprint."""

    reward: str
    of: str
    scores: Scores


def _spell(entry: _Entry) -> bytes:
    """JSON has every float64 to the bit; what it lacks, details hold as text."""
    name, of, scores = entry
    values = [None if failed else value for value, failed in zip(scores.values.tolist(), scores.failed, strict=True)]
    about = {"reward": name, "of": of, "values": values, "details": [dict(each) for each in scores.details]}
    return (json.dumps(about, default=str) + "\n").encode()


def _parse(line: bytes) -> Any:
    """The entry of a line, None for one that rejects those before it, `_DAMAGED` for any other."""
    if line + b"\n" == _REJECTED:
        return None
    try:
        about = parse_json(line)
        values = np.array([np.nan if each is None else float(each) for each in about["values"]])
        scores = Scores(values, np.isnan(values), tuple(dict(each) for each in about["details"]))
        return _Entry(str(about["reward"]), str(about["of"]), scores)
    except (ValueError, TypeError, KeyError):
        return _DAMAGED
