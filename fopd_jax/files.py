"""Files that appear under their name whole, or not at all: written beside it, then renamed.

Nothing else in this package renames what it writes. What a process that is killed had begun stays as `.NAME.*.tmp`.
"""

import contextlib
import itertools
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from fopd_jax.exits import is_local, is_plain
from fopd_jax.reading import is_taken, real_path


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False, private: bool = False) -> Iterator[Path]:
    """A name to write a file under, which becomes `path` when the block ends; if it fails, `path` stays as it was.

    No two writers get the same name. The file has the permissions of any new one, whatever wrote it. `durable`: it
    takes its name once its content is on the disk, so that not even a machine that stops leaves a part under it.
    `private`: at no time can anybody but its owner read it.

    Raises:
      OSError: the folder of `path` is missing or cannot be written, or `path` is a folder.
    """
    temporary = _beside(path)
    with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600 if private else 0o666)) as made:
        mode = stat.S_IMODE(os.fstat(made.fileno()).st_mode)
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private
        if durable:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` when the block ends; if it fails, nothing of it remains.

    Raises:
      OSError: as `replacing`, or `path` is a file or a folder that is not empty.
    """
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as it is."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_private(path: Path, text: str) -> None:
    """Write UTF-8 text that its owner alone can read."""
    with replacing(path, private=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, its keys sorted."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_png(path: Path, picture: Image.Image, metadata: Mapping[str, str] | None = None) -> None:
    """Write a picture; metadata become text chunks.

    Raises:
      OSError: the picture's mode is none that PNG has.
    """
    chunks = PngInfo()
    for name, text in (metadata or {}).items():
        chunks.add_itxt(name, text)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as safetensors, each in its own dtype; equal arguments give equal bytes."""
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        if metadata:
            _sort_metadata(temporary)


def check_finite(what: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Numbers before output: what is written for people or for further training is all finite.

    Raises:
      FloatingPointError: it is not; names the first array and how many of its numbers.
    """
    for name, array in arrays.items():
        wrong = array.size - int(np.isfinite(array).sum())
        if wrong:
            raise FloatingPointError(f"{what}: {name}: {wrong} of {array.size} numbers are not finite; not written")


def _sort_metadata(path: Path) -> None:
    """Order a file's metadata by name, in place: safetensors itself writes it in another order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


# ---- before anything is written


def set_aside(path: Path) -> Path:
    """Rename what is damaged to `NAME.damaged`, so that nothing written in its place removes it; the new path."""
    return path.rename(free_name(path.with_name(f"{path.name}.damaged")))


def free_name(path: Path, between: str = "") -> Path:
    """The path, or where something is there already, with a number behind it."""
    names = itertools.chain([path.name], (f"{path.name}{between}{count}" for count in itertools.count(2)))
    return next(free for name in names if not is_taken(free := path.with_name(name)))


def local_path(field: str, name: str) -> Path:
    """A path as it was given on a command line.

    Raises:
      ValueError: it is empty, not local or holds what nobody sees; begins with `field`.
    """
    if not name or not is_local(name):
        raise ValueError(f"{field}: found {name!r}, expected a path on this machine, written out")
    if not is_plain(name):
        raise ValueError(f"{field}: found {name!r}, expected no control characters, and no blanks at its ends")
    return Path(name)


def local_file(field: str, name: str) -> Path:
    """A file to be written, as it was given on a command line; its folder is there.

    Raises:
      ValueError: as `local_path`, it is taken by something else, or its folder is none that can be written.
    """
    path = local_path(field, name)
    if is_taken(path) and not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise ValueError(f"{field}: {path} is {what}, expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{field}: {path.parent} is no folder")
    check_writable(path.absolute().parent, field)
    return path


def check_apart(src: Path, dst: Path, within: Collection[str] = ()) -> None:
    """Whether what is written would not replace what is read, however either is spelled.

    `within`: files of a folder that stand for it where `src` or `dst` is one.

    Raises:
      ValueError: they are the same; begins with `dst`.
    """
    sources, targets = ({real_path(path), *(real_path(path / name) for name in within)} for path in (src, dst))
    if sources & targets:
        raise ValueError(f"dst: {dst} is the source itself; choose another")


def check_writable(folder: Path, field: str) -> Path:
    """The folder, or the nearest above it that is there; a file without a name is made there, and is gone again.

    Raises:
      ValueError: it is no folder, or nothing can be written there; begins with `field`.
    """
    there = folder
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_symlink() or path.exists())
        if there.is_dir():
            with tempfile.TemporaryFile(dir=there):
                return there
    except OSError as error:
        raise ValueError(f"{field}: {there} cannot be written ({error.strerror})") from error
    raise ValueError(f"{field}: {there} is {'a link to nothing' if not there.exists() else 'no folder'}")
