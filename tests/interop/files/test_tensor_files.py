"""The reader and writer of safetensors files against the format's own library, and every way a file can be wrong."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from fopd_jax.interop.files.tensor_files import (
    DTYPES,
    check_finite,
    hash_file,
    open_tensor_file,
    open_tensor_files,
    read_json,
    write_tensor_file,
)

STEM = "model"
SHAPES = {"b.weight": (3, 4), "a.bias": (5,), "empty": (0, 2), "scalar": (), "c.table": (1, 6, 2)}
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def random_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: np.asarray(random.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def write_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header: what a program other than the library may write."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, str]:
    """Shards and their index, which is returned as well."""
    for file, tensors in shards.items():
        safetensors.numpy.save_file(dict(tensors), folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.copy() for name, tensor in open_tensor_files(folder, STEM).stream()}


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_single_file_is_what_the_library_reads(dtype: np.dtype, tmp_path: Path) -> None:
    tensors = random_tensors(dtype)
    safetensors.numpy.save_file(tensors, tmp_path / f"{STEM}.safetensors", {"format": "pt"})
    found = read(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (dtype, SHAPES[name])
        np.testing.assert_array_equal(tensor, tensors[name])


def test_shards_equal_a_single_file(tmp_path: Path) -> None:
    tensors = random_tensors()
    first = {name: tensors[name] for name in ("b.weight", "scalar")}
    second = {name: tensor for name, tensor in tensors.items() if name not in first}
    write_shards(tmp_path, {f"{STEM}-00001-of-00002.safetensors": first, f"{STEM}-00002-of-00002.safetensors": second})
    found = read(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_stream_owns_its_arrays_follows_the_file_and_counts_bytes(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    tensors = random_tensors()
    write_tensor_file(path, SHAPES, dict.fromkeys(SHAPES, np.float32), iter(tensors.items()))
    counts: list[int] = []
    files = open_tensor_file(path)
    streamed = [(name, tensor) for name, tensor in files.stream(counts.append)]
    assert [name for name, _ in streamed if tensors[name].size] == [name for name in SHAPES if tensors[name].size]
    assert sum(counts) == files.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in streamed:
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


def test_written_file_is_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "written.safetensors"
    tensors = random_tensors() | {"a.bias": np.arange(5).astype(ml_dtypes.bfloat16)}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    tensors["b.weight"] = np.asfortranarray(tensors["b.weight"])  # what a transposed parameter is
    write_tensor_file(path, SHAPES, dtypes, iter(tensors.items()))
    found = safetensors.numpy.load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtypes[name]
        np.testing.assert_array_equal(tensor, tensors[name])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_selection_keeps_other_dtypes_out(tmp_path: Path) -> None:
    """A file may hold integers and quantised tensors of networks that are not read."""
    path = tmp_path / "mixed.safetensors"
    integers = {"position_ids": torch.arange(3), "scale": torch.ones(2, dtype=torch.float8_e4m3fn)}
    safetensors.torch.save_file({"weight": torch.ones(2)} | integers, path)
    files = open_tensor_file(path)
    assert dict(files.select(lambda name: name == "weight").stream()).keys() == {"weight"}
    with pytest.raises(
        ValueError, match=r"'scale' in mixed.safetensors: found dtype F8_E4M3, expected one of F32, F16"
    ):
        files.select(lambda name: name in ("weight", "scale"))
    with pytest.raises(ValueError, match=r"'position_ids' in mixed.safetensors: found dtype I64"):
        files.select(lambda name: True)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_not_finite_values_are_counted(dtype: np.dtype, value: float) -> None:
    tensor = np.ones((3, 4), dtype)
    tensor[0, 1] = tensor[2, 3] = value
    with pytest.raises(ValueError, match=r"^tensor 'x' in f: found 2 values that are NaN or infinite, expected none$"):
        check_finite("x", tensor, Path("f"))


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_all_finite_values_pass(dtype: np.dtype) -> None:
    limits = ml_dtypes.finfo(dtype)
    extremes = np.array([limits.max, limits.min, limits.tiny, limits.smallest_subnormal, 0, -0.0], dtype)
    check_finite("x", extremes, Path("f"))
    check_finite("x", np.empty((0, 3), dtype), Path("f"))


def test_not_finite_value_stops_the_stream_at_its_tensor(tmp_path: Path) -> None:
    tensors = random_tensors() | {"b.weight": np.full((3, 4), np.inf, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / f"{STEM}.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'b.weight' in model.safetensors: found 12 values"):
        read(tmp_path)


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / f"{STEM}.safetensors"
    safetensors.numpy.save_file({"x": np.ones(100, np.float32)}, path)
    files = open_tensor_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tensor 'x' in model.safetensors: file truncated while reading"):
        list(files.stream())


HEADERS: dict[str, tuple[Any, bytes, int | None, str]] = {  # header, data, its claimed length → what is said
    "no JSON": (b"{'x'", b"", None, "damaged JSON"),
    "no UTF-8": (b"\xff\xfe{}", b"", None, "damaged JSON"),
    "bottomless": (b'{"a":' * 100_000, b"", None, "damaged JSON"),
    "no object": (b"[]", b"", None, "found list, expected a JSON object"),
    "longer than the file": ({}, b"", 1000, r"truncated or no safetensors file \(10 bytes, header of 1000\)"),
    "of a terabyte": ({}, b"", 1 << 40, "truncated or no safetensors file"),
    "name twice": (b'{"x":{},"x":{}}', b"", None, r"damaged JSON \(key 'x' appears twice\)"),
    "no fields": ({"x": {}}, b"", None, "damaged header at tensor 'x'"),
    "fields of a list": ({"x": [1]}, b"", None, "damaged header at tensor 'x'"),
    "three offsets": ({"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4, 8]}}, b"", None, "damaged header at"),
    "text as offset": ({"x": entry("0", "8")}, b"12345678", None, "damaged header at tensor 'x'"),
    "negative offset": ({"x": entry(-8, 0)}, b"12345678", None, "damaged header at tensor 'x'"),
    "negative shape": ({"x": entry(shape=[-1, -2])}, b"12345678", None, "damaged header at tensor 'x'"),
    "fractional shape": ({"x": entry(shape=[2.0])}, b"12345678", None, "damaged header at tensor 'x'"),
    "unknown dtype": ({"x": entry(dtype="F12")}, b"12345678", None, "found dtype F12, which is not known"),
    "too few bytes for the shape": ({"x": entry(shape=[3])}, b"12345678", None, "8 bytes do not hold shape"),
    "gap": ({"x": entry(), "y": entry(12, 20)}, b"1" * 20, None, "'y' in .*: begins at byte .*, expected"),
    "overlap": ({"x": entry(), "y": entry(4, 12)}, b"1" * 12, None, "'y' in .*: begins at byte .*, expected"),
    "truncated data": ({"x": entry(), "y": entry(8, 16)}, b"1" * 12, None, "'y' in .*: file truncated, .* expected at"),
    "overlong data": ({"x": entry()}, b"1" * 12, None, "found .* bytes, expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_file(case: str, tmp_path: Path) -> None:
    header, data, length, message = HEADERS[case]
    path = write_header(tmp_path / "damaged.safetensors", header, data, length)
    with pytest.raises(ValueError, match=message) as caught:
        open_tensor_file(path)
    assert "damaged.safetensors" in str(caught.value)


@pytest.mark.parametrize("size", [0, 4])
def test_file_shorter_than_its_first_field(size: int, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"\0" * size)
    with pytest.raises(ValueError, match=f"truncated or no safetensors file \\({size} bytes"):
        open_tensor_file(path)


def damage_index(change: Callable[[dict[str, str]], Any], folder: Path) -> None:
    ones = np.ones(2, np.float32)
    weight_map = write_shards(folder, {"one.safetensors": {"x": ones}, "two.safetensors": {"y": ones, "z": ones}})
    write_index(folder, change(weight_map))


INDICES: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "no map": (lambda found: [], "found no weight_map"),
    "no file names": (lambda found: found | {"x": ["one.safetensors"]}, "found no weight_map"),
    "missing shard": (lambda found: found | {"x": "three.safetensors"}, "three.safetensors: missing, but .* lists it"),
    "tensor in another shard": (lambda found: found | {"z": "one.safetensors"}, "'z': found in two.*, expected in one"),
    "tensor that is in no shard": (lambda found: found | {"w": "one.safetensors"}, "'w': missing from one.safetensors"),
    "tensor that the index lacks": (lambda found: {"x": found["x"], "y": found["y"]}, "'z': found in two.*expected no"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDICES)
def test_damaged_index(case: str, tmp_path: Path) -> None:
    change, message = INDICES[case]
    damage_index(change, tmp_path)
    with pytest.raises(ValueError, match=message):
        open_tensor_files(tmp_path, STEM)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    damage_index(lambda found: found, tmp_path)
    safetensors.numpy.save_file(dict.fromkeys("xz", np.ones(2, np.float32)), tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"'z': found in one.safetensors, expected in two.safetensors by model"):
        open_tensor_files(tmp_path, STEM)


def test_which_file_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found neither model.safetensors nor model.safetensors.index.json$"):
        open_tensor_files(tmp_path, STEM)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"found neither .* \(found pytorch_model.bin, a pickle, which is not read\)"):
        open_tensor_files(tmp_path, STEM)
    damage_index(lambda found: found, tmp_path)
    safetensors.numpy.save_file(random_tensors(), tmp_path / f"{STEM}.safetensors")
    with pytest.raises(ValueError, match=r"found both model.safetensors and model.safetensors.index.json"):
        open_tensor_files(tmp_path, STEM)


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    with pytest.raises(ValueError, match=r"any.json: no such file"):
        read_json(path)
    path.write_text('{"a": {"b": 1}}')
    assert read_json(path) == {"a": {"b": 1}}
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ValueError, match=r"any.json: damaged JSON .*key 'b' appears twice"):
        read_json(path)


def test_hash(tmp_path: Path) -> None:
    path = tmp_path / "any"
    data = bytes(range(256)) * 40_000  # more than one block
    path.write_bytes(data)
    counts: list[int] = []
    assert hash_file(path, counts.append) == hashlib.sha256(data).hexdigest()
    assert sum(counts) == len(data)


def test_system_error_names_the_file() -> None:
    with pytest.raises(OSError, match="Input/output error") as caught:
        hash_file(Path("/proc/self/mem"))  # whose first page nobody may read
    assert caught.value.filename == "/proc/self/mem"
