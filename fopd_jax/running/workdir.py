"""A workdir belongs to one config; some fields may change between runs in it.

Until something is saved there it may still become another's: a run that failed before that blocks no folder.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fopd_jax.config.identity import Fields, fields_hash, left_out, normalise
from fopd_jax.config.recorded import RECORD_FILE
from fopd_jax.files import check_writable, free_name, write_json
from fopd_jax.parallel.distributed import barrier, is_main, warn
from fopd_jax.reading import is_taken, parse_json, read_regular
from fopd_jax.running import journal, lock
from fopd_jax.running.checkpoints import FOLDER

CONFIG_FILE = "config.json"
_CHECKPOINT = re.compile(r"\d+(\.damaged\d*)?")
_REPORTED = ("results.json", "samples.png")
_KINDS = ((Path.is_dir, "a folder"), (Path.is_file, "a file"), (Path.exists, "neither a file nor a folder"))
_FOLDERS = (FOLDER, journal.FOLDER, "tensorboard")
_FILES = (".json", ".jsonl", ".md", ".png", ".safetensors", ".txt")
_OURS = re.compile(r"\..+\.tmp|failed_\w+|compiled")
"""What may stay when a folder changes hands, beside its lock and its record."""
_EVALUATES = re.compile(r"eval\.|rewards(\.|$)|tasks\.[^.]+\.rewards(\.|$)")
"""Fields that say how a run is evaluated."""


def check(workdir: Path, identity: Fields) -> None:
    """Make sure that a workdir is new, empty, this identity's own, or holds nothing that a run has saved.

    Writes nothing. Process 0 looks, the others wait.

    Raises:
      ValueError: it belongs to another config (names every differing field with both values), or to something else.
    """
    if is_main():
        _check(workdir, identity)
    barrier("the workdir is checked")


def _check(workdir: Path, here: Fields) -> None:
    path = workdir / CONFIG_FILE
    if is_taken(path):
        _check_places(workdir)
        there = normalise(_read(path))
        differing = _differing(there, here)
        if differing and has_saved(workdir):
            raise ValueError(
                f"{workdir} belongs to another config; choose another --workdir. "
                "Only the fields of `run` may change; these differ:\n" + _differences(there, here, differing)
            )
    elif workdir.exists() and (not workdir.is_dir() or not all(map(_stays, workdir.iterdir()))):
        raise ValueError(f"{workdir} exists and is no run's folder (no {CONFIG_FILE}); choose another --workdir")


def _check_places(workdir: Path) -> None:
    """What stands in the way of a file is found at the beginning, not where it is written, at the end.

    Nor does a run begin again where its checkpoints are on a disk that is not mounted, or update what it cannot save.

    Raises:
      ValueError: something else has the name of a file or a folder, or nothing can be written there.
    """
    for each in sorted(workdir.iterdir()):
        folder = each.name in _FOLDERS
        if folder and each.is_dir():
            check_writable(each, "--workdir")
        if (folder and not each.is_dir()) or (each.suffix in _FILES and not each.is_file()):
            what = next((words for holds, words in _KINDS if holds(each)), "a link to nothing")
            expected = "a folder that it fills" if folder else "a file that it writes"
            raise ValueError(
                f"{each}: found {what}, where a run has {expected}; move it away, or put back what was there"
            )


def _differing(there: Fields, here: Fields) -> list[str]:
    return [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]


def _differences(there: Fields, here: Fields, names: Sequence[str]) -> str:
    return "\n".join(f"  {name}: {_value(there, name)} there, {_value(here, name)} here" for name in names)


def check_evaluates(workdir: Path, identity: Fields) -> None:
    """Make sure that a workdir is a run's of this identity, but for how it is evaluated. Process 0 looks.

    Raises:
      ValueError: it is none, or another config's; names every differing field with both values.
    """
    if is_main():
        path = workdir / CONFIG_FILE
        if not path.is_file():
            raise ValueError(f"--workdir: {workdir} is no run's folder (no {CONFIG_FILE})")
        there = normalise(_read(path))
        differing = [name for name in _differing(there, identity) if not _EVALUATES.match(name)]
        if differing:
            raise ValueError(
                f"{workdir} belongs to another config; only the fields of `run` and `eval` and rewards may be others "
                "here; these differ:\n" + _differences(there, identity, differing)
            )
    barrier("the workdir is checked")


def has_saved(workdir: Path) -> bool:
    """Whether a run has left a checkpoint there, if a damaged one, or its results."""
    checkpoints = [each for each in (workdir / FOLDER).glob("*") if _CHECKPOINT.fullmatch(each.name)]
    return bool(checkpoints) or any((workdir / name).exists() for name in _REPORTED)


def _value(fields: Fields, name: str) -> str:
    return repr(fields.get(name, left_out(fields["stage"], name)))


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = parse_json(read_regular(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --workdir") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no run's config; choose another --workdir")
    try:
        normalise(fields)
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it holds no config's values; choose another --workdir") from error
    return fields


def claim(workdir: Path, identity: Fields) -> None:
    """Make a checked workdir this identity's own. Process 0 does, the others wait.

    What another config's run left that saved nothing is set aside, with a line.

    Raises:
      ValueError: another run has claimed it since, or lives in it.
    """
    if is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        _check(workdir, identity)
        path = workdir / CONFIG_FILE
        if path.exists() and _differing(normalise(_read(path)), identity):
            with lock.holding(workdir):
                _set_aside(workdir)
        if not path.exists():
            write_json(path, identity)
    barrier("the workdir is claimed")


def _set_aside(workdir: Path) -> None:
    """Move what a run left into a folder named by its config's hash."""
    aside = free_name(workdir / f"failed_{claimed_hash(workdir)}", "_")
    aside.mkdir()
    left = [each for each in workdir.iterdir() if not _stays(each)]
    for each in sorted(left, key=lambda each: each.name == CONFIG_FILE):  # last: a kill in between repeats the rest
        each.rename(aside / each.name)
    warn(f"{workdir}: the run of another config that was here saved nothing; what it left is in {aside.name}/")


def _stays(path: Path) -> bool:
    return path.name in (lock.FILE, RECORD_FILE) or bool(_OURS.fullmatch(path.name))


def claimed_hash(workdir: Path) -> str:
    """The hash of what a claimed workdir holds, in whatever version's form: its checkpoints were written under it."""
    return fields_hash(_read(workdir / CONFIG_FILE))
