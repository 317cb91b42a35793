"""Prompts that are encoded once, before anything else, and kept: their encoders need not stay in memory."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from fopd_jax.conditioning.cache import Encode, Encoded
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.console import progress
from fopd_jax.parallel.distributed import barrier

ENCODING_TIMEOUT_S = 7200.0  # a host that has its prompts waits while another one encodes them all


@runtime_checkable
class Encodings(Protocol):
    """Where encoded prompts are kept; `ConditioningCache` on disk, `MemoryEncodings` in memory."""

    def missing(self, prompts: Iterable[str]) -> list[str]: ...
    def check_space(self, count: int) -> None: ...
    def write(self, batches: Encoded) -> None: ...
    def read(self, prompts: Sequence[str]) -> Conditioning: ...


class MemoryEncodings:
    """Encoded prompts in memory, as they were computed."""

    def __init__(self) -> None:
        self._rows: dict[str, Conditioning] = {}

    def missing(self, prompts: Iterable[str]) -> list[str]:
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]

    def check_space(self, count: int) -> None:
        pass

    def write(self, batches: Encoded) -> None:
        for prompts, encoded in batches:
            for row, prompt in enumerate(prompts):
                self._rows[prompt] = jax.tree.map(lambda leaf, row=row: leaf[row], encoded)

    def read(self, prompts: Sequence[str]) -> Conditioning:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(self._rows[prompt] for prompt in prompts))


class KeptPrompts:
    """Prompts by their kept encodings; `load` brings the encoders where one is missing, `batch_size` at a time.

    Each process encodes by itself, on its own devices. Several threads may ask at once.
    """

    def __init__(self, encodings: Encodings, load: Callable[[], Encode], batch_size: int) -> None:
        self._encodings, self._load, self._batch_size = encodings, load, batch_size
        self._filling = threading.Lock()

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those that are not encoded yet, for which there is room.

        Raises:
          ValueError: there is none; names the folder.
        """
        if missing := self._encodings.missing(prompts):
            self._encodings.check_space(len(missing))
        return missing

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode what is not there yet; the encoders are in memory only meanwhile.

        Every process encodes its share, then what others have encoded into folders that it does not see.
        """
        distinct, load = list(dict.fromkeys(prompts)), functools.cache(self._load)
        self._fill(distinct[jax.process_index() :: jax.process_count()], load)
        barrier("prompts are encoded", ENCODING_TIMEOUT_S)
        self._fill(distinct, load)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The encodings of prompts, `[B, …]` on the host."""
        self._fill(prompts, self._load)
        return self._encodings.read(prompts)

    def embed(self, placed: Any) -> Conditioning:
        """What `encode` gave, once it lies on the devices: it is the conditioning already."""
        return placed

    def _fill(self, prompts: Iterable[str], load: Callable[[], Encode]) -> None:
        with self._filling:
            if missing := self._encodings.missing(prompts):
                self._encodings.check_space(len(missing))
                self._encodings.write(self._encoded(missing, load()))

    def _encoded(self, prompts: Sequence[str], encode: Encode) -> Iterator[tuple[Sequence[str], Conditioning]]:
        size = self._batch_size
        with progress("encode prompts", len(prompts), "prompts") as count:
            for start in range(0, len(prompts), size):
                batch = prompts[start : start + size]
                yield batch, encode(batch)
                count(len(batch))
