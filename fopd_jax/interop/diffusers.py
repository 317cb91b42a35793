"""diffusers' `SD3Transformer2DModel` ↔ our MMDiT: names, layouts, configuration. Arrays are numpy's, never torch's.

The name table below is the only place that knows both sides. Which leaves a module has, and their shapes, come from
the network itself, so that a tensor is checked against what the network will read. Module paths are those of the
per-layer form of the parameter tree (`convert_layers(…, scan=False)`); a path is the tree's keys joined by "/".
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from fopd_jax.models.mmdit import MMDiT, MMDiTConfig, centre_crop, convert_layers, position_table

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
_PATCH_KERNEL = "patch_embed/kernel"
_TABLE = "pos_embed.pos_embed"


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
def _parameter_shapes(config: MMDiTConfig) -> Mapping[str, tuple[int, ...]]:
    """Path → shape of every parameter, in per-layer form, from an abstract initialisation."""
    p = config.patch_size
    inputs = (
        jnp.zeros((1, p, p, config.channels)),
        jnp.zeros(1),
        jnp.zeros((1, 1, config.context_dim)),
        jnp.zeros((1, config.pooled_dim)),
    )
    variables = jax.eval_shape(MMDiT(config, scan_layers=False).init, jax.random.key(0), *inputs)
    return {path: leaf.shape for path, leaf in _flatten(nn.unbox(variables["params"])).items()}


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return dict(flatten_dict(tree, sep="/"))


def _tensor_names(config: MMDiTConfig) -> dict[str, str]:
    """Parameter path → diffusers' tensor name."""
    modules = module_names(config)
    names = {}
    for path in _parameter_shapes(config):
        module, _, leaf = path.rpartition("/")
        names[path] = f"{modules[module]}.{_LEAVES[leaf]}"
    return names


def _tensor_shape(path: str, config: MMDiTConfig) -> tuple[int, ...]:
    if path == _PATCH_KERNEL:
        return config.width, config.channels, config.patch_size, config.patch_size
    return _parameter_shapes(config)[path][::-1]


def _table_shape(config: MMDiTConfig) -> tuple[int, int, int]:
    return 1, config.table_size**2, config.width


def _from_torch(path: str, tensor: np.ndarray) -> np.ndarray:
    """[out, in] → [in, out], the patch convolution [D, c, p, q] → [(p q c), D], vectors as they are."""
    return rearrange(tensor, "D c p q -> (p q c) D") if path == _PATCH_KERNEL else tensor.T


def _to_torch(path: str, leaf: np.ndarray, config: MMDiTConfig) -> np.ndarray:
    """Inverse of `_from_torch`."""
    if path == _PATCH_KERNEL:
        return rearrange(leaf, "(p q c) D -> D c p q", p=config.patch_size, q=config.patch_size)
    return leaf.T


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(f"tensor {name!r}: found shape {found}, expected {expected}")


