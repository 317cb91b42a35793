"""The configs of a run as its workdir holds them: whole, one for each time that it was started."""

import json
from pathlib import Path
from typing import Any

from fopd_jax.config.parse import unflatten
from fopd_jax.config.schema import OPD, FlowMatching
from fopd_jax.files import read_regular

RECORD_FILE = "run.json"


def read_starts(path: Path) -> list[dict[str, Any]]:
    """What a record says of each start, the first one first; nothing where there is no record.

    Raises:
      ValueError: the file is damaged; names it.
    """
    if not path.is_file():
        return []
    try:
        starts = json.loads(read_regular(path).decode())["starts"]
        if isinstance(starts, list) and all(isinstance(each, dict) for each in starts):
            return starts
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: damaged, expected the starts of a run as JSON; remove it, and give --config once")


def recorded_config(path: Path) -> OPD | FlowMatching:
    """The config of the last start, neither checked nor frozen.

    Raises:
      ValueError: there is none, or it has fields that no version knows; names the file.
    """
    starts = read_starts(path)
    if not starts:
        raise ValueError(f"{path}: no such file, which every run writes into its --workdir; give --config")
    try:
        return unflatten(starts[-1]["config"])
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: no config of this version ({error}); give --config") from error
