"""A thread that tells of a hang: all stacks, on stderr and in `workdir/hang_<process>.txt`."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

COMPILING = 4
"""Until the first heartbeat the program compiles, which may take this many times as long as anything after."""

EXIT_STATUS = 75  # the system's name for it is "temporary failure": whoever started the run may start it again


class Watchdog:
    """Watches for the heartbeats between `__enter__` and `__exit__`; a silence of `seconds` is a hang.

    It reports every `seconds` for as long as the silence lasts, and ends the process at the first report if `abort`:
    a hang in a collective cannot be left in any other way. 0 seconds watch nothing. The loop beats after every step,
    checkpoint and batch of an evaluation, so `seconds` has to exceed the longest of them.
    """

    def __init__(self, folder: Path = Path(), seconds: float = 0.0, abort: bool = False, process: int = 0) -> None:
        self._file, self._seconds, self._abort = folder / f"hang_{process}.txt", seconds, abort
        self._limit, self._where = COMPILING * seconds, "before the first step"
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, where: str) -> None:
        """The run is alive, and this is what it has just done."""
        self._last, self._limit, self._where = time.monotonic(), self._seconds, where

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        if self._seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        reported = self._last
        while not self._done.wait(self._seconds / 20):
            since = max(reported, self._last)
            if time.monotonic() - since > self._limit:
                self._report()
                reported = time.monotonic()

    def _report(self, leave: Callable[[int], object] = os._exit) -> None:
        silent = time.monotonic() - self._last
        end = f"; ending with status {EXIT_STATUS}" if self._abort else ""
        title = (
            f"watchdog: no sign of life for {silent:.0f} s after {self._where}{end}; all stacks, also in {self._file}\n"
        )
        sys.stderr.write(title)
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + title)
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:  # a full disk may be what it hangs on
            sys.stderr.write(f"watchdog: {error}\n")
        sys.stderr.flush()
        if self._abort:
            leave(EXIT_STATUS)
