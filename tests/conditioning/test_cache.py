"""Encoded prompts on disk: named by content, rounded once, packed, whole or not there, shared by several runs."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fopd_jax.conditioning import cache as module
from fopd_jax.conditioning.cache import ConditioningCache
from fopd_jax.conditioning.encoder import Conditioning

SHAPES = Conditioning((3, 4), (5,))
PROMPTS = ["a red square", "", 'sign "ÄΩ東京"', "line one\nline two", "x" * 3000]
Usage = namedtuple("Usage", ["total", "used", "free"])


def _cache(folder: Path, fingerprint: str = "encoders", shapes: Conditioning = SHAPES) -> ConditioningCache:
    return ConditioningCache(folder / "cache", fingerprint, shapes)


def _encoded(count: int, seed: int = 0) -> Conditioning:
    rng = np.random.default_rng(seed)
    return Conditioning(*(rng.normal(size=(count, *shape)).astype(np.float32) for shape in ((3, 4), (5,))))


def _write(cache: ConditioningCache, prompts: Sequence[str], encoded: Conditioning | None = None) -> None:
    cache.write([(prompts, _encoded(len(prompts)) if encoded is None else encoded)])


def _files(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_RECORDS", 4)


# ---- names


@pytest.mark.parametrize("near", ["a red square ", "A red square", "a red\nsquare", ""])
def test_an_encoding_is_that_of_its_prompt_alone(tmp_path: Path, near: str):
    _write(_cache(tmp_path), ["a red square"])
    assert _cache(tmp_path).missing([near, "a red square"]) == [near]


@pytest.mark.parametrize(
    ("fingerprint", "shapes"),
    [("others", SHAPES), ("encoders", Conditioning((3, 5), (5,))), ("encoders", Conditioning((3, 4), (4,)))],
)
def test_other_encoders_or_shapes_find_nothing(tmp_path: Path, fingerprint: str, shapes: Conditioning):
    _write(_cache(tmp_path), PROMPTS)
    assert _cache(tmp_path).missing(PROMPTS) == []
    assert _cache(tmp_path, fingerprint, shapes).missing(PROMPTS) == PROMPTS


# ---- writing and reading


def test_what_is_missing_is_distinct_and_in_order(tmp_path: Path):
    cache = _cache(tmp_path)
    assert cache.missing(iter(["b", "a", "b", "c", "a"])) == ["b", "a", "c"]
    _write(cache, ["a", "d"])
    assert cache.missing(iter(["b", "a", "b", "c", "a"])) == ["b", "c"]
    assert cache.missing([]) == []


def test_encodings_come_back_rounded_to_bfloat16_in_the_order_asked_for(tmp_path: Path):
    cache, encoded = _cache(tmp_path), _encoded(5)
    _write(cache, PROMPTS[:2], Conditioning(encoded.context[:2], encoded.pooled[:2]))
    _write(cache, PROMPTS[2:], Conditioning(encoded.context[2:], encoded.pooled[2:]))
    order = [3, 0, 0, 4, 2, 1]
    for reader in (cache, _cache(tmp_path)):
        found = reader.read([PROMPTS[i] for i in order])
        for leaf, expected in ((found.context, encoded.context), (found.pooled, encoded.pooled)):
            assert leaf.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(leaf, expected[order].astype(ml_dtypes.bfloat16))
        np.testing.assert_allclose(found.context.astype(np.float32), encoded.context[order], rtol=2**-8)


def test_bfloat16_is_stored_as_it_is(tmp_path: Path):
    encoded = _encoded(2)
    rounded = Conditioning(encoded.context.astype(ml_dtypes.bfloat16), encoded.pooled.astype(ml_dtypes.bfloat16))
    _write(_cache(tmp_path), ["a", "b"], rounded)
    np.testing.assert_array_equal(_cache(tmp_path).read(["b"]).context, rounded.context[1:])


@pytest.mark.usefixtures("small_shards")
def test_batches_of_any_size_are_packed(tmp_path: Path):
    """Eleven prompts in shards of four: shards and batches end at different prompts."""
    prompts, encoded, cache = [f"prompt {i}" for i in range(11)], _encoded(11), _cache(tmp_path)
    starts = (0, 3, 4, 9, 11)
    cache.write(
        (prompts[a:b], Conditioning(encoded.context[a:b], encoded.pooled[a:b])) for a, b in itertools.pairwise(starts)
    )
    assert len(_files(tmp_path, ".array_record")) == len(_files(tmp_path, ".json")) == 3
    assert len(_files(tmp_path)) == 6
    found = _cache(tmp_path).read(prompts[::-1])
    np.testing.assert_array_equal(found.context, encoded.context[::-1].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found.pooled, encoded.pooled[::-1].astype(ml_dtypes.bfloat16))


@pytest.mark.usefixtures("small_shards")
def test_a_start_costs_one_file_a_shard_and_none_a_prompt(tmp_path: Path):
    prompts = [f"prompt {i}" for i in range(40)]
    _write(_cache(tmp_path), prompts)
    for shard in _files(tmp_path, ".array_record"):
        shard.unlink()
    cache = _cache(tmp_path)
    assert cache.missing(prompts) == []  # by the indices alone
    shutil.rmtree(tmp_path / "cache")
    assert cache.missing(prompts) == []  # by memory alone
    assert cache.missing([*prompts, "new"]) == ["new"]


def test_files_are_there_for_others(tmp_path: Path):
    _write(_cache(tmp_path), PROMPTS)
    assert {path.stat().st_mode & 0o777 for path in _files(tmp_path)} == {0o644}


# ---- kills and company


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_costs_the_unfinished_shard_alone(tmp_path: Path, error: type[BaseException]):
    def batches() -> Iterator[tuple[list[str], Conditioning]]:
        for start in range(0, 12, 3):
            if start == 9:
                raise error
            yield [f"prompt {i}" for i in range(start, start + 3)], _encoded(3, start)

    cache, prompts = _cache(tmp_path), [f"prompt {i}" for i in range(12)]
    with pytest.raises(error):
        cache.write(batches())
    for each in (cache, _cache(tmp_path)):
        assert each.missing(prompts) == prompts[8:]
    assert len(_files(tmp_path)) == 4  # nothing half-written
    _write(cache, prompts[8:])
    assert _cache(tmp_path).missing(prompts) == []


@pytest.mark.parametrize("suffix", [".array_record", ".json"])
def test_a_shard_is_there_when_both_its_files_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
):
    cache, replace = _cache(tmp_path), os.replace

    def killed(source: Path, target: Path) -> None:
        if target.suffix == suffix:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _write(cache, PROMPTS)
    assert _cache(tmp_path).missing(PROMPTS) == PROMPTS
    monkeypatch.undo()
    _write(cache, PROMPTS)
    assert _cache(tmp_path).missing(PROMPTS) == []


_KILLED = """
import itertools, sys
import numpy as np
from pathlib import Path
from fopd_jax.conditioning import cache as module
from fopd_jax.conditioning.encoder import Conditioning
module.SHARD_RECORDS = 4
def batches():
    for i in itertools.count():
        yield [f"prompt {i}"], Conditioning(np.full((1, 300, 400), i, np.float32), np.full((1, 5), i, np.float32))
        print(i, flush=True)
