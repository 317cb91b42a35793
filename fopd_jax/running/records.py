"""`run.json` of a workdir: what was started in it, when, where, with which code and config, and how that ended."""

import contextlib
import os
import platform
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from fopd_jax.config.identity import Fields, fields_hash, normalise
from fopd_jax.config.recorded import RECORD_FILE, read_starts
from fopd_jax.files import write_json
from fopd_jax.parallel.distributed import is_main, warn
from fopd_jax.performance.host import commit, versions
from fopd_jax.running.aside import begin_anew
from fopd_jax.running.checkpoints import newest_step
from fopd_jax.running.guards import in_one_line
from fopd_jax.running.preemption import Preempted, last_words

PACKAGES = ("fopd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
RUNNING, FINISHED = "running", "finished"
GONE = "gone: killed, or its host was lost"
MOST_STARTS = 1000
"""That are kept, the newest: a job that is restarted every minute fills no disk."""


@contextlib.contextmanager
def keeping(folder: Path, config: Fields, about: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """Note a start in a folder that this program holds, and at the end of the context how it ended. Process 0 does.

    `config`: the whole, flat; `about`: what else to say of it. A record that cannot be written ends nothing.
    """
    if not is_main():
        yield
        return
    path, start = folder / RECORD_FILE, {**describe_start(folder, config), **about}
    earlier = _earlier(path)
    _tell_lost(folder, earlier, start["from_step"])
    starts = [*earlier, start][-MOST_STARTS:]

    def end(status: str) -> None:
        start.update(status=status, ended=_now(), at_step=newest_step(folder))
        _write(path, starts)

    _write(path, starts)
    with last_words(lambda name: end(f"stopped by {name}")):
        try:
            yield
        except Preempted as stop:
            end(f"stopped by {signal.Signals(stop.status - 128).name}")
            raise
        except KeyboardInterrupt:
            end("stopped by SIGINT")
            raise
        except BaseException as error:
            end(f"failed: {in_one_line(error)}")
            raise
        end(FINISHED)


def describe_start(folder: Path, config: Fields) -> dict[str, Any]:
    """This process's start, in JSON types; `commit` is empty where the code is in no checkout, + after it: changed."""
    return {
        "status": RUNNING,
        "began": _now(),
        "ended": None,
        "from_step": newest_step(folder),
        "command": [sys.executable, *_program(), *sys.argv[1:]],
        "folder": str(Path.cwd()),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": jax.process_count(),
        "backend": jax.default_backend(),
        "devices": dict(Counter(device.device_kind for device in jax.devices())),
        "config_hash": fields_hash(normalise(config)),
        "config": dict(config),
    }


def _program() -> list[str]:
    """`-m fopd_jax.main` where it was started so, else the file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name] if spec is not None else sys.argv[:1]


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _earlier(path: Path) -> list[dict[str, Any]]:
    """The starts before this one. Who still runs by its record does not: this run holds the folder."""
    try:
        starts = read_starts(path)
    except (OSError, ValueError) as error:
        begin_anew(path, error if isinstance(error, OSError) else "expected the starts of a run as JSON")
        return []
    return [{**each, "status": GONE} if each.get("status") == RUNNING else each for each in starts]


def _tell_lost(folder: Path, earlier: Sequence[dict[str, Any]], step: int) -> None:
    """Say so where the checkpoint that the last start ended at is gone: somebody has removed it, or a disk is away."""
    ends = [each.get("at_step") or each.get("from_step") for each in earlier[-1:]]
    for end in (each for each in ends if isinstance(each, int) and each > step):
        there = f"the newest is of step {step}" if step else "there is none: this begins again"
        warn(f"{folder}: the run before ended at step {end}, whose checkpoint is gone; {there}")


def _write(path: Path, starts: list[dict[str, Any]]) -> None:
    try:
        write_json(path, {"starts": starts})
    except OSError as error:
        warn(f"{path} could not be written ({in_one_line(error)})")
