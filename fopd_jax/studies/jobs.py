"""Commands that need each other's files: run each once, several side by side, and go on after an interruption."""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fopd_jax.console import Track, note, say, spell_seconds
from fopd_jax.exits import Outage
from fopd_jax.files import write_json

LOGS, SECONDS = "logs", "seconds.json"
FLAGS = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
"""Of XLA, where the user sets none: programs that train for a minute take about as long to compile well."""
_TAIL = 5  # lines of a failed command's log that are told
_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """A Python command. `done`: what it leaves last, below the folder of all; `needs`: names of jobs before it.

    `{work}` in words of the command is that folder. `kind`: jobs of one kind take about as long.
    """

    name: str
    command: tuple[str, ...]
    done: str
    needs: tuple[str, ...] = ()
    kind: str = "run"

    def words(self, work: Path) -> list[str]:
        """To execute."""
        return [sys.executable, *(word.replace("{work}", str(work)) for word in self.command)]


def run_jobs(jobs: Mapping[str, Job], work: Path, root: Path, workers: int) -> None:
    """Run from `root` what has not left its file yet, in the order given as far as needs allow.

    `workers` side by side, each on its own share of the cores: small networks use several cores badly, so that two
    commands on one each do more than one after the other on both. What commands print goes to `logs/`.

    Raises:
      Outage: commands failed; all that does not need them has been done.
    """
    waiting = {name: job for name, job in jobs.items() if not (work / job.done).exists()}
    (work / LOGS).mkdir(parents=True, exist_ok=True)
    track = Track("reproduce", len(jobs), done=len(jobs) - len(waiting), at_once=True)
    clock, failed = _Clock(work / SECONDS), dict[str, Path]()
    running: dict[int, tuple[Job, subprocess.Popen[Any], float]] = {}
    with _stopping(running):
        while waiting or running:
            for slot, cores in enumerate(_shares(workers)):
                job = None if slot in running else _next(waiting, jobs, work)
                if job is not None:
                    running[slot] = waiting.pop(job.name), _start(job, work, root, cores), time.monotonic()
            if not running:  # what is left needs what has failed
                break
            time.sleep(_POLL_S)
            for slot, (job, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode or not (work / job.done).exists():
                    failed[job.name] = work / LOGS / f"{job.name}.log"
                    note(f"{job.name}: ended with status {process.returncode}\n{_tail(failed[job.name])}")
                else:
                    clock.keep(job.kind, time.monotonic() - began)
                left = clock.left([*waiting.values()], [(each, start) for each, _, start in running.values()], workers)
                track.to(len(jobs) - len(waiting) - len(running), f"{job.name} ETA {spell_seconds(left)}")
    track.close()
    if failed:
        raise Outage(f"failed: {', '.join(failed)}; see {work / LOGS}. The same command tries them again")


def plan(jobs: Mapping[str, Job], work: Path) -> str:
    """As a tree of kinds: how many there are of each, and how many are done."""
    kinds = dict.fromkeys(job.kind for job in jobs.values())
    lines = []
    for kind in kinds:
        own = [job for job in jobs.values() if job.kind == kind]
        done = sum((work / job.done).exists() for job in own)
        lines.append(f"  {kind}: {done} of {len(own)} done")
    return "\n".join(lines)


def _next(waiting: Mapping[str, Job], jobs: Mapping[str, Job], work: Path) -> Job | None:
    ready = (job for job in waiting.values() if all((work / jobs[need].done).exists() for need in job.needs))
    return next(ready, None)


def _shares(workers: int) -> list[set[int]]:
    """The cores of each worker; none where the system cannot say."""
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[k::workers]) or set(cores) for k in range(workers)]


def _start(job: Job, work: Path, root: Path, cores: set[int]) -> subprocess.Popen[Any]:
    environment = {"XLA_FLAGS": FLAGS} | os.environ
    with (work / LOGS / f"{job.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            job.words(work), cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    if cores:
        with contextlib.suppress(OSError):  # it may have ended
            os.sched_setaffinity(process.pid, cores)  # threads come later, and inherit it
    return process


@contextlib.contextmanager
def _stopping(running: Mapping[int, tuple[Job, subprocess.Popen[Any], float]]) -> Iterator[None]:
    """However it ends, commands are asked to end, and waited for: they save what they have."""
    usual: Any = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        for _, process, _ in running.values():
            with contextlib.suppress(OSError):
                process.terminate()
        for job, process, _ in running.values():
            process.wait()
            say(f"{job.name}: stopped")
        signal.signal(signal.SIGTERM, usual)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])


class _Clock:
    """How long jobs of a kind have taken, kept for later calls."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._seconds: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._seconds = {}

    def keep(self, kind: str, seconds: float) -> None:
        self._seconds.setdefault(kind, []).append(round(seconds, 1))
        write_json(self._file, self._seconds)

    def left(self, waiting: Sequence[Job], running: Sequence[tuple[Job, float]], workers: int) -> float:
        """Seconds; those of a kind that has never been seen as those of the others."""
        begun = sum(max(self._usual(job.kind) - (time.monotonic() - began), 0.0) for job, began in running)
        return (sum(self._usual(job.kind) for job in waiting) + begun) / workers

    def _usual(self, kind: str) -> float:
        known = self._seconds.get(kind) or [each for all_of in self._seconds.values() for each in all_of]
        return statistics.median(known) if known else 0.0