module.ConditioningCache(Path(sys.argv[1]), "encoders", Conditioning((300, 400), (5,))).write(batches())
"""


def test_a_killed_process_leaves_whole_shards(tmp_path: Path):
    """SIGKILL at some moment: what is listed is whole, and only the last few prompts are not."""
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    written = 0
    for line in process.stdout:
        written = int(line)
        if written == 41:
            process.kill()
    process.wait()
    cache = ConditioningCache(tmp_path, "encoders", Conditioning((300, 400), (5,)))
    prompts = [f"prompt {i}" for i in range(written + 1)]
    there = [prompt for prompt in prompts if prompt not in cache.missing(prompts)]
    assert len(there) > written - 8
    found = cache.read(there)
    expected = np.array([int(prompt.split()[1]) for prompt in there], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found.context, np.broadcast_to(expected[:, None, None], found.context.shape))
    np.testing.assert_array_equal(found.pooled[:, 0], expected)


def test_what_killed_writers_left_is_removed_a_day_later(tmp_path: Path):
    cache = _cache(tmp_path)
    _write(cache, ["a"])
    whole, old, now = _files(tmp_path), time.time() - 90_000, time.time() - 3_000
    for path in whole:
        os.utime(path, (old, old))
    left = {".x.array_record.0.tmp": old, "y.array_record": old, ".z.json.0.tmp": now}
    for name, stamp in left.items():
        (cache.folder / name).write_bytes(b"half")
        os.utime(cache.folder / name, (stamp, stamp))
    _write(cache, ["b"])
    assert {*whole, cache.folder / ".z.json.0.tmp"} < set(_files(tmp_path))
    assert not (cache.folder / ".x.array_record.0.tmp").exists()
    assert not (cache.folder / "y.array_record").exists()
    assert _cache(tmp_path).read(["a", "b"]).pooled.shape == (2, 5)


@pytest.mark.usefixtures("small_shards")
def test_several_runs_may_write_the_same_prompts_at_once(tmp_path: Path):
    """Readers in between see whole shards only."""
    prompts, encoded = [f"prompt {i}" for i in range(20)], _encoded(20)
    expected = encoded.context.astype(ml_dtypes.bfloat16)

    def run(_: int) -> None:
        cache = _cache(tmp_path)
        for start in range(0, 20, 5):
            chunk = slice(start, start + 5)
            _write(cache, prompts[chunk], Conditioning(encoded.context[chunk], encoded.pooled[chunk]))
            np.testing.assert_array_equal(_cache(tmp_path).read(prompts[chunk]).context, expected[chunk])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    np.testing.assert_array_equal(_cache(tmp_path).read(prompts).context, expected)


def test_what_another_process_wrote_meanwhile_is_found(tmp_path: Path):
    mine, other = _cache(tmp_path), _cache(tmp_path)
    _write(mine, ["a"])
    assert other.missing(["a", "b"]) == ["b"]
    _write(mine, ["b"])
    assert other.missing(["a", "b"]) == []
    assert other.read(["b", "a"]).context.shape == (2, 3, 4)


# ---- what is refused


def _refused(cache: ConditioningCache, path: Path, *fragments: str) -> None:
    with pytest.raises(ValueError, match="start again") as error:
        cache.read(["a"])
    assert str(path) in str(error.value)
    assert str(path.with_suffix(".*")) in str(error.value)
    assert "\n" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("length", [0, 5, 40_000, 131_071])
def test_a_truncated_shard_is_named_with_its_prompt(tmp_path: Path, length: int):
    _write(_cache(tmp_path), ["a"])
    (path,) = _files(tmp_path, ".array_record")
    content = path.read_bytes()
    assert len(content) > length
    path.write_bytes(content[:length])
    _refused(_cache(tmp_path), path, "damaged encoding of 'a'")


def test_a_shard_with_a_flipped_bit_is_named(tmp_path: Path):
    _write(_cache(tmp_path), ["a"])
    (path,) = _files(tmp_path, ".array_record")
    content = bytearray(path.read_bytes())
    content[64 + 40 + 8] ^= 1  # past the headers of file and chunk
    path.write_bytes(content)
    _refused(_cache(tmp_path), path, "damaged encoding of 'a'")


def test_a_missing_shard_is_named(tmp_path: Path):
    _write(_cache(tmp_path), ["a"])
    (path,) = _files(tmp_path, ".array_record")
    path.unlink()
    _refused(_cache(tmp_path), path, "damaged encoding of 'a'", "No such file")


def test_a_record_of_another_length_is_named(tmp_path: Path):
    cache = _cache(tmp_path)
    _write(cache, ["a"], Conditioning(np.zeros((1, 3, 5), np.float32), np.zeros((1, 5), np.float32)))
    _refused(cache, *_files(tmp_path, ".array_record"), "found 40 bytes, expected 34")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": "another", "prompts": []}', '{"format": "fopd_jax/conditioning/1"}',
     json.dumps({"format": "fopd_jax/conditioning/1", "prompts": ["a"]}),
     json.dumps({"format": "fopd_jax/conditioning/1", "prompts": [1]})],
)  # fmt: skip
def test_a_damaged_index_is_named(tmp_path: Path, content: str):
    _write(_cache(tmp_path), ["a"])
    (path,) = _files(tmp_path, ".json")
    path.write_text(content, encoding="utf-8")
    _refused(_cache(tmp_path), path, "damaged index of encodings")


def test_what_an_error_says_to_do_helps(tmp_path: Path):
    _write(_cache(tmp_path), ["a"])
    _write(_cache(tmp_path), ["b"])
    cache = _cache(tmp_path)
    cache.missing(["a"])
    shard = cache.folder / cache._places[module._hash("a")][0]
    for path in cache.folder.glob(f"{shard.name}.*"):
        path.unlink()
    again = _cache(tmp_path)
    assert again.missing(["a", "b"]) == ["a"]
    _write(again, ["a"])
    assert _cache(tmp_path).read(["a", "b"]).pooled.shape == (2, 5)


def test_a_prompt_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no encoding of 'a'"):
        _cache(tmp_path).read(["a"])


def test_a_full_disk_is_an_error_of_its_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The library's own message on a device without room."""
    cache, writer = _cache(tmp_path), module.ArrayRecordWriter
    monkeypatch.setattr(module, "ArrayRecordWriter", lambda path, options: writer("/dev/full", options))
    with pytest.raises(OSError, match="No space left on device") as error:
        _write(cache, PROMPTS, Conditioning(np.zeros((5, 300, 400)), np.zeros((5, 5))))
    assert str(cache.folder) in str(error.value)
    assert _files(tmp_path) == []


