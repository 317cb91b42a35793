"""Encoded prompts on disk: named by content, rounded once, whole or not there, shared by several runs."""

import itertools
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

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


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---- names


def test_a_name_depends_on_prompt_and_fingerprint_alone(tmp_path: Path):
    near = [*PROMPTS, "a red square ", "A red square", "a red\nsquare"]
    caches = [_cache(tmp_path, fingerprint) for fingerprint in ("encoders", "others", "encoders\na red square")]
    paths = [cache.path(prompt) for cache, prompt in itertools.product(caches, near)]
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(tmp_path / "cache") and path.suffix == ".safetensors" for path in paths)
    again = _cache(tmp_path, shapes=Conditioning((1, 1), (1,)))
    assert [again.path(prompt) for prompt in near] == paths[: len(near)]
    assert _cache(tmp_path / "elsewhere").path("").name == caches[0].path("").name


def test_other_encoders_find_nothing(tmp_path: Path):
    _cache(tmp_path).write(PROMPTS, _encoded(5))
    assert _cache(tmp_path).missing(PROMPTS) == []
    assert _cache(tmp_path, "others").missing(PROMPTS) == PROMPTS


# ---- writing and reading


def test_what_is_missing_is_distinct_and_in_order(tmp_path: Path):
    cache = _cache(tmp_path)
    assert cache.missing(iter(["b", "a", "b", "c", "a"])) == ["b", "a", "c"]
    cache.write(["a", "d"], _encoded(2))
    assert cache.missing(iter(["b", "a", "b", "c", "a"])) == ["b", "c"]
    assert cache.missing([]) == []


def test_encodings_come_back_rounded_to_bfloat16_in_the_order_asked_for(tmp_path: Path):
    cache, encoded = _cache(tmp_path), _encoded(5)
    cache.write(PROMPTS[:2], Conditioning(encoded.context[:2], encoded.pooled[:2]))
    cache.write(PROMPTS[2:], Conditioning(encoded.context[2:], encoded.pooled[2:]))
    order = [3, 0, 0, 4, 2, 1]
    found = cache.read([PROMPTS[i] for i in order])
    for leaf, expected in ((found.context, encoded.context), (found.pooled, encoded.pooled)):
        assert leaf.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(leaf, expected[order].astype(ml_dtypes.bfloat16))
    np.testing.assert_allclose(found.context.astype(np.float32), encoded.context[order], rtol=2**-8)


def test_bfloat16_is_stored_as_it_is(tmp_path: Path):
    encoded = _encoded(2)
    rounded = Conditioning(encoded.context.astype(ml_dtypes.bfloat16), encoded.pooled.astype(ml_dtypes.bfloat16))
    _cache(tmp_path).write(["a", "b"], rounded)
    np.testing.assert_array_equal(_cache(tmp_path).read(["b"]).context, rounded.context[1:])


def test_only_whole_files_appear(tmp_path: Path):
    cache = _cache(tmp_path)
    cache.write(PROMPTS, _encoded(5))
    assert _files(tmp_path) == sorted(cache.path(prompt) for prompt in PROMPTS)
    assert {path.stat().st_mode & 0o777 for path in _files(tmp_path)} == {0o644}  # others may share the folder


def test_a_write_that_was_cut_off_is_as_if_it_had_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache, replace = _cache(tmp_path), os.replace

    def killed(source: Path, target: Path) -> None:
        if target == cache.path("b"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.write(["a", "b", "c"], _encoded(3))
    assert cache.missing(["a", "b", "c"]) == ["b", "c"]
    monkeypatch.undo()
    cache.write(["b", "c"], _encoded(2))
    assert cache.missing(["a", "b", "c"]) == []


def test_several_runs_may_write_the_same_prompts_at_once(tmp_path: Path):
    """Readers in between see whole files only."""
    prompts, encoded = [f"prompt {i}" for i in range(20)], _encoded(20)
    expected = encoded.context.astype(ml_dtypes.bfloat16)

    def run(_: int) -> None:
        cache = _cache(tmp_path)
        for i, prompt in enumerate(prompts):
            cache.write([prompt], Conditioning(encoded.context[i : i + 1], encoded.pooled[i : i + 1]))
            np.testing.assert_array_equal(cache.read([prompt]).context[0], expected[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert len(_files(tmp_path)) == len(prompts)
    np.testing.assert_array_equal(_cache(tmp_path).read(prompts).context, expected)


# ---- what is refused


def _refused(cache: ConditioningCache, *fragments: str) -> None:
    with pytest.raises(ValueError, match="start again") as error:
        cache.read(["a"])
    assert str(cache.path("a")) in str(error.value)
    assert "\n" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("length", [0, 5, 40, 100])
def test_a_damaged_file_is_named_with_its_prompt(tmp_path: Path, length: int):
    cache = _cache(tmp_path)
    cache.write(["a"], _encoded(1))
    content = cache.path("a").read_bytes()
    assert len(content) > length
    cache.path("a").write_bytes(content[:length])
    _refused(cache, "damaged encoding of 'a'")


def test_a_missing_file_is_named_with_its_prompt(tmp_path: Path):
    _refused(_cache(tmp_path), "damaged encoding of 'a'", "No such file")


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"context": (3, 5), "pooled": (5,)}, "'context': (3, 5)"),
        ({"context": (3, 4), "pooled": (1, 5)}, "'pooled': (1, 5)"),
        ({"context": (3, 4)}, "found {'context': (3, 4)},"),
        ({"context": (3, 4), "pooled": (5,), "mask": (3,)}, "'mask': (3,)"),
    ],
)
def test_a_file_of_other_shapes_is_named(tmp_path: Path, tensors: dict[str, tuple[int, ...]], found: str):
    cache = _cache(tmp_path)
    cache.path("a").parent.mkdir(parents=True)
    save_file({name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in tensors.items()}, cache.path("a"))
    _refused(cache, found, "expected {'context': (3, 4), 'pooled': (5,)}")


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
    assert asked == [tmp_path / "cache"]
    assert asked[0].is_dir()
