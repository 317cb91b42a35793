"""Published checkpoints on disk: safetensors files, single or sharded, read one tensor at a time.

The safetensors library maps whole files into memory, which counts as resident where memory is limited, and accepts
duplicate names and gaps. This reader holds one tensor at a time and refuses whatever is not exactly what the header and
the index say. Format: 8 bytes of header length, a JSON header, the tensors' bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fopd_jax.console import Progress
from fopd_jax.files import replacing
from fopd_jax.interop.files.tables import Shape
from fopd_jax.reading import read_regular

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WIDTHS = {  # bytes an element, of what a file may hold besides
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
} | {name: dtype.itemsize for name, dtype in DTYPES.items()}  # fmt: skip
_LONGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor's place: its file, and where its bytes begin and end there; `kind` is the format's name of a dtype."""

    file: Path
    kind: str
    shape: Shape
    begin: int
    end: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.kind]


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """The tensors of one checkpoint, checked against their files' headers and sizes but not yet read."""

    files: tuple[Path, ...]
    entries: Mapping[str, Entry]

    @property
    def total_bytes(self) -> int:
        return sum(entry.end - entry.begin for entry in self.entries.values())

    def select(self, wanted: Callable[[str], bool]) -> "TensorFiles":
        """The wanted tensors alone.

        Raises:
          ValueError: one of them is not of float32, float16 or bfloat16; names it.
        """
        entries = {name: entry for name, entry in self.entries.items() if wanted(name)}
        for name, entry in entries.items():
            if entry.kind not in DTYPES:
                expected = ", ".join(DTYPES)
                raise ValueError(
                    f"tensor {name!r} in {entry.file.name}: found dtype {entry.kind}, expected one of {expected}"
                )
        return dataclasses.replace(self, entries=entries)

    def stream(self, progress: Progress = lambda count: None) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor in the order of the files; each array is its own, so that it may be kept.

        Raises:
          ValueError: a tensor holds NaN or infinity, or its file became shorter; names the tensor.
        """
        for file in self.files:
            mine = {name: entry for name, entry in self.entries.items() if entry.file == file}
            with _open(file) as source:
                for name, entry in sorted(mine.items(), key=lambda item: item[1].begin):
                    raw = np.empty(entry.end - entry.begin, np.uint8)
                    source.seek(entry.begin)
                    _read_exactly(source, raw.data, name, file)
                    tensor = raw.view(entry.dtype).reshape(entry.shape)
                    check_finite(name, tensor, file)
                    yield name, tensor
                    progress(raw.nbytes)
                    del raw, tensor  # so that of those that nobody keeps, one alone is in memory beside the next


def open_tensor_files(folder: Path, stem: str) -> TensorFiles:
    """`folder/stem.safetensors`, or the shards that its index lists; where neither is there, those of the one variant.

    A variant, as fp16, stands in diffusers' names before or after "safetensors.index".

    Raises:
      ValueError: no such file, several variants, a damaged header, a truncated or overlong file, or a tensor that is
        missing from its shard, in two of them or not in the index.
    """
    single, index = _weights(folder, stem)
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder}: found both {single.name} and {index.name}, expected one of them")
    if single.is_file():
        return open_tensor_file(single)
    if not index.is_file():
        raise ValueError(f"{folder}: found neither {single.name} nor {index.name}{_instead(folder, stem)}")
    return _open_shards(folder, index)


def _weights(folder: Path, stem: str) -> tuple[Path, Path]:
    """The names of a network's single file and of its index: a variant's where only that is there."""
    plain = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if any(path.is_file() for path in plain):
        return plain
    name = re.compile(re.escape(stem) + r"\.(?:(\w+)\.safetensors(?:\.index\.json)?|safetensors\.index\.(\w+)\.json)")
    found = {path.name: match[1] or match[2] for path in folder.glob("*") if (match := name.fullmatch(path.name))}
    if len(variants := sorted(set(found.values()))) > 1:
        raise ValueError(f"{folder}: found variants {', '.join(variants)} of {plain[0].name}, expected one of them")
    index = next((each for each in sorted(found) if each.endswith(".json")), plain[1].name)
    return next((folder / each for each in found if not each.endswith(".json")), plain[0]), folder / index


def _instead(folder: Path, stem: str) -> str:
    """What stands there that is not read."""
    if pickled := sorted(path.name for path in folder.glob(f"*{stem}*.bin")):
        return f" (found {pickled[0]}, a pickle, which is not read)"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    return f" (found {others[0]}, which is neither)" if others else ""


_MAGIC = {
    b"version https://git-lfs.github.com/spec/": "a git-lfs pointer; fetch the file itself with `git lfs pull`",
    b"PK\x03\x04": "a ZIP archive, or PyTorch's pickle, which is not read; expected safetensors",
    b"\x80\x02": "a pickle, which is not read; expected safetensors",
    b"\x80\x04": "a pickle, which is not read; expected safetensors",
    b"\x80\x05": "a pickle, which is not read; expected safetensors",
    b"GGUF": "GGUF, which is not read; expected safetensors",
    b"\x93NUMPY": "a NumPy array, which is not read; expected safetensors",
    b"\x1f\x8b": "a gzip archive; expected safetensors",
    b"<": "a web page, perhaps of a download that needs a login; expected safetensors",
    b"{": "JSON; expected safetensors",
}


def other_format(path: Path) -> str:
    """What a file looks like that is no safetensors file, with what was expected; empty: nothing that is known."""
    with path.open("rb") as file:
        first = file.read(64)
    return next((f"found {what}" for magic, what in _MAGIC.items() if first.startswith(magic)), "")


def open_tensor_file(path: Path) -> TensorFiles:
    """One safetensors file; errors as `open_tensor_files`."""
    return TensorFiles((path,), _read_header(path))


def _open_shards(folder: Path, index: Path) -> TensorFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: found no weight_map of tensor names to file names")
    entries: dict[str, Entry] = {}
    files = tuple(folder / name for name in sorted(set(weight_map.values())))
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: missing, but {index.name} lists it")
        for name, entry in _read_header(file).items():
            if weight_map.get(name) != file.name:
                place = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise ValueError(f"tensor {name!r}: found in {file.name}, expected {place} by {index.name}")
            entries[name] = entry
    for name, file_name in weight_map.items():
        if name not in entries:
            raise ValueError(f"tensor {name!r}: missing from {file_name}, where {index.name} puts it")
    return TensorFiles(files, entries)


def _read_header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            if what := other_format(path):
                raise ValueError(f"{path}: {what}")
            raise ValueError(f"{path}: truncated or no safetensors file ({size} bytes, header of {length})")
        header = _parse(file.read(length), path)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, fields: Any, start: int) -> Entry:
    try:
        kind, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged header at tensor {name!r} ({error!r})") from error
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError(f"{path}: damaged header at tensor {name!r} (shape {shape}, bytes {begin} to {end})")
    if kind not in _WIDTHS:
        raise ValueError(f"tensor {name!r} in {path.name}: found dtype {kind}, which is not known")
    if end - begin != math.prod(shape) * _WIDTHS[kind]:
        raise ValueError(f"tensor {name!r} in {path.name}: {end - begin} bytes do not hold shape {shape} of {kind}")
    return Entry(path, kind, shape, start + begin, start + end)


def _check_layout(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors must follow each other without gap or overlap to the end of the file."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise ValueError(f"tensor {name!r} in {path.name}: begins at byte {entry.begin}, expected {at}")
        at = entry.end
        if at > size:
            raise ValueError(f"tensor {name!r} in {path.name}: file truncated, {size} bytes, expected at least {at}")
    if at != size:
        raise ValueError(f"{path}: found {size} bytes, expected {at}")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[FileIO]:
    """A file without a buffer, for reading; errors while reading name it, as the system's do not."""
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _read_exactly(source: FileIO, into: memoryview, name: str, path: Path) -> None:
    done = 0
    while done < len(into):
        count = source.readinto(into[done:])
        if not count:
            raise ValueError(f"tensor {name!r} in {path.name}: file truncated while reading")
        done += count


