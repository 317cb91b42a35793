"""How programs end: what went wrong in a line, and a status that says whether trying again can help.

0 done; 1 an error that may be over at the next try; 2 bad input, which stays wrong until somebody changes it, so that
no job manager should repeat it; 75 hung (`running/watchdog.py`); 128 + n ended by signal n.
"""

import argparse
import contextlib
import errno
import importlib.util
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

RETRY, BAD_INPUT = 1, 2
LONGEST = 1000
"""Characters of a message's line."""
GUIDE = "docs/weights-and-prompts.md"
"""Where to get what is not there, for messages."""
CONVERTER = "tools/convert_sd35_weights.py"
"""What makes the folders of `model.path`."""
_STAYS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
}  # fmt: skip
"""Errors of the system that the same command meets again."""


class Outage(RuntimeError):
    """Something beside the program does not do its work; the message says it all, and the next try may go better."""


class Unreachable(ValueError):
    """A field names something that does not answer just now: told as bad input is, but the next try may go better."""


class Fault(NamedTuple):
    """What is told, and the status to exit with."""

    message: str
    status: int


def shorten(message: str) -> str:
    """A message whose lines are no longer than a screen: what was found may be of any length."""
    return "\n".join(
        line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 4 :]}"
        for line in message.split("\n")
    )


def spell_error(error: BaseException) -> str:
    """Its type and what it says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def need(field: str, extra: str, *packages: str) -> None:
    """Raises ValueError, naming the field and the extra that brings it, for a package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{field}: needs {package}: pip install 'fopd_jax[{extra}]'")


def explain(error: BaseException, place: str = "") -> Fault | None:
    """What an error means to whoever started the program; None is a mistake of the program's own: show its traceback.

    A message has one line, or one for each of several wrong fields. `place`: what an error of the system is laid to
    that names no file.
    """
    match error:
        case KeyboardInterrupt():
            return Fault("interrupted", 128 + signal.SIGINT)
        case ValueError():
            return Fault(shorten(f"error: {error}"), RETRY if isinstance(error, Unreachable) else BAD_INPUT)
        case FloatingPointError():
            return Fault(f"error: {error}", RETRY)
        case Outage():
            return Fault(shorten(f"error: {error}"), RETRY)
        case OSError():
            return Fault(shorten(f"error: {_system(error, place)}"), BAD_INPUT if error.errno in _STAYS else RETRY)
        case MemoryError():
            return Fault("error: out of memory: this host has too little", RETRY)
        case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
            what = str(error).partition("RESOURCE_EXHAUSTED:")[2].strip().split("\n")[0]
            return Fault(f"error: out of memory on a device ({what}); a smaller batch_size needs less", RETRY)
    return None


def _system(error: OSError, place: str) -> str:
    """`FILE: what is wrong`."""
    what = " ".join((error.strerror or str(error) or type(error).__name__).split())
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = " → ".join(files) or (place if error.errno else "")  # what we raise ourselves says it
    return f"{where}: {what}" if where else what


def is_local(name: str) -> bool:
    """Whether a path means what it says: gs:// and the like, ~ and $NAME would become folders of those names."""
    return not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|~|\$", name)


def is_plain(text: str) -> bool:
    """Whether a text can be a path that somebody means: nothing unseen, and nothing that UTF-8 lacks."""
    return text == text.strip() and not any(unicodedata.category(each) in ("Cc", "Cs") for each in text)


@contextlib.contextmanager
def naming(source: object) -> Iterator[None]:
    """Put a field, a file or a part of one in front of the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


@contextlib.contextmanager
def explained(place: str = "", speaks: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Leave the program with one line and a status for every error that can be explained; `place`: see `explain`.

    `speaks`: whether this process is the one to tell of what all of them meet.
    """
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there may be something to clean up
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        fault = explain(error, place)
        if fault is None:
            raise
        leave(*(fault if speaks() else ("", fault.status)))


def report(dst: str, convert: Callable[[], str]) -> None:
    """Print what a converter to `dst` says it did, or leave with one line and a status."""
    with explained(dst):
        try:
            print(convert())
        except ValueError as error:
            raise ValueError(" ".join(str(error).split())) from error  # libraries' own have several lines
        except KeyboardInterrupt:
            leave(f"error: interrupted; nothing half-written is left in {dst}", 128 + signal.SIGINT)


def _interrupted(*_: object) -> None:
    """End at once: an exception raised within a callback of the garbage collector's would be told, and forgotten."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


def tell_interrupts() -> None:
    """Ctrl-C where nothing catches it yet, as during imports, ends the program with one line and status 130 as well."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        fault = explain(error) if isinstance(error, KeyboardInterrupt) else None
        if fault is None:
            shown(kind, error, trace)
        else:
            leave(*fault)

    shown, sys.excepthook = sys.excepthook, hook


class Arguments(argparse.ArgumentParser):
    """A command line whose mistakes are one line, as everything else's are; flags are written out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (--help lists what there is)")


def refuse(message: str) -> NoReturn:
    """Exit for bad input."""
    leave(shorten(f"error: {message}"), BAD_INPUT)


def leave(message: str, status: int) -> NoReturn:
    """Exit, with a line on stderr."""
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.exit(status)
