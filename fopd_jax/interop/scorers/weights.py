"""Weights of a scoring network as one file of ours: which network, its shape, its parameters, where they came from."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fopd_jax.interop.files.safetensors import Tree, load_tree, save_tree

CONVERTER = "tools/convert_reward_weights.py"


def save_weights(path: Path, network: str, shape: Mapping[str, Any], params: Tree, source: Mapping[str, Any]) -> None:
    """Write a converted network: `network` names it ("clip", "blip", …), `shape` is its config as JSON.

    `source`: from what it was converted, as name and hash of each file.
    """
    save_tree(path, params, {"network": network, "shape": dict(shape), "source": dict(source)})


def load_weights(path: Path, network: str, field: str) -> tuple[dict[str, Any], Tree]:
    """A converted network's shape and parameters, float32 numpy arrays; `field` is the config's that names the file.

    Raises:
      ValueError: there is no such file, or it is another network's; names field and file.
    """
    try:
        params, metadata = load_tree(path)
    except ValueError as error:
        raise ValueError(f"{field}: {error}; {CONVERTER} makes it") from error
    if metadata.get("network") != network:
        found = metadata.get("network", "no scoring network")
        raise ValueError(f"{field}: {path}: found {found}, expected {network}, as {CONVERTER} makes it")
    return metadata["shape"], params


# ---- what the tensors of a published file say of its network


def shape_of(tensors: Mapping[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    """A tensor's shape.

    Raises:
      ValueError: it is missing, or has not so many axes; names it.
    """
    if name not in tensors:
        raise ValueError(f"tensor {name!r}: missing")
    if tensors[name].ndim != rank:
        raise ValueError(f"tensor {name!r}: found shape {tensors[name].shape}, expected {rank} axes")
    return tensors[name].shape


def depth_of(names: Iterable[str], module: str) -> int:
    """How many layers have a weight of `module`, in whose name `{}` stands for the number of a layer."""
    pattern = re.compile(re.escape(module).replace(r"\{\}", r"(\d+)") + r"\.weight")
    return 1 + max((int(found[1]) for each in names if (found := pattern.fullmatch(each))), default=-1)
