"""Text in many images: a pool of processes that read it, and that may crash or hang without harm (`ocr_worker`)."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

from fopd_jax.rewards.ocr_worker import HEADER

WORKER = (sys.executable, "-m", "fopd_jax.rewards.ocr_worker")
MOST_WORKERS = 32
"""Where nobody asks for more: each takes 0.4 GB, and 32 read some 200 images a second."""
_STARTS_WITHIN = 120.0  # seconds
_ENDS_WITHIN = 2.0


class ReadingError(Exception):
    """An image was not read; says why."""


class WorkerEndedError(ReadingError):
    """The process that was to read it has ended."""


class Recogniser:
    """`read` images in parallel; `close` it. `workers`: processes; `timeout`: seconds that one image may take.

    Raises:
      ValueError: a process cannot load what reads; says why.
    """

    def __init__(self, workers: int, timeout: float, command: Sequence[str] = WORKER) -> None:
        self._timeout, self._closed = timeout, False
        self._workers = [_Worker(command) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="recogniser")
        try:
            self._workers[0].ready()  # the others load meanwhile, and show what they are when they are used
        except (ReadingError, TimeoutError) as error:
            self.close()
            raise ValueError(str(error)) from error

    def read(self, images: UInt8[np.ndarray, "n h w 3"]) -> list[list[str] | Exception]:
        """The lines of text in each image, RGB, in the detector's order, or why it could not be read.

        An image whose process dies is tried once more; one that takes too long is not.
        """
        return list(self._threads.map(self._read, images))

    def close(self) -> None:
        """End all processes; images that are still being read fail."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.end()  # one may have been started meanwhile

    def _read(self, image: UInt8[np.ndarray, "h w 3"]) -> list[str] | Exception:
        worker = self._idle.get()
        try:
            with contextlib.suppress(WorkerEndedError):
                return self._once(worker, image)
            return self._once(worker, image)
        except (ReadingError, TimeoutError, OSError) as error:
            return error
        finally:
            self._idle.put(worker)

    def _once(self, worker: "_Worker", image: UInt8[np.ndarray, "h w 3"]) -> list[str]:
        if self._closed:
            raise ReadingError("the recogniser is closed")
        return worker.read(image, self._timeout)


class _Worker:
    """One process, started again when it has ended. Used by one thread at a time, but for `kill`."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._start()

    def _start(self) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # what is imported here is found there
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
            process_group=0,  # signals for the run are not for it: the run ends it when it is done
        )
        self._ready = False

    def ready(self) -> None:
        """Wait until it has loaded what reads.

        Raises:
          ReadingError, TimeoutError: it cannot, or takes too long.
        """
        if not self._ready:
            self._reply(b"", _STARTS_WITHIN, "starting")
            self._ready = True

    def read(self, image: UInt8[np.ndarray, "h w 3"], timeout: float) -> list[str]:
        """The lines in an image.

        Raises:
          ReadingError: reading failed, or (WorkerEndedError) the process died.
          TimeoutError: it took more than `timeout` seconds; the process is ended.
        """
        if self._process.poll() is not None:
            self.end()
            self._start()
        self.ready()
        height, width, _ = image.shape
        return self._reply(HEADER.pack(height, width) + image.tobytes(), timeout, "reading")["lines"]

    def _reply(self, request: bytes, seconds: float, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = b""
        with _deadline(self._process, seconds) as expired, contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            status = self.end()
            if expired.is_set():
                raise TimeoutError(f"took more than {seconds:g} s {what}; its process was ended")
            raise WorkerEndedError(f"the process that was {what} {status}")
        reply = json.loads(line)
        if "error" in reply:
            raise ReadingError(reply["error"])
        return reply

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        """End it, if it has not, and say how it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            code = self._process.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process.stdout.close()
        last = "" if self._log.closed else _last_line(self._log)
        self._log.close()
        return (f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}") + last


@contextlib.contextmanager
def _deadline(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill a process when a block takes longer; the event is set then."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def _last_line(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 1000))
    lines = log.read().decode(errors="replace").split("\n")
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
