"""Stopping on signals: the update in flight ends, a checkpoint is saved, all processes leave together."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax._src.distributed import global_state

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGVTALRM")
    if hasattr(signal, name)
)
"""Those that would end the process and come from outside it: from a person, a terminal that closes, a scheduler."""
LAG = 2
"""Questions from one process's notice to the stop of all. Metrics are fetched one update late, so whoever asks for the
(n + 2)th time holds a result that the notifying process took part in after it had asked, and told, for the nth time."""

_FOLDER = "fopd_jax/stop"
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
        for tell in _last_words:
            tell(name)

    speaker = threading.Thread(target=speak, name="last words", daemon=True)
    speaker.start()
    speaker.join(_LAST_WORDS_S)


class Preemption:
    """Notes the signals that ask to stop, from `listen` until the end of the context.

    Until then they end the process at once: there is nothing to save before the first update, and a compiler cannot be
    interrupted. Signals after the first change nothing, so they do not break the save.
    """

    def __init__(self) -> None:
        self.number: int | None = None
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
