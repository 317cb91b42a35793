"""Mask2Former over Swin, as transformers or mmdet publishes it → our parameters and the network's shape.

The tensors themselves tell the shape; transformers' `config.json` is only held to what they cannot tell.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fopd_jax.interop.files.tables import (
    CONVOLUTION,
    LINEAR,
    SAME,
    Component,
    Shape,
    Source,
    check_names,
    from_tensors,
    parameter_shapes,
)
from fopd_jax.interop.scorers.mask2former_names import LAYOUTS, Layout, Names
from fopd_jax.models.mask2former import STRIDE, DecoderConfig, Mask2Former, Mask2FormerConfig
from fopd_jax.models.pixel_decoder import LEVELS, POINTS, PixelDecoderConfig
from fopd_jax.models.swin import EPS, PATCH, SwinConfig

Tree = Any
STAGES = 4
_STACKS = {"encoder": tuple(f"stage{i + 1}" for i in range(STAGES)), "pixel_decoder": ("layers",), "decoder": ()}
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight"}
# A fixed table, the loss's weights, and a norm that newer versions write and a backbone never uses.
_UNUSED = re.compile(r".*\.relative_position_index|criterion\.empty_weight|.*\.encoder\.swin\.layernorm\.(weight|bias)")
_RIGHT = {
    "model_type": "mask2former",
    "activation_function": "relu",
    "pre_norm": False,
    "enforce_input_projection": False,
    "common_stride": PATCH,
}
_RIGHT_BACKBONE = {
    "model_type": "swin",
    "hidden_act": "gelu",
    "patch_size": PATCH,
    "layer_norm_eps": EPS,
    "qkv_bias": True,
    "use_absolute_embeddings": False,
}


def recognises(names: Collection[str]) -> bool:
    """Whether tensors of these names are a Mask2Former's, in one of the layouts."""
    return _layout(names) is not None


