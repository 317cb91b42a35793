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

from fopd_jax.adapters.lora import Adapter
from fopd_jax.files import write_tensors

Tree = Any
FORMAT = "fopd_jax/1"


def save_tree(path: Path, tree: Tree, metadata: Mapping[str, Any], dtype: str = "float32") -> None:
    """Write a nested dict of arrays; names are joined by '/'. Metadata values are stored as JSON.

    Equal trees and metadata give equal bytes.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(jax.device_get(tree), sep="/")
    tensors = {name: np.asarray(value.astype(np.dtype(dtype))) for name, value in flat.items()}
    header = {"format": FORMAT, **{key: json.dumps(value) for key, value in metadata.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, header)


def load_tree(path: Path) -> tuple[Tree, dict[str, Any]]:
    """Read what `save_tree` wrote: a nested dict of float32 numpy arrays, and the metadata.

    Raises:
      ValueError: the file is missing, damaged or of another format; names the file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            if metadata.pop("format", None) != FORMAT:
                raise ValueError(f"{path}: not written by fopd_jax (its metadata lacks format {FORMAT!r})")
            flat = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or no safetensors file ({error})") from error
    return traverse_util.unflatten_dict(flat, sep="/"), {key: json.loads(value) for key, value in metadata.items()}


def is_own_file(path: Path) -> bool:
    """Whether a file is there and says that this project wrote it."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def save_adapter(path: Path, adapter: Adapter, metadata: Mapping[str, Any]) -> None:
    """Write an adapter; its scale travels in the metadata."""
    save_tree(path, adapter.weights, {**metadata, "scale": adapter.scale})


def load_adapter(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """Read an adapter.

    Raises:
      ValueError: as `load_tree`, or the file holds no adapter.
    """
    weights, metadata = load_tree(path)
    if "scale" not in metadata:
        raise ValueError(f"{path}: holds no adapter (its metadata has no 'scale')")
    return Adapter(weights, metadata["scale"]), metadata


def check_preset(path: Path, metadata: Mapping[str, Any], preset: str) -> None:
    """Refuse weights of another preset.

    Raises:
      ValueError: names the file, the preset found and the one expected.
    """
    if metadata.get("preset") != preset:
        raise ValueError(f"{path}: weights of preset {metadata.get('preset')!r}, but model.preset is {preset!r}")
