"""Read and write parameter and adapter trees as safetensors, with their metadata, atomically."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, so that safetensors can return it
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from fopd_jax.adapters.card import AdapterCard, parse_card
from fopd_jax.adapters.lora import Adapter
from fopd_jax.exits import naming
from fopd_jax.files import write_tensors
from fopd_jax.interop.files.tensor_files import DTYPES, check_finite, other_format

Tree = Any
FORMAT = "fopd_jax/1"
CARD = "fopd_jax"
"""Under which an adapter's card stands in the metadata of its file, in this project's format and in others'."""
LARGEST_SCALE = 1e6
"""Of an adapter: what `adapter.alpha` may reach at rank 1."""


def save_tree(path: Path, tree: Tree, metadata: Mapping[str, Any], dtype: str = "float32") -> None:
    """Write a nested dict of arrays; names are joined by '/'. Metadata values are stored as JSON.

    Equal trees and metadata give equal bytes.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(jax.device_get(tree), sep="/")
    tensors = {name: np.asarray(value).astype(np.dtype(dtype), copy=False) for name, value in flat.items()}
    header = {"format": FORMAT, **{key: json.dumps(value) for key, value in metadata.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, header)


def load_tree(path: Path) -> tuple[Tree, dict[str, Any]]:
    """Read what `save_tree` wrote: a nested dict of float32 numpy arrays, and the metadata.

    Raises:
      ValueError: the file is missing, damaged or of another format, or a tensor of it is no tree's or of another dtype
        than float32, float16 and bfloat16; names the file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file{' but a folder' * path.is_dir()}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            if metadata.pop("format", None) != FORMAT:
                raise ValueError(f"{path}: not written by fopd_jax (its metadata lacks format {FORMAT!r})")
            flat = {name: _read(file, name, path) for name in _names(file, path)}
    except SafetensorError as error:
        raise ValueError(f"{path}: {other_format(path) or f'damaged or no safetensors file ({error})'}") from error
    return traverse_util.unflatten_dict(flat, sep="/"), {key: _value(key, metadata[key], path) for key in metadata}


def _names(file: Any, path: Path) -> list[str]:
    """Names of a file's tensors, which make a tree: none is both a leaf and a branch."""
    names: list[str] = sorted(file.keys())
    branches = {name[:at] for name in names for at, letter in enumerate(name) if letter == "/"}
    if not names:
        raise ValueError(f"{path}: found no tensors")
    if wrong := [name for name in names if name in branches or not all(name.split("/"))]:
        raise ValueError(f"tensor {wrong[0]!r} in {path}: found a name that is no leaf of a tree")
    return names


def _read(file: Any, name: str, path: Path) -> np.ndarray:
    if (kind := file.get_slice(name).get_dtype()) not in DTYPES:
        raise ValueError(f"tensor {name!r} in {path}: found dtype {kind}, expected one of {', '.join(DTYPES)}")
    return file.get_tensor(name).astype(np.float32, copy=False)


def _value(key: str, text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: metadata {key}: found {text[:80]!r}, expected JSON") from error


def check_numbers(path: Path, tree: Tree) -> None:
    """Refuse what a network cannot compute with.

    Raises:
      ValueError: a number of a file's tree is NaN or infinite; names the tensor.
    """
    for name, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        check_finite(name, np.asarray(leaf), path)


def is_own_file(path: Path) -> bool:
    """Whether a file is there and says that this project wrote it; no pipe is opened, which may never answer."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def read_header(path: Path) -> dict[str, str]:
    """The metadata of any safetensors file; reads nothing else of it.

    Raises:
      ValueError: there is no such file, or it is damaged or none; does not name it.
    """
    if not path.is_file():
        raise ValueError("no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(other_format(path) or f"damaged or no safetensors file ({error})") from error


def save_adapter(path: Path, adapter: Adapter, metadata: Mapping[str, Any], card: AdapterCard | None = None) -> None:
    """Write an adapter; its scale travels in the metadata, and its card if it has one."""
    about = {} if card is None else {CARD: card.fields()}
    save_tree(path, adapter.weights, {**metadata, "scale": adapter.scale, **about})


def load_adapter(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """Read an adapter.

    Raises:
      ValueError: as `load_tree`, or the file holds no adapter, or a card that is none.
    """
    weights, metadata = load_tree(path)
    if "scale" not in metadata:
        raise ValueError(f"{path}: holds no adapter (its metadata has no 'scale')")
    scale = metadata["scale"]
    if type(scale) not in (int, float) or not 0 < abs(scale) <= LARGEST_SCALE:
        expected = f"a number other than 0, at most {LARGEST_SCALE:g}"
        raise ValueError(f"{path}: metadata scale: found {json.dumps(scale)[:80]}, expected {expected}")
    if CARD in metadata:
        with naming(f"{path}: metadata {CARD}"):
            parse_card(metadata[CARD])
    check_numbers(path, weights)
    _check_factors(weights, path)
    return Adapter(weights, float(scale)), metadata


def _check_factors(weights: Tree, path: Path) -> None:
    """Refuse what is no pair of factors a `[…, in, R]`, b `[…, R, out]` a layer."""
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(weights)
    for layer in sorted({name[:-1] for name in leaves}):
        found = {name[-1]: leaf.shape for name, leaf in leaves.items() if name[:-1] == layer}
        a, b = found.get("a", ()), found.get("b", ())
        if found.keys() != {"a", "b"} or min(len(a), len(b)) < 2 or not a[-1] == b[-2] > 0:
            shapes = ", ".join(f"{name} {shape}" for name, shape in sorted(found.items()))
            raise ValueError(f"{path}: layer {'/'.join(layer)!r}: found {shapes}, expected a [in, R] and b [R, out]")


def check_preset(path: Path, metadata: Mapping[str, Any], preset: str) -> None:
    """Refuse weights of another preset.

    Raises:
      ValueError: names the file, the preset found and the one expected.
    """
    if metadata.get("preset") != preset:
        raise ValueError(f"{path}: weights of preset {metadata.get('preset')!r}, but model.preset is {preset!r}")
