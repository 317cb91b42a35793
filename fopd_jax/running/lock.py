"""One run at a time in a workdir: a file that names who is there, and whose time moves for as long as it is.

It works on network mounts: exclusive creation, renaming and times of files are all it needs, and clocks of different
hosts are never compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from fopd_jax.parallel.distributed import is_main, warn
from fopd_jax.reading import parse_json, read_regular
from fopd_jax.running.preemption import last_words

FILE = "running.lock"
HEARTBEAT_S, SILENCE_S = 5.0, 60.0  # between signs of life; without one for this long, its run is dead


@contextlib.contextmanager
def holding(workdir: Path) -> Iterator[None]:
    """Hold a claimed workdir; process 0 does for all. What a killed run left behind is taken over, with a line.

    Raises:
      ValueError: another run holds it; names host, process and time.
    """
    if not is_main():
        yield
        return
    path, done = workdir / FILE, threading.Event()
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    text = json.dumps(mine | {"id": uuid.uuid4().hex}) + "\n"
    _take(path, text)
    thread = threading.Thread(target=_beat, args=(path, text, done), name="lock", daemon=True)
    thread.start()

    def give_back(_: str = "") -> None:
        done.set()
        with contextlib.suppress(OSError):
            if _read(path) == text:
                path.unlink()

    try:
        with last_words(give_back):
            yield
    finally:
        give_back()
        thread.join()


def check(workdir: Path) -> None:
    """Look whether another run holds a workdir, before anything long is done for it. Process 0 does; writes nothing.

    It looks for a few signs of life only: `holding` decides.

    Raises:
      ValueError: as `holding`.
    """
    if is_main():
        _dead(workdir / FILE, 3 * HEARTBEAT_S)


def _take(path: Path, text: str) -> None:
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return
        except FileExistsError:
            _clear(path)


def _dead(path: Path, seconds: float) -> str | None:
    """What a run that is dead left in its lock; None where there is none.

    Raises:
      ValueError: it is alive; or no run has made it.
    """
    if path.is_symlink():  # to nothing, there is nothing to clear and no name to take
        raise ValueError(f"{path}: a link, expected a file that a run has made; remove it")
    there = _read(path)
    if there is None or not _may_be_alive(there):
        return there
    warn(f"{path.parent}: {_name(there)} may be running in it; looking for a sign of life for up to {seconds:.0f} s")
    if _moves(path, seconds):
        raise ValueError(f"{path.parent}: {_name(there)} is running in it; stop that, or choose another --workdir")
    return there


def _clear(path: Path) -> None:
    """Remove a lock whose run is dead.

    Raises:
      ValueError: it is alive.
    """
    there = _dead(path, SILENCE_S)
    if there is None:
        return
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.rename(aside)
    except FileNotFoundError:  # another run was faster
        return
    if _read(aside) != there:  # another run took over in between: it is the one
        aside.rename(path)
        return
    aside.unlink()
    warn(f"{path.parent}: {_name(there)} is gone without having given it back; taken over")


def _may_be_alive(text: str) -> bool:
    """Whether the process is on another host, where nobody can look, or is one of this host's others."""
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
        there = parse_json(text)
        if there["host"] != socket.gethostname():
            return True
        try:
            os.kill(int(there["pid"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return int(there["pid"]) != os.getpid()
    return True


def _moves(path: Path, seconds: float) -> bool:
    """Whether a lock shows a sign of life within so many seconds."""
    with contextlib.suppress(FileNotFoundError):
        first, until = path.stat().st_mtime_ns, time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(HEARTBEAT_S / 10)
            if path.stat().st_mtime_ns != first:
                return True
    return False


def _beat(path: Path, text: str, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):  # the disk may come back
            if _read(path) == text:
                os.utime(path)


def _read(path: Path) -> str | None:
    try:
        return read_regular(path).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _name(text: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        there = parse_json(text)
        return f"process {there['pid']} on {there['host']} (since {there['since']})"
    return "another run"
