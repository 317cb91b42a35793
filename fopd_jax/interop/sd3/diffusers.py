"""diffusers' `SD3Transformer2DModel` ↔ our MMDiT: names, layouts, configuration. Arrays are numpy's, never torch's.

The name table below is the only place that knows both sides. Which leaves a module has, and their shapes, come from
the network itself, so that a tensor is checked against what the network will read. Module paths are those of the
per-layer form of the parameter tree (`convert_layers(…, scan=False)`).
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fopd_jax.interop.files.tables import (
    LINEAR,
    Component,
    Source,
    check_names,
    from_tensors,
    locate,
    parameter_shapes,
    to_tensors,
)
from fopd_jax.models.mmdit import (
    LAYER_STACKS,
    MMDiT,
    MMDiTConfig,
    centre_crop,
    convert_layers,
    position_table,
)

Names = tuple[tuple[str, str], ...]  # (our path, diffusers' path)

_NETWORK: Names = (
    ("patch_embed", "pos_embed.proj"),
    ("time_embed/linear_1", "time_text_embed.timestep_embedder.linear_1"),
    ("time_embed/linear_2", "time_text_embed.timestep_embedder.linear_2"),
    ("pooled_embed/linear_1", "time_text_embed.text_embedder.linear_1"),
    ("pooled_embed/linear_2", "time_text_embed.text_embedder.linear_2"),
    ("context_embed", "context_embedder"),
    ("norm_out/linear", "norm_out.linear"),
    ("proj_out", "proj_out"),
)
_BLOCK: Names = (
    ("norm1/linear", "norm1.linear"),
    ("norm1_context/linear", "norm1_context.linear"),
    ("attn/to_q", "attn.to_q"),
    ("attn/to_k", "attn.to_k"),
    ("attn/to_v", "attn.to_v"),
    ("attn/add_q_proj", "attn.add_q_proj"),
    ("attn/add_k_proj", "attn.add_k_proj"),
    ("attn/add_v_proj", "attn.add_v_proj"),
    ("attn/to_out", "attn.to_out.0"),
    ("ff/up", "ff.net.0.proj"),
    ("ff/down", "ff.net.2"),
)
_BLOCK_QK_NORM: Names = (
    ("attn/norm_q", "attn.norm_q"),
    ("attn/norm_k", "attn.norm_k"),
    ("attn/norm_added_q", "attn.norm_added_q"),
    ("attn/norm_added_k", "attn.norm_added_k"),
)
_BLOCK_TEXT_OUTPUT: Names = (  # every block but the last, which only reads the text
    ("attn/to_add_out", "attn.to_add_out"),
    ("ff_context/up", "ff_context.net.0.proj"),
    ("ff_context/down", "ff_context.net.2"),
)
_BLOCK_DUAL: Names = (
    ("attn2/to_q", "attn2.to_q"),
    ("attn2/to_k", "attn2.to_k"),
    ("attn2/to_v", "attn2.to_v"),
    ("attn2/to_out", "attn2.to_out.0"),
)
_BLOCK_DUAL_QK_NORM: Names = (
    ("attn2/norm_q", "attn2.norm_q"),
    ("attn2/norm_k", "attn2.norm_k"),
)
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight"}
_SIZES = (
    "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size",
)  # fmt: skip
TABLE = "pos_embed.pos_embed"
CLASS_NAME = "SD3Transformer2DModel"


def module_names(config: MMDiTConfig) -> dict[str, str]:
    """Every module that owns parameters: our path → diffusers' path.

    For SD3.5-Medium, with 13 dual blocks, "blocks_3/attn/to_q" → "transformer_blocks.16.attn.to_q".
    """
    names = dict(_NETWORK)
    for index in range(config.depth):
        ours, theirs = _block_name(config, index), f"transformer_blocks.{index}"
        names |= {f"{ours}/{a}": f"{theirs}.{b}" for a, b in _block_modules(config, index)}
    return names


def _block_name(config: MMDiTConfig, index: int) -> str:
    if index == config.depth - 1:
        return "last_block"
    if index < config.dual_layers:
        return f"dual_blocks_{index}"
    return f"blocks_{index - config.dual_layers}"


def _block_modules(config: MMDiTConfig, index: int) -> Names:
    dual, last = index < config.dual_layers, index == config.depth - 1
    return (
        _BLOCK
        + (_BLOCK_QK_NORM if config.qk_norm else ())
        + (() if last else _BLOCK_TEXT_OUTPUT)
        + (_BLOCK_DUAL if dual else ())
        + (_BLOCK_DUAL_QK_NORM if dual and config.qk_norm else ())
    )


@functools.lru_cache(maxsize=8)
def transformer_component(config: MMDiTConfig) -> Component:
    """The name table of an `SD3Transformer2DModel`; its fixed position table is kept beside the parameters."""
    p = config.patch_size
    inputs = (
        jnp.zeros((1, p, p, config.channels)),
        jnp.zeros(1),
        jnp.zeros((1, 1, config.context_dim)),
        jnp.zeros((1, config.pooled_dim)),
    )
    shapes = parameter_shapes(MMDiT(config).init, *inputs)
    leaves: dict[str, list[str]] = {}
    for path in shapes:
        module, _, leaf = path.rpartition("/")
        leaves.setdefault(module, []).append(leaf)
    return Component(
        config=config,
        shapes=shapes,
        sources={
            f"{module}/{leaf}": _source(config, module, theirs, leaf)
            for module, theirs in module_names(config).items()
            for leaf in leaves[locate(module, LAYER_STACKS)[0]]
        },
        stacks=LAYER_STACKS,
        kept={TABLE: (1, config.table_size**2, config.width)},
    )


def _source(config: MMDiTConfig, module: str, theirs: str, leaf: str) -> Source:
    name = f"{theirs}.{_LEAVES[leaf]}"
    if module == "patch_embed" and leaf == "kernel":
        return Source(name, "D c p q -> (p q c) D", (("p", config.patch_size), ("q", config.patch_size)))
    return Source(name, LINEAR) if leaf == "kernel" else Source(name)


def transformer_from_diffusers(
    tensors: Mapping[str, np.ndarray], config: MMDiTConfig, *, rows: int, columns: int, scan: bool = True
) -> dict[str, Any]:
    """Variables of `MMDiT` from the state dict of an `SD3Transformer2DModel`; every tensor is used exactly once.

    Args:
      tensors: name → array of any floating dtype, which is kept.
      config: must describe the same network (see `config_from_diffusers`).
      rows: rows of the grid of patches that the position table is cropped to.
      columns: its columns.
      scan: stacked layers (`MMDiT.scan_layers=True`) or per-layer form.

    Returns:
      `{"params": …, "constants": {"pos_embed": [rows, columns, D]}}`, unboxed numpy leaves. The position table is the
      middle of the checkpoint's own one.

    Raises:
      ValueError: a tensor is missing, superfluous or misshapen, or the grid exceeds the table.
    """
    params = from_tensors(transformer_component(config), tensors)
    side = config.table_size
    table = centre_crop(tensors[TABLE].reshape(side, side, config.width), rows, columns)
    constants = {"pos_embed": np.array(table)}  # a copy, so that the whole table can be freed
    return {"params": params if scan else convert_layers(params, scan=False), "constants": constants}


def transformer_to_diffusers(
    variables: Mapping[str, Any], config: MMDiTConfig, *, table: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """State dict of an `SD3Transformer2DModel` from variables of `MMDiT`, stacked or per-layer, boxed or not.

    The variables hold only a crop of the position table. Written is `table`, a checkpoint's own
    `pos_embed.pos_embed` [1, table_size², D], where given, else the closed form in float32 (0.9 GB for SD3.5-Medium).
    Either must reproduce the crop, up to one rounding of the crop's dtype or 1e-6.

    Raises:
      ValueError: a parameter is missing, superfluous or misshapen, or the table does not reproduce the crop.
    """
    params = nn.unbox(variables["params"])
    tensors = to_tensors(transformer_component(config), convert_layers(params, scan=True))
    return tensors | {TABLE: _whole_table(np.asarray(nn.unbox(variables["constants"])["pos_embed"]), config, table)}


def _whole_table(crop: np.ndarray, config: MMDiTConfig, table: np.ndarray | None) -> np.ndarray:
    side = config.table_size
    shape = (1, side**2, config.width)
    whole = position_table(config, side, side).reshape(shape) if table is None else table
    check_names({TABLE: whole.shape}, {TABLE: shape})
    middle = centre_crop(whole.reshape(side, side, config.width), *crop.shape[:2])
    check_names({"pos_embed": crop.shape}, {"pos_embed": middle.shape}, "constant")
    difference = float(np.abs(np.asarray(middle, np.float32) - np.asarray(crop, np.float32)).max())
    allowed = max(1e-6, float(jnp.finfo(crop.dtype).eps))
    if difference > allowed:
        raise ValueError(
            f"tensor {TABLE!r}: its middle differs from the variables' pos_embed by {difference:.2g}, "
            f"more than {allowed:.2g}; pass the table of the checkpoint that the variables came from"
        )
    return whole


def config_from_diffusers(config: Mapping[str, Any]) -> MMDiTConfig:
    """Our configuration from the `config.json` of an `SD3Transformer2DModel`.

    Raises:
      ValueError: a field is missing or describes a network that MMDiT is not; names field, found and right value.
    """
    if (kind := config.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise _wrong("_class_name", kind, repr(CLASS_NAME))
    for field in (*_SIZES, "out_channels"):
        if field not in config:
            raise _wrong(field, "nothing", "a value")
    for field in _SIZES:
        if type(config[field]) is not int or config[field] < 1:
            raise _wrong(field, repr(config[field]), "a positive integer")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["caption_projection_dim"] != width:
        raise _wrong("caption_projection_dim", config["caption_projection_dim"], width)
    if config["out_channels"] not in (None, config["in_channels"]):
        raise _wrong("out_channels", config["out_channels"], config["in_channels"])
    # SD3's own configuration predates these two fields: diffusers' defaults stand for them.
    if (qk_norm := config.get("qk_norm")) not in (None, "rms_norm"):
        raise _wrong("qk_norm", repr(qk_norm), "None or 'rms_norm'")
    return MMDiTConfig(
        depth=config["num_layers"],
        num_heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        dual_layers=_dual_layers(config.get("dual_attention_layers") or (), config["num_layers"]),
        qk_norm=qk_norm is not None,
        patch_size=config["patch_size"],
        channels=config["in_channels"],
        context_dim=config["joint_attention_dim"],
        pooled_dim=config["pooled_projection_dim"],
        table_size=config["pos_embed_max_size"],
        base_size=config["sample_size"] // config["patch_size"],
    )


def _dual_layers(listed: Any, depth: int) -> int:
    """How many blocks are dual: the first ones, never the last."""
    if not isinstance(listed, list | tuple):
        raise _wrong("dual_attention_layers", repr(listed), "a list")
    leading = list(range(min(len(listed), depth - 1)))
    if list(listed) != leading:
        raise _wrong("dual_attention_layers", list(listed), leading)
    return len(listed)


def _wrong(field: str, found: Any, right: Any) -> ValueError:
    return ValueError(f"transformer config {field}: found {found}, expected {right}")
