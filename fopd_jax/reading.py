"""Files as anybody may have left them: what is in the way, what is no file, what is no JSON. Imports take no time."""

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any


def read_regular(path: Path) -> bytes:
    """The content of a file; of pipes and devices, which may never end, none is read.

    Raises:
      OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return file.read()


def open_regular(path: Path) -> BufferedReader:
    """A file to read; pipes and devices are not opened, which may wait for ever.

    Raises:
      OSError: as `read_regular`.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder the system says so itself
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, not a regular file", str(path))
    return path.open("rb")


def parse_json(text: bytes | str) -> Any:
    """JSON as anybody may have left it.

    Raises:
      ValueError: it is none, or nests deeper than Python reads.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def is_taken(path: Path) -> bool:
    """Whether anything has that name, were it a link to nothing: `exists` and `is_file` pass over what is in the way.

    Raises:
      OSError: nobody can look.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def real_path(path: Path) -> Path:
    """Absolute and without links, as far as they lead anywhere: `Path.resolve` fails where they go round."""
    return Path(os.path.realpath(path))
