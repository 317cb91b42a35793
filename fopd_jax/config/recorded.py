"""The configs of a run as its workdir holds them: whole, one for each time that it was started."""

from pathlib import Path
from typing import Any

from fopd_jax.config.parse import unflatten
from fopd_jax.config.stages import StageConfig
from fopd_jax.reading import is_taken, parse_json, read_regular

RECORD_FILE = "run.json"


def read_starts(path: Path) -> list[dict[str, Any]]:
    """What a record says of each start, the first one first; nothing where there is no record.

    Raises:
      ValueError: the file is damaged; names it.
      OSError: it cannot be read, or is none.
    """
    if not is_taken(path):
        return []
    try:
        starts = parse_json(read_regular(path))["starts"]
        if isinstance(starts, list) and all(isinstance(each, dict) for each in starts):
            return starts
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: damaged, expected the starts of a run as JSON")


def recorded_config(path: Path) -> StageConfig:
    """The config of the last start, neither checked nor frozen.

    Raises:
      ValueError: there is none, or it has fields that no version knows; names the file.
    """
    try:
        starts = read_starts(path)
    except (OSError, ValueError) as error:
        problem = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise ValueError(f"{problem}; give --config once") from error
    if not starts:
        raise ValueError(f"{path}: no such file, which every run writes into its --workdir; give --config")
    try:
        return unflatten(starts[-1]["config"])
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no config of this version ({error}); give --config") from error
