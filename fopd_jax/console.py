"""What people see of a program: lines of text, and how far long work has come.

Text goes to stdout. Progress goes to stderr: as a bar on a terminal, elsewhere (files, job managers, notebooks) as
whole lines now and then, never with carriage returns. Of several processes one speaks.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from jax._src.distributed import global_state
from tqdm import tqdm

Progress = Callable[[int], Any]
"""Told how much more of what was asked for is done."""
Clock = Callable[[], float]

FIRST_S, SOONEST_S, LATEST_S = 5.0, 10.0, 60.0
"""Seconds to the first line of progress, and between two: a twentieth of the time so far, within these limits."""
_BAR_AFTER_S = 1.0  # what ends before that needs no bar
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


def speaks() -> bool:
    """Whether this is the process to tell what all of them meet; asks no device."""
    return not global_state.process_id


def say(text: str) -> None:
    """Lines on stdout, by one process alone."""
    if speaks():
        _write(text, sys.stdout)


def note(text: str) -> None:
    """Lines on stderr, by whoever calls it."""
    _write(text, sys.stderr)


def _write(text: str, stream: Any) -> None:
    """Whole lines at once; bars that are shown step aside."""
    with tqdm.external_write_mode(stream):
        print(text, file=stream, flush=True)


def align(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table of columns as wide as they have to be, two spaces apart; those numbered in `right` end where they end."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(cell.rjust(width) if k in right else cell.ljust(width) for k, (cell, width) in cells).rstrip()

    return "\n".join(map(line, rows))


class Track:
    """How far something has come: `title done/total words`.

    `sized`: it counts bytes. `at_once`: the first line or bar does not wait; otherwise what is short shows none.
    Closed, it leaves its last state to read, a bar inside another one aside.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        sized: bool = False,
        at_once: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        self._shown: _Bar | _Lines | None = None
        if not speaks() or total <= 0:
            return
        if sys.stderr.isatty():
            self._shown = _Bar(title, total, done, sized, at_once)
        else:
            self._shown = _Lines(title, total, sized, at_once, clock)

    def to(self, done: int, words: str = "") -> None:
        """So much is done."""
        if self._shown is not None:
            self._shown.to(done, words)

    def close(self) -> None:
        """It ends here, whether all is done or not."""
        if self._shown is not None:
            self._shown.close()


class _Bar:
    def __init__(self, title: str, total: int, done: int, sized: bool, at_once: bool) -> None:
        self._bar = tqdm(
            total=total, initial=done, desc=title, bar_format=_BAR, unit_scale=sized, unit_divisor=1024, leave=None,
            delay=0.0 if at_once else _BAR_AFTER_S, **_screen(),
        )  # fmt: skip

    def to(self, done: int, words: str) -> None:
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _screen() -> dict[str, Any]:
    """Terminals of no size, as `script` and some job managers make them, would be shown nothing."""
    try:
        known = all(os.get_terminal_size(sys.stderr.fileno()))
    except OSError:
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": 100, "nrows": 24}


class _Lines:
    def __init__(self, title: str, total: int, sized: bool, at_once: bool, clock: Clock) -> None:
        self._title, self._sized, self._clock = title, sized, clock
        self._all, self._total, self._last = total, self._count(total), ""
        self._began = clock()
        self._next = self._began if at_once else self._began + FIRST_S
        self._written = False

    def to(self, done: int, words: str) -> None:
        self._last = f"{self._title} {self._count(done)}/{self._total} {words}".rstrip()
        now = self._clock()
        if now >= self._next or (self._written and done >= self._all):
            self._next = now + min(max((now - self._began) / 20, SOONEST_S), LATEST_S)
            self._write()

    def close(self) -> None:
        if self._written and self._last:
            self._write()

    def _write(self) -> None:
        note(self._last)
        self._written, self._last = True, ""

    def _count(self, count: int) -> str:
        return tqdm.format_sizeof(count, "B", 1024) if self._sized else str(count)


@contextlib.contextmanager
def progress(
    title: str, total: int, unit: str = "", *, sized: bool = False, clock: Clock = time.monotonic
) -> Iterator[Progress]:
    """Show how far work of so many units has come, at which rate, and when it will end; yields what counts them.

    The first part is left out of the rate: programs are compiled and files opened in it. `sized`: the unit is a byte.
    """
    track, done = Track(title, total, sized=sized, clock=clock), 0
    first: tuple[int, float] | None = None

    def count(more: int) -> None:
        nonlocal done, first
        done += more
        first = first or (done, clock())
        track.to(done, _pace(done - first[0], clock() - first[1], total - done, unit, sized))

    try:
        yield count
    finally:
        track.close()


def _pace(done: int, seconds: float, left: int, unit: str, sized: bool) -> str:
    if not done:
        return ""
    rate = done / max(seconds, 1e-9)
    each = f"{tqdm.format_sizeof(rate, 'B', 1024)}/s" if sized else f"{unit}/s {rate:.3g}"
    return f"{each} ETA {spell_seconds(left / rate)}"


def spell_seconds(seconds: float) -> str:
    """`M:SS`, `H:MM:SS`, or days before that."""
    days, rest = divmod(round(seconds), 86400)
    return f"{days} d {tqdm.format_interval(rest)}" if days else tqdm.format_interval(rest)
