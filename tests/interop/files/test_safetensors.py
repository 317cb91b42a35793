"""Weights on disk: exact, labelled, never half-written, and refused with the file's name where they do not fit."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from fopd_jax import files
from fopd_jax.adapters.lora import Adapter
from fopd_jax.interop.files.safetensors import (
    FORMAT,
    check_preset,
    is_own_file,
    load_adapter,
    load_tree,
    save_adapter,
    save_tree,
)

SPECIAL = np.array([0.0, -0.0, 1e-45, 3.4e38, np.inf, -np.inf, np.nan, 1 / 3], np.float32)


def _tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "params": {
            "blocks": {"kernel": rng.normal(size=(2, 3, 4)).astype(np.float32)},
            "scalar": np.float32(2.5).reshape(()),
        },
        "constants": {"special": SPECIAL, "empty": np.zeros((0, 3), np.float32)},
    }


def _same(found: Any, expected: Any) -> None:
    flat, reference = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
    assert flat.keys() == reference.keys()
    for path, leaf in flat.items():
        assert leaf.dtype == np.float32
        assert leaf.shape == reference[path].shape
        assert leaf.tobytes() == np.asarray(reference[path]).tobytes(), path


def test_trees_come_back_bit_by_bit(tmp_path: Path):
    save_tree(tmp_path / "tree.safetensors", _tree(), {"preset": "miniature"})
    found, metadata = load_tree(tmp_path / "tree.safetensors")
    _same(found, _tree())
    assert metadata == {"preset": "miniature"}


def test_device_arrays_and_views_are_written_as_they_read(tmp_path: Path):
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_tree(tmp_path / "tree.safetensors", {"jax": jnp.asarray(matrix).T, "view": matrix.T[::2]}, {})
    _same(load_tree(tmp_path / "tree.safetensors")[0], {"jax": matrix.T.copy(), "view": matrix.T[::2].copy()})


def test_metadata_keeps_its_types(tmp_path: Path):
    metadata = {"preset": "miniature", "scale": 2.0, "rank": 32, "targets": ["attn"], "nothing": None, "umlaut": "ä"}
    save_tree(tmp_path / "tree.safetensors", {"x": SPECIAL}, metadata)
    assert load_tree(tmp_path / "tree.safetensors")[1] == metadata


def test_equal_trees_are_equal_files(tmp_path: Path):
    """safetensors orders metadata at random, so one pair of files would not tell."""
    metadata = {"preset": "miniature", "scale": 2.0, "targets": ["attn"], "umlaut": 'ä\n"\t\x01'}
    for i in range(6):
        save_tree(tmp_path / str(i), _tree(), dict(reversed(metadata.items())) if i % 2 else metadata)
    first = (tmp_path / "0").read_bytes()
    assert all((tmp_path / str(i)).read_bytes() == first for i in range(6))
    assert load_tree(tmp_path / "0")[1] == metadata


def test_bfloat16_files_hold_rounded_values(tmp_path: Path):
    values = np.linspace(-1, 1, 101, dtype=np.float32)
    save_tree(tmp_path / "half.safetensors", {"x": values}, {}, dtype="bfloat16")
    _same(load_tree(tmp_path / "half.safetensors")[0], {"x": values.astype(ml_dtypes.bfloat16).astype(np.float32)})


def test_adapters_come_back_with_their_scale(tmp_path: Path):
    weights = {"blocks": {"a": np.ones((3, 2), np.float32), "b": np.nan_to_num(SPECIAL).reshape(2, 4)}}
    save_adapter(tmp_path / "new" / "adapter.safetensors", Adapter(weights, 1 / 3), {"preset": "miniature"})
    adapter, metadata = load_adapter(tmp_path / "new" / "adapter.safetensors")
    _same(adapter.weights, weights)
    assert adapter.scale == 1 / 3
    assert metadata["preset"] == "miniature"


# ---- what is refused


def _missing(path: Path) -> None:
    pass


def _folder(path: Path) -> None:
    path.mkdir()


def _damaged(path: Path) -> None:
    save_tree(path, _tree(), {})
    path.write_bytes(path.read_bytes()[:-7])


def _cut_header(path: Path) -> None:
    save_tree(path, _tree(), {})
    path.write_bytes(path.read_bytes()[:20])


def _empty(path: Path) -> None:
    path.touch()


def _text(path: Path) -> None:
    path.write_text("these are no weights, but a sentence\n")


def _foreign(path: Path) -> None:
    save_file({"x": SPECIAL}, path, metadata={"format": "pt"})


def _unlabelled(path: Path) -> None:
    save_file({"x": SPECIAL}, path)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (_missing, "no such file"),
        (_folder, "no such file"),
        (_damaged, "damaged"),
        (_cut_header, "damaged"),
        (_empty, "damaged"),
        (_text, "damaged"),
        (_foreign, "not written by fopd_jax"),
        (_unlabelled, "not written by fopd_jax"),
    ],
)
@pytest.mark.parametrize("load", [load_tree, load_adapter])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, make: Any, problem: str, load: Any):
    path = tmp_path / "weights.safetensors"
    make(path)
    with pytest.raises(ValueError, match=problem) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_an_adapter_is_named(tmp_path: Path):
    save_tree(tmp_path / "base.safetensors", _tree(), {"preset": "miniature"})
    with pytest.raises(ValueError, match=r"base\.safetensors: holds no adapter"):
        load_adapter(tmp_path / "base.safetensors")


@pytest.mark.parametrize(("metadata", "found"), [({"preset": "sd35_medium"}, "'sd35_medium'"), ({}, "None")])
def test_another_preset_is_refused(metadata: dict[str, str], found: str):
    with pytest.raises(ValueError, match=f"base.safetensors: weights of preset {found}, but .* 'miniature'"):
        check_preset(Path("base.safetensors"), metadata, "miniature")
    check_preset(Path("base.safetensors"), {"preset": "miniature"}, "miniature")


FACTORS = {"x/attn/a": np.ones((6, 2), np.float32), "x/attn/b": np.ones((2, 4), np.float32)}
ABOUT = {"format": FORMAT, "preset": '"miniature"', "scale": "2.0"}
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "none": (dict.fromkeys(FACTORS), "found no tensors"),
    "NaN": ({"x/attn/a": np.full((6, 2), np.nan, np.float32)}, "found 12 values that are NaN or infinite"),
    "whole numbers": ({"x/attn/a": np.ones((6, 2), np.int8)}, "found dtype I8, expected one of F32, F16, BF16"),
    "booleans": ({"x/attn/a": np.ones((6, 2), bool)}, "found dtype BOOL"),
    "a branch": ({"x/attn": np.ones(2, np.float32)}, "found a name that is no leaf of a tree"),
    "no name": ({"": np.ones(2, np.float32)}, "found a name that is no leaf of a tree"),
    "a number": ({"x/attn/a": np.array(1, np.float32)}, "layer 'x/attn': found a .*, b .*, expected a"),
    "no rank": ({"x/attn/a": np.ones((6, 0), np.float32)}, "layer 'x/attn'"),
    "two ranks": ({"x/attn/a": np.ones((6, 3), np.float32)}, r"layer 'x/attn': found a \(6, 3\), b \(2, 4\)"),
    "one factor": ({"x/attn/b": None}, r"layer 'x/attn': found a \(6, 2\), expected"),
    "three factors": ({"x/attn/c": np.ones((2, 2), np.float32)}, "layer 'x/attn': found a .*, b .*, c "),
}
METADATA = {
    "scale": ("NaN", "Infinity", "0", "true", "null", "[1]", '"x"', "1e300", "1" + "0" * 400),
    "preset": ("miniature", ""), "note": ("hello", "[" * 100000),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_make_no_adapter_are_named(tmp_path: Path, kind: str):
    changes, problem = TENSORS[kind]
    path = tmp_path / "adapter.safetensors"
    save_file({name: each for name, each in (FACTORS | changes).items() if each is not None}, path, metadata=ABOUT)
    with pytest.raises(ValueError, match=problem) as error:
        load_adapter(path)
    assert path.name in str(error.value)


def test_metadata_that_mean_nothing_are_named(tmp_path: Path):
    path = tmp_path / "adapter.safetensors"
    for key, values in METADATA.items():
        for value in values:
            save_file(FACTORS, path, metadata=ABOUT | {key: value})
            with pytest.raises(ValueError, match=f"^{path}: metadata {key}: found ") as error:
                load_adapter(path)
            assert len(str(error.value)) < 400


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert not is_own_file(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: no such file"):
        load_tree(tmp_path / "pipe")


# ---- atomicity


def test_no_temporary_file_stays_behind(tmp_path: Path):
    for _ in range(2):  # new, then overwritten
        save_tree(tmp_path / "tree.safetensors", _tree(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["tree.safetensors"]


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tree.safetensors"
    save_tree(path, _tree(), {"run": 1})
    before = path.read_bytes()

    def fail(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_tree(path, jax.tree.map(np.zeros_like, _tree()), {"run": 2})
    assert path.read_bytes() == before
    assert load_tree(path)[1] == {"run": 1}
