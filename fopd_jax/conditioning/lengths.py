"""What of prompts the text encoders do not read: they cut at their length, each its own."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fopd_jax.conditioning.encoder import Tokenize

SHORT = 60
"""Bytes of a prompt that any encoder reads to the end: a token has one byte at least."""
_SHOWN = 60  # characters of a prompt in a message


@dataclasses.dataclass(frozen=True)
class Reader:
    """One text encoder: `tokenizer(length)` pads and cuts to any length, of which the encoder reads `length`."""

    name: str
    length: int
    tokenizer: Callable[[int], Tokenize]


def review(readers: Sequence[Reader], prompts: Iterable[str]) -> list[str]:
    """What is worth telling, a line each: how many prompts are cut, and which are the same to all encoders.

    Tokenizers are loaded only where a prompt is long enough to need it.
    """
    distinct = list(dict.fromkeys(prompts))
    least = min((reader.length for reader in readers), default=0)
    long = [prompt for prompt in distinct if len(prompt.encode()) > min(SHORT, least - 3)]
    if not long or not readers:
        return []
    read = [reader.tokenizer(reader.length)(long) for reader in readers]
    cut = [_cut(reader, ids, long) for reader, ids in zip(readers, read, strict=True)]
    told: dict[tuple[int, bytes], list[int]] = {}  # readers of one length that cut the same prompts share a line
    for k, (reader, rows) in enumerate(zip(readers, cut, strict=True)):
        told.setdefault((reader.length, rows.tobytes()), []).append(k)
    lines = []
    for (length, _), (k, *more) in told.items():
        if cut[k].any():
            names = " and ".join(readers[i].name for i in (k, *more))
            first = _short(long[int(np.flatnonzero(cut[k])[0])])
            what = f"{cut[k].sum()} of {len(distinct)} prompts are longer than the {length} tokens that {names} read"
            lines.append(f"{what}{'' if more else 's'}; what follows is not seen there; the first: {first}")
    return lines + _same(np.concatenate(read, axis=1), np.logical_and.reduce(cut), long)


def _cut(reader: Reader, read: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Which prompts are cut: where room for one more token changes what stands before it, since the end mark moves."""
    return (reader.tokenizer(reader.length + 1)(prompts)[:, : reader.length] != read).any(axis=1)


def _same(read: np.ndarray, cut: np.ndarray, prompts: Sequence[str]) -> list[str]:
    """Prompts that differ only where no encoder reads on. `read [n, S]`: ids of all; `cut [n]`: by every one."""
    groups: dict[bytes, list[str]] = {}
    for i in np.flatnonzero(cut):
        groups.setdefault(read[i].tobytes(), []).append(prompts[int(i)])
    alike = [group for group in groups.values() if len(group) > 1]
    if not alike:
        return []
    what = f"{sum(map(len, alike))} prompts differ only where no encoder reads on: to the network they are {len(alike)}"
    return [f"{what}, such as {_short(alike[0][0])} and {_short(alike[0][1])}"]


def _short(prompt: str) -> str:
    """Both ends of a prompt."""
    if len(prompt) <= _SHOWN:
        return repr(prompt)
    return repr(f"{prompt[: _SHOWN // 2]}…{prompt[-_SHOWN // 2 :]}")
