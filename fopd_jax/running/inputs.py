"""`inputs.json` of a workdir: hashes of the files that a run depends on, so that it goes on with what it began with.

A file is hashed when a run first meets it, and again only where its size or times differ from those that are noted.
Of a converted folder the hashes of its sources count, which its manifest holds: a base of many gigabytes is not read.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fopd_jax.files import write_json
from fopd_jax.interop.files.converted import is_converted, parse_manifest
from fopd_jax.interop.files.tensor_files import hash_file, read_json
from fopd_jax.parallel.distributed import barrier, is_main
from fopd_jax.reading import is_taken

INPUTS_FILE = "inputs.json"
Noted = dict[str, dict[str, str]]
"""By the config's field: `path`, `sha256`, and `stat`, a hash of sizes and times."""
_READ = {".safetensors", ".json", ".jsonl", ".txt"}
_IMAGES = {".png", ".jpg", ".jpeg", ".webp"}  # of these name and size count
_WAYS_OUT = "put back what was there, or remove it to go on with the input files as they are"
_SHOWN = 12  # digits of a hash in a message


def check(workdir: Path, files: Mapping[str, Path], *, begun: bool = True) -> Noted:
    """What the files hold now, by field; those that are not there are left out. Process 0 looks, the others wait.

    `begun`: whether anything was trained in the workdir, so that they have to hold what they did then.

    Raises:
      ValueError: they do not; names every such field and file.
    """
    found: Noted = {}
    if is_main():
        there = _noted(workdir / INPUTS_FILE)
        found = _look(files, there)
        if begun:
            _compare(workdir, there, found)
    barrier("the input files are checked")
    return found


def keep(workdir: Path, found: Noted) -> None:
    """Note in a claimed workdir what was found; process 0 does."""
    path = workdir / INPUTS_FILE
    if is_main() and found != _noted(path):
        write_json(path, found)


def _noted(path: Path) -> Noted:
    """Nothing in workdirs of earlier versions.

    Raises:
      ValueError: the file is damaged; names it.
    """
    try:
        noted = read_json(path) if is_taken(path) else {}
    except ValueError as error:
        raise ValueError(f"{error}; {_WAYS_OUT}") from error
    for field, each in noted.items():
        if not isinstance(each, dict) or not all(isinstance(each.get(key), str) for key in ("path", "sha256", "stat")):
            raise ValueError(f"{path}: {field}: found {each!r}, expected texts path, sha256 and stat; {_WAYS_OUT}")
    return noted


def _compare(workdir: Path, there: Noted, here: Noted) -> None:
    changed = [
        f"{field}: {found['path']} holds other content than the run in {workdir} began with "
        f"(SHA-256 found {found['sha256'][:_SHOWN]}…, expected {there[field]['sha256'][:_SHOWN]}…)"
        for field, found in here.items()
        if field in there and there[field]["sha256"] != found["sha256"]
    ]
    if changed:
        raise ValueError(f"{'; '.join(changed)}; put back what was there, or choose another --workdir")


def _look(files: Mapping[str, Path], there: Noted) -> Noted:
    by_path: dict[Path, tuple[str, str]] = {}
    found: Noted = {}
    for field, path in files.items():
        if not path.exists():  # whoever needs it says so
            continue
        if path not in by_path:
            by_path[path] = _hash_of(path, there.get(field, {}))
        digest, stat = by_path[path]
        found[field] = {"path": str(path), "sha256": digest, "stat": stat}
    return found


def _hash_of(path: Path, noted: Mapping[str, str]) -> tuple[str, str]:
    """SHA-256 of a file, of the parts of a folder or of a manifest's sources; and a hash of what tells of a change."""
    if is_converted(path):
        return _manifest_hash(path), ""
    within = [path] if path.is_file() else sorted(path.iterdir())
    parts = [each for each in within if each == path or _is_read(each) or each.suffix.lower() in _IMAGES]
    stats = [each.stat() for each in parts]
    named = [each.relative_to(path).as_posix() for each in parts]
    times = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in zip(named, stats, strict=True)]
    stat = _sha256(json.dumps(times))
    if noted.get("stat") == stat:
        return noted["sha256"], stat
    if path.is_file():
        return hash_file(path), stat
    hashes = [hash_file(each) if _is_read(each) else str(each.stat().st_size) for each in parts]
    return _sha256(json.dumps(list(zip(named, hashes, strict=True)))), stat


def _is_read(path: Path) -> bool:
    return path.suffix.lower() in _READ or ".array_record-" in path.name  # a prompt set's shards


def _manifest_hash(folder: Path) -> str:
    """Of the sources of all its components, and what they were converted to.

    Raises:
      ValueError: as `parse_manifest`.
    """
    manifest = parse_manifest(folder)
    parts = {name: [dict(each.source), each.dtype, dict(each.config)] for name, each in manifest.components.items()}
    return _sha256(json.dumps([manifest.preset, parts], sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
