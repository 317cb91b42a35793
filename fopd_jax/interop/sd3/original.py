"""The original single-file layout of SD3's transformer (`sd3.5_medium.safetensors`) ↔ diffusers' names.

Queries, keys and values are one fused tensor there, and the two norms that diffusers orders (scale, shift) are ordered
(shift, scale). The file may also hold the autoencoder and text encoders, which are not read.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from math import isqrt
from typing import Any

import numpy as np

from fopd_jax.interop.files.tables import Shape
from fopd_jax.interop.sd3.diffusers import TABLE

PREFIX = "model.diffusion_model."
OTHER_NETWORKS = ("first_stage_model.", "text_encoders.", "conditioner.", "cond_stage_model.")
_BLOCK_NAME = re.compile(re.escape(PREFIX) + r"joint_blocks\.(\d+)\.")
_FIRST = "x_embedder.proj.weight"  # stands once in a file of one transformer
_DIFFUSERS_ALONE = "transformer_blocks.0.attn.to_q.weight"
_HEAD_DIM = 64  # of every published SD3; only the norms of q and k tell

_NETWORK = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """One original tensor: the diffusers tensors that it holds along its first axis, halves swapped or not."""

    parts: tuple[str, ...]
    swapped: bool = False

    def split(self, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        if self.swapped:
            tensor = np.roll(tensor, len(tensor) // 2, axis=0)
        yield from zip(self.parts, np.split(tensor, len(self.parts)), strict=True)


def origins(shapes: Mapping[str, Shape]) -> dict[str, tuple[Origin, Shape]]:
    """Every tensor that the original file must hold → what it is made of, and its shape.

    `shapes`: diffusers' names and shapes of the same network.
    """
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("transformer_blocks."))
    wanted = {PREFIX + "pos_embed": Origin((TABLE,))}
    for leaf in ("weight", "bias"):
        for ours, theirs in _NETWORK.items():
            swapped = theirs == "norm_out.linear"
            wanted[f"{PREFIX}{ours}.{leaf}"] = Origin((f"{theirs}.{leaf}",), swapped)
        for index in range(depth):
            here, there = f"{PREFIX}joint_blocks.{index}", f"transformer_blocks.{index}"
            for ours, theirs in _BLOCK.items():
                swapped = theirs == "norm1_context.linear" and index == depth - 1
                wanted[f"{here}.{ours}.{leaf}"] = Origin((f"{there}.{theirs}.{leaf}",), swapped)
            for ours, parts in _FUSED.items():
                wanted[f"{here}.{ours}.{leaf}"] = Origin(tuple(f"{there}.{part}.{leaf}" for part in parts))
    # A network has the tensors that diffusers' list says: no second attention here, no norm there.
    present = {name: origin for name, origin in wanted.items() if origin.parts[0] in shapes}
    return {name: (origin, _joined([shapes[part] for part in origin.parts])) for name, origin in present.items()}


def module_parts(depth: int) -> dict[str, tuple[str, ...]]:
    """Every linear layer or norm of an original network of `depth` blocks, without the prefix → the modules of
    diffusers that it holds along its outputs, whether the network has them or not."""
    parts: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _NETWORK.items()}
    for index in range(depth):
        blocks = {**{ours: (theirs,) for ours, theirs in _BLOCK.items()}, **_FUSED}
        for ours, theirs in blocks.items():
            parts[f"joint_blocks.{index}.{ours}"] = tuple(f"transformer_blocks.{index}.{part}" for part in theirs)
    return parts


def _joined(shapes: list[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def names(found: Iterable[str]) -> dict[str, str]:
    """The published file's name of every tensor in a file, whose own prefix, or none, stands for `PREFIX`.

    Raises:
      ValueError: the names are diffusers'.
    """
    found = list(found)
    if _DIFFUSERS_ALONE in found:
        raise ValueError(f"found diffusers' names ({_DIFFUSERS_ALONE!r}); give the folder that also holds config.json")
    prefixes = [name.removesuffix(_FIRST) for name in found if name.endswith(_FIRST)]
    own = prefixes[0] if len(prefixes) == 1 else PREFIX
    moved = [name for name in found if name.startswith(own) and not (own == "" and name.startswith(OTHER_NETWORKS))]
    return {name: name for name in found} | {name: PREFIX + name[len(own) :] for name in moved}


def belongs_to_another_network(name: str) -> bool:
    return name.startswith(OTHER_NETWORKS)


def infer_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """diffusers' `config.json` of the transformer in an original file, from its tensors' names and shapes.

    Raises:
      ValueError: the tensors that tell are not there, or of another rank; names the first.
    """
    width, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", "(width, channels, patch, patch)")
    outputs, _ = _shape(shapes, "final_layer.linear.weight", "(outputs, width)")
    _, context = _shape(shapes, "context_embedder.weight", "(width, context)")
    _, pooled = _shape(shapes, "y_embedder.mlp.0.weight", "(width, pooled)")
    _, patches, _ = _shape(shapes, "pos_embed", "(1, patches, width)")
    _shape(shapes, "joint_blocks.0.x_block.attn.qkv.weight", "(3 width, width)")
    norm = shapes.get(f"{PREFIX}joint_blocks.0.x_block.attn.ln_q.weight")
    head_dim = norm[0] if norm and norm[0] and width % norm[0] == 0 else _HEAD_DIM
    blocks = {int(match[1]) for name in shapes if (match := _BLOCK_NAME.match(name))}
    dual = [i for i in sorted(blocks) if f"{PREFIX}joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes]
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": outputs // patch**2,
        "num_layers": len(blocks),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": context,
        "caption_projection_dim": width,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": isqrt(patches),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if norm is not None else None,
    }


def _shape(shapes: Mapping[str, Shape], name: str, expected: str) -> Shape:
    """The shape of a tensor that tells something about the network: of the expected rank, nowhere zero."""
    name = PREFIX + name
    if name not in shapes:
        raise ValueError(f"tensor {name!r}: missing, expected one of shape {expected} in an original SD3 file")
    shape = shapes[name]
    if len(shape) != expected.count(",") + 1 or 0 in shape:
        raise ValueError(f"tensor {name!r}: found shape {shape}, expected {expected}")
    return shape
