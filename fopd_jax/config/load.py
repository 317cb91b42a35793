"""Config files: Python whose `get_config()`, or `get_config(variant)`, returns a stage's settings; records of runs."""

import dataclasses
import difflib
import inspect
import re
import runpy
import traceback
from pathlib import Path

from fopd_jax.config import learning, schema
from fopd_jax.config.parse import STAGES
from fopd_jax.config.recorded import RECORD_FILE, recorded_config
from fopd_jax.config.stages import StageConfig
from fopd_jax.reading import is_taken


def load_config(path: str | Path, variant: str = "") -> StageConfig:
    """What the file's `get_config` returns, or what a workdir's record holds; neither checked nor frozen.

    Raises:
      ValueError: there is no such file, it is no Python, raises, or returns something else; names it and the line.
    """
    if Path(path).name == RECORD_FILE:
        return recorded_config(Path(path))
    _check_file(str(path))
    make = None
    try:
        make = runpy.run_path(str(path)).get("get_config")
        config = make(*([variant] if variant else [])) if callable(make) else make
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's own code may raise
        place = _line(error, str(path)) or _first_line(make)
        raise ValueError(f"{path}{place}: {_said(error)}") from error
    if not callable(make):
        raise ValueError(f"{path}: found no function get_config")
    if inspect.iscoroutine(config):
        config.close()  # else Python warns of it
    if not isinstance(config, tuple(STAGES.values())):
        kinds = " or ".join(kind.__name__ for kind in STAGES.values())
        raise ValueError(
            f"{path}{_first_line(make)}: get_config returned {type(config).__name__}, "
            f"expected {kinds} of fopd_jax.config.schema and .learning"
        )
    return config


def _check_file(path: str) -> None:
    """
    Raises:
      ValueError: it is no file that Python can run; says what it is.
    """
    file, problem = Path(path), ""
    try:
        if file.is_dir():
            problem = "is a folder, expected a Python file"
        elif not is_taken(file):
            problem = "no such file; configs/ of a clone holds those of the project"
        elif not file.is_file():
            problem = "is no regular file, expected a Python file"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise ValueError(f"config: {path}: {problem}" if path else "config: found '', expected FILE.py[:variant]")


def _said(error: BaseException) -> str:
    """An error in one line, with the field that was meant where one was misspelt."""
    try:
        text = " ".join(str(error).split()) or "without a message"
    except Exception:  # a user's own class
        text = "without a message"
    if misspelt := re.fullmatch(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text):
        kind, name = {**vars(schema), **vars(learning)}.get(misspelt[1]), misspelt[2]
        known = [each.name for each in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        close = difflib.get_close_matches(name, known, 1)
        text += f", did you mean {close[0]!r}?" if close else f", only {', '.join(known)}" if known else ""
    return text if type(error) is ValueError and str(error) else f"{type(error).__name__}: {text}"


def _line(error: BaseException, path: str) -> str:
    """Where in the file it came up, if it did there."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""


def _first_line(make: object) -> str:
    """Where a function begins, if it is one of Python's."""
    code = getattr(make, "__code__", None)
    return f", line {code.co_firstlineno}" if code is not None else ""
