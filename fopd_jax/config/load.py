"""Config files: Python whose `get_config()`, or `get_config(variant)`, returns a stage's settings."""

import runpy
import traceback
from pathlib import Path

from fopd_jax.config.parse import STAGES
from fopd_jax.config.schema import OPD, FlowMatching


def load_config(path: str | Path, variant: str = "") -> OPD | FlowMatching:
    """What the file's `get_config` returns, neither checked nor frozen.

    Raises:
      ValueError: there is no such file, it is no Python, raises, or returns something else; names it and the line.
    """
    if not Path(path).is_file():
        raise ValueError(f"config: {path}: no such file")
    try:
        make = runpy.run_path(str(path)).get("get_config")
        config = make(*([variant] if variant else [])) if callable(make) else make
    except Exception as error:  # whatever a user's own code may raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path}{_line(error, str(path))}: {kind}{' '.join(str(error).split())}") from error
    if not callable(make):
        raise ValueError(f"{path}: found no function get_config")
    if not isinstance(config, tuple(STAGES.values())):
        kinds = " or ".join(kind.__name__ for kind in STAGES.values())
        raise ValueError(
            f"{path}: get_config returned {type(config).__name__}, expected {kinds} of fopd_jax.config.schema"
        )
    return config


def _line(error: Exception, path: str) -> str:
    """Where in the file it came up, if it did there."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""
