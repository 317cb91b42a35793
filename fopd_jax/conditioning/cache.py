"""Encoded prompts on disk, by content: each distinct prompt is encoded once, whatever run asks for it.

    FOLDER/NAME/SHARD.array_record    records, one a prompt: its context, then its pooled input, in bfloat16
    FOLDER/NAME/SHARD.json            the shard's index: hashes of its prompts, in the order of the records

NAME is a hash of all that an encoding depends on. A shard is written under a temporary name and renamed, then its index
is; what no index lists is not there. No file changes once it has its name, and no two writers share one, so runs and
processes may read and write a folder at once without locks, also on a mounted bucket. A kill costs the shard that it
interrupts. Writers that encode the same prompt at the same time keep it twice.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.files import check_writable, replacing
from fopd_jax.parallel.distributed import warn
from fopd_jax.reading import read_regular

Encode = Callable[[Sequence[str]], Conditioning]
Encoded = Iterable[tuple[Sequence[str], Conditioning]]
"""Batches of prompts and their encodings, row by row."""

STORED = np.dtype(ml_dtypes.bfloat16)
FORMAT = "fopd_jax/conditioning/1"
SHARD_RECORDS = 256  # 0.3 GB of SD3.5's encodings: what a kill may cost, against one index more to read at a start
_THREADS = 32  # a bucket answers one request in 50 ms, and many at once
_OPEN_SHARDS = 256  # file descriptors
_WRITER = "group_size:1,zstd:1"  # a record is read alone; the towers' zero padding is a fifth of it
_READER = "readahead_buffer_size:0,max_parallelism:0"  # for random access, by the library's own advice
_LEFTOVER_S = 86400.0  # no shard takes a day to write


class ConditioningCache:
    """The encodings of one set of text encoders, named by `fingerprint`, under `folder`."""

    def __init__(self, folder: Path, fingerprint: str, shapes: Conditioning) -> None:
        """`shapes`: of one prompt's encoding, `[S, context_dim]` and `[P]`, or None where there is no pooled input."""
        name = _hash(json.dumps([FORMAT, fingerprint, shapes.context, shapes.pooled]))[:32]
        self._root, self._folder, self._shapes = folder, folder / name, shapes
        self._places: dict[str, tuple[str, int]] = {}  # hash of a prompt → shard and record
        self._listed: set[str] = set()  # shards whose index was read
        self._open = functools.lru_cache(_OPEN_SHARDS)(functools.partial(ArrayRecordReader, options=_READER))

    @property
    def folder(self) -> Path:
        """Where the shards are."""
        return self._folder

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The distinct prompts that are not there yet, in their order.

        Indices are read once; where all prompts are in them, no file is touched. Else those that appeared since are.

        Raises:
          ValueError: an index is damaged; names it.
        """
        wanted = {_hash(prompt): prompt for prompt in dict.fromkeys(prompts)}
        if not self._places.keys() >= wanted.keys():
            self._refresh()
        return [prompt for name, prompt in wanted.items() if name not in self._places]

    def check_space(self, count: int) -> None:
        """Refuse to begin what cannot be finished; writes nothing.

        Raises:
          ValueError: the folder cannot be written, or its disk has no room for `count` more prompts; names folder, need
            and what is free.
        """
        there = check_writable(self._root, "run.encoding.cache")
        self._tell_of_old_files()
        needed = count * sum(_sizes(self._shapes)) * STORED.itemsize
        free = shutil.disk_usage(there).free
        if needed > free:
            raise ValueError(
                f"run.encoding.cache: {self._root}: {count} prompts need {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free"
            )

    def write(self, batches: Encoded) -> None:
        """Store encodings, a shard at a time; each shard is there for all as soon as it is full, the last at the end.

        Raises:
          OSError: a shard cannot be written; those before it are there.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        rows = _records(batches)
        for first in rows:
            self._write_shard(itertools.chain([first], itertools.islice(rows, SHARD_RECORDS - 1)))

    def read(self, prompts: Sequence[str]) -> Conditioning:
        """The encodings of prompts, `[B, …]` in bfloat16, read many at a time.

        Raises:
          ValueError: a shard is damaged or a prompt is not there; names shard and prompt.
        """
        distinct = list(dict.fromkeys(prompts))
        for prompt in self.missing(distinct):
            raise ValueError(f"{self._folder}: holds no encoding of {prompt!r}")
        with ThreadPoolExecutor(_THREADS) as pool:
            found = dict(zip(distinct, pool.map(self._read, distinct), strict=True))
        rows, (size, _) = [found[prompt] for prompt in prompts], _sizes(self._shapes)
        context = np.stack([row[:size] for row in rows]).reshape(-1, *self._shapes.context)
        if self._shapes.pooled is None:
            return Conditioning(context, None)
        return Conditioning(context, np.stack([row[size:] for row in rows]).reshape(-1, *self._shapes.pooled))

    # ---- shards

    def _read(self, prompt: str) -> np.ndarray:
        """One record, flat."""
        shard, record = self._places[_hash(prompt)]
        path = self._folder / f"{shard}.array_record"
        try:
            (content,) = self._open(str(path)).read([record])
        except RuntimeError as error:  # the only one that the library raises
            raise _damaged(path, f"encoding of {prompt!r}", error) from error
        expected = sum(_sizes(self._shapes)) * STORED.itemsize
        if len(content) != expected:
            raise _damaged(path, f"encoding of {prompt!r}", f"found {len(content)} bytes, expected {expected}")
        return np.frombuffer(content, STORED)

    def _write_shard(self, rows: Iterator[tuple[str, bytes]]) -> None:
        shard, names = uuid.uuid4().hex, []
        path = self._folder / f"{shard}.array_record"
        with replacing(path, durable=True) as temporary:
            with _as_os_error(path):
                writer = ArrayRecordWriter(str(temporary), _WRITER)
            for prompt, record in rows:
                with _as_os_error(path):
                    writer.write(record)
                names.append(_hash(prompt))
            with _as_os_error(path):
                writer.close()
        index = self._folder / f"{shard}.json"
        with replacing(index, durable=True) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, "prompts": names}), encoding="utf-8")
        self._add(index, names)

    # ---- indices

    def _refresh(self) -> None:
        """Read the indices that appeared since the last time."""
        new = [path for path in sorted(self._folder.glob("*.json")) if path.stem not in self._listed]
        with ThreadPoolExecutor(_THREADS) as pool:
            for path, names in zip(new, pool.map(_read_index, new), strict=True):
                self._add(path, names)

    def _add(self, index: Path, names: Sequence[str]) -> None:
        for record, name in enumerate(names):
            self._places.setdefault(name, (index.stem, record))
        self._listed.add(index.stem)

    def _tell_of_old_files(self) -> None:
        """Encoding anew takes minutes, and finding files of one prompt each on a bucket takes longer."""
        paths = self._root.iterdir() if self._root.is_dir() else ()
        old = sorted(path.name for path in paths if re.fullmatch("[0-9a-f]{2}", path.name))
        if old:
            warn(f"{self._root}: encodings of an older format ({old[0]} … {old[-1]}) are not used; delete them")

    def _sweep(self) -> None:
        """Remove what killed writers left behind a day ago or longer."""
        paths = list(self._folder.iterdir())
        whole = {path.stem for path in paths if path.suffix == ".json"}
        for path in paths:
            if path.suffix == ".json" or (path.suffix == ".array_record" and path.stem in whole):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
                if time.time() - path.stat().st_mtime > _LEFTOVER_S:
                    path.unlink()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sizes(shapes: Conditioning) -> tuple[int, int]:
    """Numbers in one prompt's context, and in its pooled input."""
    pooled = 0 if shapes.pooled is None else int(np.prod(shapes.pooled))
    return int(np.prod(shapes.context)), pooled


def _records(batches: Encoded) -> Iterator[tuple[str, bytes]]:
    for prompts, encoded in batches:
        rounded = jax.tree.map(lambda leaf: np.ascontiguousarray(leaf, STORED), encoded)
        for row, prompt in enumerate(prompts):
            yield prompt, b"".join(leaf[row].tobytes() for leaf in jax.tree.leaves(rounded))  # context, then pooled


def _read_index(path: Path) -> list[str]:
    try:
        fields = json.loads(read_regular(path).decode())
        names = fields["prompts"]
        if fields["format"] != FORMAT or not all(re.fullmatch("[0-9a-f]{64}", name) for name in names):
            raise ValueError(f"found format {fields['format']!r}, expected hashes in format {FORMAT!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, "index of encodings", error) from error
    return names


def _damaged(path: Path, what: str, reason: object) -> ValueError:
    short = " ".join(str(reason).split())[:200]
    both = path.with_suffix(".*")
    return ValueError(f"{path}: damaged {what} ({short}); delete {both} and start again, they are made anew")


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """What the library says of a file, as the error of a file that it is."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({' '.join(str(error).split())[:200]})") from error