def check_finite(name: str, tensor: np.ndarray, path: Path) -> None:
    """Refuse NaN and infinity. Sixteen-bit floats are tested by their exponent bits, which is three times as fast.

    Raises:
      ValueError: names the tensor, its file and how many values are wrong.
    """
    if tensor.dtype.itemsize == 2 and tensor.size:
        exponent = 0x7F80 if tensor.dtype == ml_dtypes.bfloat16 else 0x7C00
        if int((tensor.view(np.uint16) & 0x7FFF).max()) < exponent:
            return
    wrong = tensor.size - int(np.isfinite(tensor).sum())
    if wrong:
        raise ValueError(
            f"tensor {name!r} in {path.name}: found {wrong} values that are NaN or infinite, expected none"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: the file is missing, no JSON, no object, or has a key twice; names the file.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    return _parse(read_regular(path), path)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"key {twice!r} appears twice")
        return fields

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def hash_file(path: Path, progress: Progress = lambda count: None) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 22))
    with _open(path) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            progress(count)
    return digest.hexdigest()


def write_tensor_file(
    path: Path, shapes: Mapping[str, Shape], dtypes: Mapping[str, Any], tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Write tensors as they come, in the order of `shapes`.

    The library's own writer would need all of them in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtypes[name]).itemsize
        header[name] = {"dtype": _NAMES[np.dtype(dtypes[name])], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (found, tensor) in zip(shapes, tensors, strict=True):
            assert found == name, f"{found} comes before {name}"
            file.write(np.ascontiguousarray(tensor).view(np.uint8).data)