def _check_names(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse the first name that only one side has."""
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"tensor {name!r}: missing, expected shape {shape}")
    for name in found:
        if name not in expected:
            raise ValueError(f"tensor {name!r}: found shape {np.shape(found[name])}, expected no such tensor")


def transformer_from_diffusers(
    tensors: Mapping[str, np.ndarray], config: MMDiTConfig, *, rows: int, columns: int, scan: bool = True
) -> dict[str, Any]:
    """Variables of `MMDiT` from the state dict of an `SD3Transformer2DModel`; every tensor is used exactly once.

    Args:
      tensors: name → array of any floating dtype, which is kept. It may read lazily.
      config: must describe the same network (see `config_from_diffusers`).
      rows: rows of the grid of patches that the position table is cropped to.
      columns: its columns.
      scan: stacked layers (`MMDiT.scan_layers=True`) or per-layer form.

    Returns:
      `{"params": …, "constants": {"pos_embed": [rows, columns, D]}}`, unboxed numpy leaves. Kernels in per-layer
      form are transposed views of `tensors`. The position table is the middle of the checkpoint's own one.

    Raises:
      ValueError: a tensor is missing, superfluous or misshapen, or the grid exceeds the table.
    """
    names = _tensor_names(config)
    expected = {name: _tensor_shape(path, config) for path, name in names.items()} | {_TABLE: _table_shape(config)}
    _check_names(tensors, expected)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        _check_shape(name, tensor.shape, expected[name])
        return tensor

    side = config.table_size
    table = centre_crop(read(_TABLE).reshape(side, side, config.width), rows, columns)
    params = unflatten_dict({path: _from_torch(path, read(name)) for path, name in names.items()}, sep="/")
    constants = {"pos_embed": np.array(table)}  # a copy, so that the whole table can be freed
    return {"params": convert_layers(params, scan=True) if scan else params, "constants": constants}


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
    params = jax.tree.map(np.asarray, nn.unbox(variables["params"]))
    leaves = _flatten(convert_layers(params, scan=False))
    shapes = _parameter_shapes(config)
    _check_names(leaves, shapes)
    tensors = {}
    for path, name in _tensor_names(config).items():
        _check_shape(path, leaves[path].shape, shapes[path])
        # safetensors writes an array's memory as it lies, so transposed views must be copied.
        tensors[name] = np.ascontiguousarray(_to_torch(path, leaves[path], config))
    tensors[_TABLE] = _whole_table(np.asarray(nn.unbox(variables["constants"])["pos_embed"]), config, table)
    return tensors


def _whole_table(crop: np.ndarray, config: MMDiTConfig, table: np.ndarray | None) -> np.ndarray:
    side = config.table_size
    whole = position_table(config, side, side).reshape(_table_shape(config)) if table is None else table
    _check_shape(_TABLE, whole.shape, _table_shape(config))
    middle = centre_crop(whole.reshape(side, side, config.width), *crop.shape[:2])
    _check_shape("constants/pos_embed", crop.shape, middle.shape)
    difference = float(np.abs(np.asarray(middle, np.float32) - np.asarray(crop, np.float32)).max())
    allowed = max(1e-6, float(jnp.finfo(crop.dtype).eps))
    if difference > allowed:
        raise ValueError(
            f"tensor {_TABLE!r}: its middle differs from the variables' pos_embed by {difference:.2g}, "
            f"more than {allowed:.2g}; pass the table of the checkpoint that the variables came from"
        )
    return whole


def config_from_diffusers(config: Mapping[str, Any]) -> MMDiTConfig:
    """Our configuration from the `config.json` of an `SD3Transformer2DModel`.

    Raises:
      ValueError: a field is missing or describes a network that MMDiT is not; names field, found and right value.
    """
    if (kind := config.get("_class_name", "SD3Transformer2DModel")) != "SD3Transformer2DModel":
        raise _wrong("_class_name", kind, "'SD3Transformer2DModel'")
    fields = (
        "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size",
    )  # fmt: skip
    for field in fields:
        if field not in config:
            raise _wrong(field, "nothing", "a value")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["caption_projection_dim"] != width:
        raise _wrong("caption_projection_dim", config["caption_projection_dim"], width)
    if config["out_channels"] not in (None, config["in_channels"]):
        raise _wrong("out_channels", config["out_channels"], config["in_channels"])
    # SD3's own configuration predates these two fields: diffusers' defaults stand for them.
    if (qk_norm := config.get("qk_norm")) not in (None, "rms_norm"):
        raise _wrong("qk_norm", repr(qk_norm), "None or 'rms_norm'")
    dual, depth = list(config.get("dual_attention_layers") or ()), config["num_layers"]
    leading = list(range(min(len(dual), depth - 1)))  # the last block is never dual
    if dual != leading:
        raise _wrong("dual_attention_layers", dual, leading)
    return MMDiTConfig(
        depth=depth,
        num_heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        dual_layers=len(dual),
        qk_norm=qk_norm is not None,
        patch_size=config["patch_size"],
        channels=config["in_channels"],
        context_dim=config["joint_attention_dim"],
        pooled_dim=config["pooled_projection_dim"],
        table_size=config["pos_embed_max_size"],
        base_size=config["sample_size"] // config["patch_size"],
    )


def _wrong(field: str, found: Any, right: Any) -> ValueError:
    return ValueError(f"transformer config {field}: found {found}, expected {right}")
