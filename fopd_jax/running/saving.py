"""One checkpoint, written by all processes beside training; what stops one of them is known to all, and soon.

    <step>.tmp/   state/   about/about.json   manifest_<process>.json   manifest.json      becomes <step>/

Each process writes its shards and hashes them. When all have, process 0 adds what is common, seals the folder and gives
it its name. Orbax writes and merges the arrays; its own checkpoint managers let processes wait for one another on the
devices, without end, or for 20 minutes in a thread, which one that has failed does not reach.
"""

import asyncio
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from fopd_jax.files import write_json
from fopd_jax.parallel.agreement import agree, forget
from fopd_jax.parallel.distributed import is_main, name_of
from fopd_jax.running.guards import in_one_line
from fopd_jax.running.integrity import seal, write_part

STATE, ABOUT, ABOUT_FILE = "state", "about", "about.json"
PATIENCE_S, SLOWEST = 120.0, 50e6  # of a save: seconds, and bytes a second beside them
WRITTEN, IN_PLACE = "written", "in place"  # what processes tell one another of a save
_STEPS = 10.0  # seconds from one process's end of patience to that of whoever waits for it


def arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """What reads and writes the arrays. Random or trained numbers do not compress."""
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def patience(size: int) -> float:
    """Seconds in which so many bytes are written or read, or something hangs."""
    return PATIENCE_S + size / SLOWEST


class Save:
    """One save under way. `wait` ends with it; it gets `seconds`, after which whatever it waits for has failed."""

    def __init__(self, temporary: Path, final: Path, seconds: float) -> None:
        self._temporary, self._final, self._seconds = temporary, final, seconds
        self._began = time.monotonic()
        self._handler = arrays_handler()
        self._error: Exception | None = None
        self._abandoned = False
        self._writes: Sequence[Any] = ()
        self._thread = threading.Thread(target=self._run, name=f"save {final.name}", daemon=True)

    def start(self, leaves: Sequence[jax.Array], about: Mapping[str, Any], after: Callable[[], None]) -> None:
        """Returns once the arrays are copied to the host. `after`: for process 0 to do, once the checkpoint is there.

        What fails is said by `wait`: the other processes have to hear of it.
        """
        self._about, self._after = about, after
        self._try(lambda: self._copy(leaves))
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint is there.

        Raises:
          Exception: whatever stopped it, here.
          OSError: what stopped it on another process, which is named.
          TimeoutError: it hangs.
        """
        self._thread.join(max(0.0, self._left(3)))
        if self._thread.is_alive():
            self._abandoned = True
            raise TimeoutError(f"{self._final}: not written within {time.monotonic() - self._began:.0f} s")
        if self._error is not None:
            raise self._error

    def _copy(self, leaves: Sequence[jax.Array]) -> None:
        """In a thread, where nothing else has an event loop, as notebooks do."""
        folder, args = epath.Path(self._temporary / STATE), ocp.args.PyTreeSave(list(leaves))
        with ThreadPoolExecutor(1) as thread:
            self._writes = thread.submit(asyncio.run, self._handler.async_save(folder, args=args)).result() or ()

    def _run(self) -> None:
        self._try(self._write)
        self._agree(WRITTEN, 1)
        if is_main():
            self._try(self._place)
        self._agree(IN_PLACE, 2)
        forget(self.about(WRITTEN))
        if is_main():
            if self._error is None:
                self._after()
            else:
                shutil.rmtree(self._temporary, ignore_errors=True)

    def _write(self) -> None:
        for write in self._writes:
            write.result(timeout=max(0.0, self._left(0)))
        index = jax.process_index()
        write_part(self._temporary, self._temporary / STATE / f"ocdbt.process_{index}", index)

    def _place(self) -> None:
        (self._temporary / ABOUT).mkdir()
        write_json(self._temporary / ABOUT / ABOUT_FILE, dict(self._about))
        self._handler.finalize(epath.Path(self._temporary / STATE))
        if self._abandoned:
            raise TimeoutError(f"{self._final}: given up")
        seal(self._temporary, self._final)

    def _try(self, act: Callable[[], None]) -> None:
        """Do it if nothing has failed yet. Process 0 tells of every failed save, another one of its own part in it."""
        if self._error is not None:
            return
        try:
            act()
        except Exception as error:  # what storage raises has no common type
            self._error = error
            if not is_main():
                line = f"warning: {name_of(jax.process_index())}: {self._final}: {in_one_line(error)}"
                print(line, file=sys.stderr, flush=True)

    def _agree(self, what: str, last: int) -> None:
        """A problem of one process is one of all; the `last` to lose patience is process 0, which places the folder."""
        problem = in_one_line(self._error) if self._error else ""
        try:
            found = agree(self.about(what), problem, max(0.0, self._left(last)))
            self._error = self._error or (OSError(found) if found else None)
        except Exception as error:  # time is up, or the runtime has gone
            self._error = self._error or error

    def about(self, what: str) -> str:
        return f"{self._temporary.name} {what}"

    def _left(self, after: int) -> float:
        """Seconds until a wait ends that depends on `after` others before it."""
        return self._began + self._seconds + after * _STEPS - time.monotonic()