def test_what_does_not_fit_on_the_disk_is_refused_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SD3.5's encodings with 128 T5 tokens: 1.7 MB a prompt."""
    cache = _cache(tmp_path, shapes=Conditioning((205, 4096), (2048,)))
    one = 2 * (205 * 4096 + 2048)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**50, 0, 50_000 * one))
    cache.check_space(50_000)
    with pytest.raises(ValueError, match=r"50001 prompts need 78\.4 GiB, 78\.4 GiB are free") as error:
        cache.check_space(50_001)
    assert str(tmp_path / "cache") in str(error.value)
    assert _files(tmp_path) == []


def test_the_space_of_the_folders_own_disk_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Path] = []

    def disk_usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(2**50, 0, 2**40)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    _cache(tmp_path).check_space(3)
    (tmp_path / "cache").mkdir()
    _cache(tmp_path).check_space(3)
    assert asked == [tmp_path, tmp_path / "cache"]  # the nearest that is there: nothing is made


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match=r"^run\.encoding\.cache: .*cache is no folder"):
        _cache(tmp_path).check_space(1)


def test_files_of_the_older_format_are_told_of_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = tmp_path / "cache" / "3f" / f"3f{'0' * 62}.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    _cache(tmp_path).check_space(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "cache") in line
    assert "3f" in line
    assert "delete" in line
    assert old.exists()
    _cache(tmp_path / "new").check_space(1)
    assert capsys.readouterr().err == ""
