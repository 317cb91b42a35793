"""Whole or damaged: a manifest with the SHA-256 of every file of a checkpoint, in place before the checkpoint is."""

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orbax.checkpoint as ocp

MANIFEST_FILE = "manifest.json"
Entry = Mapping[str, int | str]  # of one file: bytes, sha256
_THREADS = min(8, os.cpu_count() or 1)  # hashing releases the interpreter's lock
_TEMPORARY = ocp.path.atomicity.TMP_DIR_SUFFIX


class SealedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder, given its manifest after the last file was written and before the final rename.

    Orbax finalizes on the primary process alone, when every process has written its part. A kill leaves either a
    temporary folder, which is no checkpoint, or a checkpoint with its manifest.
    """

    async def finalize(self) -> None:
        final = self._final_path
        if _TEMPORARY in final.parent.name:  # an item inside a checkpoint: the manifest of the whole covers it
            await super().finalize()
            return
        self._final_path = final.with_name(f"{final.name}{_TEMPORARY}-unsealed")
        await asyncio.to_thread(shutil.rmtree, self._final_path, ignore_errors=True)  # of a save that failed here
        await super().finalize()
        unsealed, self._final_path = Path(self._final_path), final
        await asyncio.to_thread(write_manifest, unsealed)
        unsealed.rename(final)


def write_manifest(folder: Path) -> None:
    """Hash all files of a folder into its manifest, which also holds its own digest."""
    (folder / MANIFEST_FILE).write_text(_render(_describe(folder, _files(folder))), encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """The first thing by which a folder differs from its manifest, as `path: what is wrong`; None where nothing does.

    Reads every byte: truncated, altered, missing and additional files are found, and damage to the manifest itself.
    """
    try:
        expected = _parse((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if differing := expected.keys() ^ _files(folder):
            name = min(differing)
            return f"{folder / name}: {'missing' if name in expected else 'no part of this checkpoint'}"
        found = _describe(folder, expected)
    except (ValueError, KeyError, TypeError):
        return f"{folder / MANIFEST_FILE}: does not match its own digest"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return next(
        (
            _difference(folder / name, found[name], expected[name])
            for name in sorted(expected)
            if found[name] != expected[name]
        ),
        None,
    )


def fingerprint(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes in bytes and times of all files: changes with whatever is written through the file system."""
    stats = {str(path): path.stat() for path in sorted(folder.rglob("*"))}
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())


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
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _render(files: Mapping[str, Entry]) -> str:
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=2, sort_keys=True) + "\n"


def _parse(text: str) -> dict[str, Entry]:
    files = json.loads(text)["files"]
    if text != _render(files):
        raise ValueError("not as it was written")
    return files