def convert(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None) -> tuple[dict[str, Any], Tree]:
    """A published checkpoint → the network's shape as JSON, which `network_config` reads, and float32 parameters.

    `config`: transformers' `config.json`, None for mmdet's checkpoint. Every tensor is used exactly once, but for fixed
    tables.

    Raises:
      ValueError: a tensor is missing, unknown or misshapen, or the config is another network's; names it.
    """
    layout = _layout(tensors)
    if layout is None:
        marks = " or ".join(repr(each.mark) for each in LAYOUTS)
        raise ValueError(f"Mask2Former: found no tensors whose names begin with one of {marks}")
    tensors = {name: tensor for name, tensor in tensors.items() if not _UNUSED.fullmatch(name)}
    ours = _read_shape(tensors, layout)
    _check_config(config or {}, ours)
    components = _components(ours, layout)
    shapes = {part: component.tensor_shapes() for part, component in components.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_names(found, _joined({name: shape for each in shapes.values() for name, shape in each.items()}))
    params = {
        part: from_tensors(component, {name: _piece(tensors, name, layout) for name in shapes[part]}, np.float32)
        for part, component in components.items()
    }
    return dataclasses.asdict(ours), params


def network_config(shape: Mapping[str, Any]) -> Mask2FormerConfig:
    """The network of a shape that `convert` made, after its way through JSON."""
    backbone = shape["backbone"]
    lists = {key: tuple(backbone[key]) for key in ("depths", "num_heads")}
    pixels, queries = PixelDecoderConfig(**shape["pixel_decoder"]), DecoderConfig(**shape["decoder"])
    return Mask2FormerConfig(SwinConfig(**{**backbone, **lists}), pixels, queries)


def _layout(names: Collection[str]) -> Layout | None:
    found = [layout for layout in LAYOUTS if any(name.startswith(layout.mark) for name in names)]
    return found[0] if len(found) == 1 else None


# ---- shape


def _read_shape(tensors: Mapping[str, np.ndarray], layout: Layout) -> Mask2FormerConfig:
    """What the tensors' own shapes say; that all agree is checked later."""

    def shape(module: str, ndim: int = 2, leaf: str = "weight") -> Shape:
        name = module + leaf
        found = tensors[name].shape if name in tensors else None
        if found is None or len(found) != ndim or 0 in found:
            raise ValueError(f"tensor {name!r}: found {found or 'nothing'}, expected an array of {ndim} axes")
        return found

    others, first = layout.others, layout.block_layers.format
    table = {"module": layout.block_names["attention"], "leaf": "relative_position_bias_table"}
    tables = [shape(first(stage, 0) + table["module"], leaf=table["leaf"]) for stage in range(STAGES)]
    width = shape(others["encoder/patch_embeddings"], 4)[0]
    backbone = SwinConfig(
        width=width,
        depths=tuple(_count(tensors, first(stage, "{}")) for stage in range(STAGES)),
        num_heads=tuple(each[1] for each in tables),
        window=(math.isqrt(tables[0][0]) + 1) // 2,
        mlp_ratio=shape(first(0, 0) + layout.block_names["fc1"])[0] // width,
    )
    layer = layout.pixel_layers.format(0)
    mask_width, pixel_width, *_ = shape(others["pixel_decoder/mask_projection"], 4)
    heads = shape(layer + layout.pixel_names["self_attn/attention_weights"])[0] // (LEVELS * POINTS)
    pixels = PixelDecoderConfig(
        width=pixel_width,
        mask_width=mask_width,
        depth=_count(tensors, layout.pixel_layers),
        num_heads=heads,
        mlp_dim=shape(layer + layout.pixel_names["fc1"])[0],
    )
    queries = DecoderConfig(
        depth=_count(tensors, layout.query_layers),
        num_heads=heads,
        mlp_dim=shape(layout.query_layers.format(0) + layout.query_names["fc1"])[0],
        num_queries=shape(others["decoder/queries_features"], leaf="")[0],
        num_classes=shape(others["decoder/class_predictor"])[0] - 1,
    )
    return Mask2FormerConfig(backbone, pixels, queries)


def _count(names: Collection[str], template: str) -> int:
    """How many numbers stand in a name's place."""
    pattern = re.compile(re.escape(template).replace(re.escape("{}"), r"(\d+)"))
    return len({found[1] for name in names if (found := pattern.match(name))})


def _check_config(config: Mapping[str, Any], ours: Mask2FormerConfig) -> None:
    backbone = config.get("backbone_config") or {}
    told = [("", config, _RIGHT | {"num_attention_heads": ours.decoder.num_heads})]
    for where, fields, right in (*told, ("backbone_config.", backbone, _RIGHT_BACKBONE)):
        for field, value in right.items():
            if fields.get(field, value) != value:
                raise ValueError(f"Mask2Former config {where}{field}: found {fields[field]!r}, expected {value!r}")
    if any(depth % 2 for depth in ours.backbone.depths):
        raise ValueError(f"Mask2Former: found stages of {ours.backbone.depths} blocks, expected even numbers")


# ---- parameters


def _components(ours: Mask2FormerConfig, layout: Layout) -> dict[str, Component]:
    """The three networks, whose paths begin with their names in the whole one."""
    shapes = _shapes(ours)
    modules, components = _modules(ours, layout), {}
    for part, stacks in _STACKS.items():
        own = {path.removeprefix(f"{part}/"): shape for path, shape in shapes.items() if path.startswith(f"{part}/")}
        paths = [(path, shape) for each, whole in own.items() for path, shape in _unstacked(each, whole, stacks)]
        sources = {path: _source(f"{part}/{path}", shape, modules) for path, shape in paths}
        components[part] = Component(config=ours, shapes=own, sources=sources, stacks=stacks)
    return components


@functools.cache
def _shapes(ours: Mask2FormerConfig) -> dict[str, Shape]:
    return parameter_shapes(Mask2Former(ours).init, jnp.zeros((1, STRIDE, STRIDE, 3)))


def _modules(ours: Mask2FormerConfig, layout: Layout) -> Names:
    """Our module, with its layer's number → theirs."""
    modules = dict(layout.others)
    for stage, depth in enumerate(ours.backbone.depths):
        for block in range(depth):
            place = f"encoder/stage{stage + 1}_{block // 2}/{('plain', 'shifted')[block % 2]}"
            prefix = layout.block_layers.format(stage, block)
            modules |= {f"{place}/{name}": prefix + theirs for name, theirs in layout.block_names.items()}
    for part, depth, prefix, names in (
        ("pixel_decoder", ours.pixel_decoder.depth, layout.pixel_layers, layout.pixel_names),
        ("decoder", ours.decoder.depth, layout.query_layers, layout.query_names),
    ):
        for i in range(depth):
            modules |= {f"{part}/layers_{i}/{name}": prefix.format(i) + theirs for name, theirs in names.items()}
    return modules


def _unstacked(path: str, shape: Shape, stacks: Collection[str]) -> Iterator[tuple[str, Shape]]:
    stack, _, rest = path.partition("/")
    if stack not in stacks:
        yield path, shape
    else:
        yield from ((f"{stack}_{i}/{rest}", shape[1:]) for i in range(shape[0]))


def _source(path: str, shape: Shape, modules: Names) -> Source:
    module, _, leaf = path.rpartition("/")
    if path in modules:  # a parameter of no module of its own
        return Source(modules[path])
    theirs, mark, part = modules[module].partition("#")
    pattern = {4: CONVOLUTION, 2: LINEAR}[len(shape)] if leaf == "kernel" else SAME
    return Source(f"{theirs}{_LEAVES.get(leaf, leaf)}{mark}{part}", pattern)


def _joined(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of the tensors as they are published, from those of their parts."""
    joined: dict[str, Shape] = {}
    for name, shape in shapes.items():
        name, part, _ = name.partition("#")
        joined[name] = (3 * shape[0], *shape[1:]) if part else shape
    return joined


def _piece(tensors: Mapping[str, np.ndarray], name: str, layout: Layout) -> np.ndarray:
    """One source's tensor: a third of a joined one, and merged neighbours in our order."""
    name, _, part = name.partition("#")
    tensor = tensors[name]
    if ".downsample." in name:
        return rearrange(tensor, f"... {layout.merged} -> ... (w h c)", h=2, w=2)
    return np.split(tensor, 3)[int(part)] if part else tensor
