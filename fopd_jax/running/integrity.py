"""Whole or damaged: manifests with the SHA-256 of every file of a checkpoint, in place before the checkpoint is.

Each process hashes what it wrote into a manifest of its own, `manifest_<process>.json`; `manifest.json` holds the
hashes of those and of all other files. Checkpoints of earlier versions have the latter alone, for all files.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fopd_jax.reading import open_regular, parse_json, read_regular

MANIFEST_FILE = "manifest.json"
_PART = re.compile(r"manifest_\d+\.json")
Entry = Mapping[str, int | str]  # of one file: bytes, sha256
_THREADS = min(8, os.cpu_count() or 1)  # hashing releases the interpreter's lock


def write_part(folder: Path, written: Path, process: int) -> None:
    """Hash what one process wrote, all files under `written`, into its own manifest in `folder`."""
    names = {path.relative_to(folder).as_posix() for path in written.rglob("*") if not path.is_dir()}
    (folder / f"manifest_{process}.json").write_text(_render(_describe(folder, names)), encoding="utf-8")


def write_manifest(folder: Path) -> None:
    """Hash all files of a folder that are in no process's manifest, and those, into one that holds its own digest."""
    files = _files(folder)
    rest = files - _in_parts(folder, files).keys()
    (folder / MANIFEST_FILE).write_text(_render(_describe(folder, rest)), encoding="utf-8")


def seal(folder: Path, final: Path) -> None:
    """Give a folder its manifest, then its name: a kill leaves no checkpoint, or one with its manifest."""
    write_manifest(folder)
    folder.rename(final)


def find_damage(folder: Path, process: int = 0, count: int = 1) -> str | None:
    """The first thing by which a folder differs from its manifests, as `path: what is wrong`; None where nothing does.

    Truncated, altered, missing and additional files are found, and damage to the manifests themselves. Every byte is
    read by one of `count` processes: this one reads its share, about as many bytes as any other.
    """
    try:
        expected = _read(folder / MANIFEST_FILE)
        expected |= _in_parts(folder, expected)
        if differing := expected.keys() ^ _files(folder):
            name = min(differing)
            return f"{folder / name}: {'missing' if name in expected else 'no part of this checkpoint'}"
        mine = share_of(expected, process, count)
        found = _describe(folder, mine)
    except Broken as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return next(
        (_difference(folder / name, found[name], expected[name]) for name in mine if found[name] != expected[name]),
        None,
    )


def share_of(files: Mapping[str, Entry], process: int, count: int) -> list[str]:
    """Names of the files that one of `count` processes reads: the largest first, each to who has least so far."""
    loads, shares = [0] * count, [[] for _ in range(count)]
    for name in sorted(files, key=lambda name: (-int(files[name]["bytes"]), name)):
        least = loads.index(min(loads))
        loads[least] += int(files[name]["bytes"])
        shares[least].append(name)
    return sorted(shares[process])


def fingerprint(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes in bytes and times of all files: changes with whatever is written through the file system."""
    stats = {str(path): path.lstat() for path in sorted(folder.rglob("*"))}
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())


class Broken(Exception):
    """A manifest that is not as it was written."""


def _in_parts(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """The entries of the processes' manifests among these files."""
    parts = (_read(folder / name) for name in sorted(names) if _PART.fullmatch(name))
    return {name: entry for part in parts for name, entry in part.items()}


def _difference(path: Path, found: Entry, expected: Entry) -> str:
    if found["bytes"] != expected["bytes"]:
        return f"{path}: found {found['bytes']} bytes, expected {expected['bytes']}"
    return f"{path}: not the bytes that were written"


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST_FILE}


def _describe(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    ordered = sorted(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(ordered, threads.map(lambda name: _entry(folder / name), ordered), strict=True))


def _entry(path: Path) -> Entry:
    with open_regular(path) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _render(files: Mapping[str, Entry]) -> str:
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=2, sort_keys=True) + "\n"


def _read(path: Path) -> dict[str, Entry]:
    """The entries of a manifest.

    Raises:
      Broken: it does not match its own digest.
      OSError: it cannot be read.
    """
    try:
        text = read_regular(path).decode()
        files: dict[str, Entry] = {name: dict(entry) for name, entry in parse_json(text)["files"].items()}
        if text != _render(files):
            raise ValueError("not as it was written")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Broken(f"{path}: does not match its own digest") from error
    return files
