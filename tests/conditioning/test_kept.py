"""Prompts that are encoded once and kept: processes share the encoding, whether or not they share the disk."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from fopd_jax.conditioning import kept
from fopd_jax.conditioning.cache import ConditioningCache
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.conditioning.kept import Encodings, KeptPrompts, MemoryEncodings

PROMPTS = ["a", "bb", "a", "ccc", "dddd", "eeeee"]  # five distinct ones
SHAPES = Conditioning((2, 1), (1,))


class Process:
    """One of two processes: its prompts by encoders that only count."""

    def __init__(self, index: int, encodings: Encodings) -> None:
        self.index, self.loads, self.encodings = index, 0, encodings
        self.encoded: list[str] = []
        self.prompts = KeptPrompts(encodings, self.load, 2)

    def load(self) -> Callable[[Sequence[str]], Conditioning]:
        self.loads += 1
        return self.encode

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self.encoded += prompts
        lengths = np.array([[len(prompt)] for prompt in prompts], np.float32)
        return Conditioning(np.stack([lengths, -lengths], axis=1), lengths)


def _prepare(processes: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both processes prepare: the second one runs up to its barrier, and past it, while the first is at its own."""
    monkeypatch.setattr(jax, "process_count", lambda: len(processes))

    def run(position: int) -> None:
        monkeypatch.setattr(jax, "process_index", lambda: position)
        following = [lambda: run(position + 1)] if position + 1 < len(processes) else []
        monkeypatch.setattr(kept, "barrier", lambda *_: [each() for each in following])
        processes[position].prompts.prepare(PROMPTS)

    run(0)


@pytest.fixture
def shared(tmp_path: Path) -> list[Process]:
    return [Process(index, ConditioningCache(tmp_path, "encoders", SHAPES)) for index in range(2)]


def test_processes_share_the_encoding(shared: list[Process], monkeypatch: pytest.MonkeyPatch):
    """The second is alone after the first one's share, so it finds that, and its own is all that is left."""
    _prepare(shared, monkeypatch)
    assert [process.encoded for process in shared] == [["a", "ccc", "eeeee"], ["bb", "dddd"]]
    assert [process.loads for process in shared] == [1, 1]
    for process in shared:
        assert process.prompts.encode(PROMPTS).pooled[:, 0].tolist() == [len(prompt) for prompt in PROMPTS]
        assert process.loads == 1


def test_what_is_there_is_not_encoded_again(shared: list[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _prepare(shared, monkeypatch)
    again = [Process(process.index, ConditioningCache(tmp_path, "encoders", SHAPES)) for process in shared]
    _prepare(again, monkeypatch)
    assert [(process.encoded, process.loads) for process in again] == [([], 0)] * 2


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_folder_that_is_not_shared_costs_time_alone(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    processes = []
    for index in range(2):
        own = ConditioningCache(tmp_path / str(index), "encoders", SHAPES)
        processes.append(Process(index, own if place == "folder" else MemoryEncodings()))
    _prepare(processes, monkeypatch)
    for process in processes:
        assert sorted(process.encoded) == sorted(set(PROMPTS))
        assert process.loads == 1
        assert process.prompts.encode(["ccc"]).context.ravel().tolist() == [3, -3]


def test_one_process_encodes_everything_once(tmp_path: Path):
    alone = Process(0, ConditioningCache(tmp_path, "encoders", SHAPES))
    alone.prompts.prepare(PROMPTS)
    assert alone.encoded == ["a", "bb", "ccc", "dddd", "eeeee"]
    assert alone.loads == 1


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_threads_that_ask_for_a_new_prompt_at_once_encode_it_once(place: str, tmp_path: Path):
    """The next batch is made in a thread while the main one evaluates."""
    encodings = ConditioningCache(tmp_path, "encoders", SHAPES) if place == "folder" else MemoryEncodings()
    process = Process(0, encodings)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: process.prompts.encode(["ccc", "a"]).pooled.ravel().tolist(), range(8)))
    assert found == [[3, 1]] * 8
    assert process.encoded == ["ccc", "a"]


def test_what_was_kept_is_the_conditioning_as_soon_as_it_lies_on_the_devices():
    process = Process(0, MemoryEncodings())
    placed = jax.device_put(process.prompts.encode(["a"]))
    assert process.prompts.embed(placed) is placed
