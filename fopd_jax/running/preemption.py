"""Stopping on signals: the update in flight ends, a checkpoint is saved, all processes leave together."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax._src.distributed import global_state

from fopd_jax.exits import RETRY
from fopd_jax.parallel.distributed import is_main, said_under

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGVTALRM")
    if hasattr(signal, name)
)
"""Those that would end the process and come from outside it: from a person, a terminal that closes, a scheduler."""
LAG = 2
"""Questions from one process's notice to the stop of all. Metrics are fetched one update late, so whoever asks for the
(n + 2)th time holds a result that the notifying process took part in after it had asked, and told, for the nth time."""

STOP_S = 30.0
"""Seconds in which a stop is obeyed whatever the storage does."""
FAILURE_S = 120.0
"""Seconds that a process has to come out of what has failed on another one, which waits for it."""
HEAD_START_S = 3.0
"""Process 0, on which the runtime of all depends, is the last to leave."""

_FOLDER, _NOTED = "fopd_jax/stop", "fopd_jax/noted/"
_LAST_WORDS_S = 5.0  # a disk that hangs keeps nobody from leaving
_last_words: list[Callable[[str], None]] = []


class Interrupted(Exception):
    """An evaluation was left half done."""


class Preempted(Exception):
    """The run stopped on request, and its state is saved, unless there was a problem with that.

    `status` is what the process should exit with.
    """

    def __init__(self, number: int, step: int, seconds: float, problem: str = "") -> None:
        self.status = 128 + number
        name = signal.Signals(number).name
        saved = (
            f"not saved ({problem}); the same command continues from the checkpoint before"
            if problem
            else (f"saved in {seconds:.1f} s; the same command continues")
        )
        super().__init__(f"{name}: stopped after step {step}, {saved}")


def leave_at_once() -> None:
    """From now on, signals end the process with one line and status 128 + n, wherever it is: nothing is to be saved.

    A thread hears of them, since Python's own handlers wait for a compiler to return.
    """
    told, heard = os.pipe()
    os.set_blocking(heard, False)
    threading.Thread(target=_leave_when_told, args=(told,), name="signals", daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _at_once)
    signal.set_wakeup_fd(heard, warn_on_full_buffer=False)


def _at_once(number: int, frame: FrameType | None) -> None:
    """Stands for the thread, which acts while this is what a signal calls."""


def _leave_when_told(told: int) -> None:
    while True:
        for number in os.read(told, 1):
            if signal.getsignal(number) is _at_once:
                _say_last_words(signal.Signals(number).name)
                line = f"{signal.Signals(number).name}: stopped; what was saved is intact, the same command continues\n"
                os.write(2, line.encode())
                os._exit(128 + number)


@contextlib.contextmanager
def last_words(tell: Callable[[str], None]) -> Iterator[None]:
    """Within the context, `tell` hears the name of the signal that ends the process at once, in a thread."""
    _last_words.append(tell)
    try:
        yield
    finally:
        _last_words.remove(tell)


def _say_last_words(name: str) -> None:
    def speak() -> None:
        for tell in reversed(_last_words):  # as the contexts would end
            tell(name)

    speaker = threading.Thread(target=speak, name="last words", daemon=True)
    speaker.start()
    speaker.join(_LAST_WORDS_S)


class Preemption:
    """Notes the signals that ask to stop, from `listen` until the end of the context.

    Until then they end the process at once: there is nothing to save before the first update, and a compiler cannot be
    interrupted. Signals after the first change nothing, so they do not break the save. `seconds`: see `bounded`.
    """

    def __init__(self, seconds: float = STOP_S) -> None:
        self.number: int | None = None
        self._seconds = seconds
        self._questions = 0
        self._stop: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def listen(self) -> None:
        for number in SIGNALS:
            if number not in self._previous and signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    def asked(self) -> bool:
        """Whether to stop now. All processes ask in the same places and as often, and get the same answers."""
        self._questions += 1
        if jax.process_count() == 1:
            return self.number is not None
        if self._stop is None:
            self._stop = self._agree()
        return self._questions == self._stop

    def _agree(self) -> int | None:
        """The question at which all stop, from the runtime's key-value store: whoever writes first decides."""
        client: Any = global_state.client
        if self.number is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was faster
                client.key_value_set(f"{_FOLDER}/at", str(self._questions + LAG))
        found = dict(client.key_value_dir_get(_FOLDER))
        self.number = self.number or (signal.SIGTERM if found else None)
        return int(next(iter(found.values()))) if found else None

    def interrupt(self) -> None:
        """Ask in the middle of something.

        Raises:
          Interrupted: the answer is yes.
        """
        if self.asked():
            raise Interrupted

    @contextlib.contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """End this process with one line where the block, which `what` names, does not end in time for a signal.

        That is some `seconds` after a process has noted one, or after the block began. Nothing else interrupts a write.
        """
        head = min(HEAD_START_S, self._seconds / 10)
        seconds = self._seconds - head * (1 if is_main() else 2)

        def end(noted: str) -> None:
            line = f"{noted}: {what} has not ended within {seconds:.0f} s"
            number = self.number or signal.SIGTERM
            _end(f"{line}; left it, the same command continues from the checkpoint before", 128 + number)

        with _watched(seconds, self._noted_by_any, end):
            yield

    def _noted_by_any(self) -> str:
        """The signal that this process or another one has noted, by name; empty without one."""
        if jax.process_count() > 1:
            client: Any = global_state.client
            if self.number is not None:
                client.key_value_set(f"{_NOTED}{jax.process_index()}", str(int(self.number)), allow_overwrite=True)
            self.number = self.number or next((int(number) for number in said_under(_NOTED).values()), None)
        return "" if self.number is None else signal.Signals(self.number).name


@contextlib.contextmanager
def left_where_it_hangs(what: str, failed: Callable[[], str]) -> Iterator[None]:
    """End this process with one line if the block goes on for `FAILURE_S` after it has failed on another process.

    That one waits for this one, which may wait for it on the devices. `failed` tells the other and what went wrong.
    """
    with _watched(
        FAILURE_S + HEAD_START_S * is_main(),
        failed,
        lambda why: _end(f"error: {what} has failed on {why}; left it here, the same command continues", RETRY),
    ):
        yield


@contextlib.contextmanager
def _watched(seconds: float, cause: Callable[[], str], end: Callable[[str], None]) -> Iterator[None]:
    """`end` with the cause, if the block goes on for so many seconds after there is one."""
    done = threading.Event()

    def watch() -> None:
        since = None
        while not done.wait(min(0.5, seconds / 20)):
            why, now = cause(), time.monotonic()
            since = (since or now) if why else None
            if since is not None and now - since > seconds and not done.is_set():
                end(why)

    threading.Thread(target=watch, name="watched", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _end(line: str, status: int) -> None:
    print(line, file=sys.stderr, flush=True)
    os._exit(status)
