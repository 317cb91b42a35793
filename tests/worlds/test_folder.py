"""Prompts of a converted folder's world: processes share the encoding, whether or not they share the disk."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from fopd_jax.conditioning.cache import ConditioningCache
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import Encoding
from fopd_jax.worlds import folder as world
from fopd_jax.worlds.folder import Encodings, FolderWorld, MemoryEncodings

PROMPTS = ["a", "bb", "a", "ccc", "dddd", "eeeee"]  # five distinct ones
SHAPES = Conditioning((2, 1), (1,))


class Process:
    """One of two processes: its world around encoders that only count."""

    def __init__(self, index: int, encodings: Encodings) -> None:
        self.index, self.loads = index, 0
        self.encoded: list[str] = []
        self.world = FolderWorld.__new__(FolderWorld)  # without a folder: only its prompts are of interest here
        self.world._encoding = Encoding(batch_size=2)
        self.world._encodings = encodings
        self.world._load_encoder = self.load  # pyright: ignore[reportAttributeAccessIssue]

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
        monkeypatch.setattr(world, "barrier", lambda *_: [each() for each in following])
        processes[position].world._prepare(PROMPTS)

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
        assert process.world._encode(PROMPTS).pooled[:, 0].tolist() == [len(prompt) for prompt in PROMPTS]
        assert process.loads == 1


def test_what_is_there_is_not_encoded_again(shared: list[Process], monkeypatch: pytest.MonkeyPatch):
    _prepare(shared, monkeypatch)
    again = [Process(process.index, process.world._encodings) for process in shared]
    _prepare(again, monkeypatch)
    assert [(process.encoded, process.loads) for process in again] == [([], 0)] * 2


@pytest.mark.parametrize("kept", ["folder", "memory"])
def test_a_folder_that_is_not_shared_costs_time_alone(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    processes = []
    for index in range(2):
        own = ConditioningCache(tmp_path / str(index), "encoders", SHAPES)
        processes.append(Process(index, own if kept == "folder" else MemoryEncodings()))
    _prepare(processes, monkeypatch)
    for process in processes:
        assert sorted(process.encoded) == sorted(set(PROMPTS))
        assert process.loads == 1
        assert process.world._encode(["ccc"]).context.ravel().tolist() == [3, -3]


def test_one_process_encodes_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alone = Process(0, ConditioningCache(tmp_path, "encoders", SHAPES))
    alone.world._prepare(PROMPTS)
    assert alone.encoded == ["a", "bb", "ccc", "dddd", "eeeee"]
    assert alone.loads == 1
