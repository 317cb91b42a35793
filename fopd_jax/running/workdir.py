"""A workdir belongs to one config; some fields may change between runs in it."""

import json
from pathlib import Path
from typing import Any

from fopd_jax.config.identity import Fields, default_of, fields_hash, normalise
from fopd_jax.files import write_json
from fopd_jax.parallel.distributed import barrier, is_main

CONFIG_FILE = "config.json"


def check(workdir: Path, identity: Fields) -> None:
    """Make sure that a workdir is new, empty or this identity's own. Writes nothing. Process 0 looks, the others wait.

    Raises:
      ValueError: it belongs to another config (names every differing field with both values), or to something else.
    """
    if is_main():
        _check(workdir, identity)
    barrier("the workdir is checked")


def _check(workdir: Path, here: Fields) -> None:
    path = workdir / CONFIG_FILE
    if path.exists():
        there = normalise(_read(path))
        differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
        if differing:
            lines = [f"  {name}: {_value(there, name)} there, {_value(here, name)} here" for name in differing]
            raise ValueError(
                f"{workdir} belongs to another config; choose another --workdir. "
                "Only the fields of `run` may change; these differ:\n" + "\n".join(lines)
            )
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ValueError(f"{workdir} exists and is no run's folder (no {CONFIG_FILE}); choose another --workdir")


def _value(fields: Fields, name: str) -> str:
    return repr(fields.get(name, default_of(fields["stage"], name)))


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --workdir") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no run's config; choose another --workdir")
    try:
        normalise(fields)
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it holds no config's values; choose another --workdir") from error
    return fields


def claim(workdir: Path, identity: Fields) -> None:
    """Make a checked workdir this identity's own. Process 0 does, the others wait."""
    if is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / CONFIG_FILE).exists():
            write_json(workdir / CONFIG_FILE, identity)
    barrier("the workdir is claimed")


def claimed_hash(workdir: Path) -> str:
    """The hash of what a claimed workdir holds, in whatever version's form: its checkpoints were written under it."""
    return fields_hash(_read(workdir / CONFIG_FILE))
