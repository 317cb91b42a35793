"""diffusers' `AutoencoderKL` as Stable Diffusion 3 has it ↔ our Autoencoder: names, layouts, configuration."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from fopd_jax.interop.files.tables import CONVOLUTION, LINEAR, SAME, Component, Shape, Source, parameter_shapes
from fopd_jax.models.autoencoder import Autoencoder, AutoencoderConfig

_NUMBERED = re.compile(r"(down_blocks|up_blocks|resnets)_(\d+)")
_RENAMED = {  # a module's name here → there; all other names are the same
    "attention": "attentions.0",
    "to_out": "to_out.0",
    "downsampler": "downsamplers.0.conv",
    "upsampler": "upsamplers.0.conv",
}
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight"}
_PATTERNS = {4: CONVOLUTION, 2: LINEAR, 1: SAME}  # by rank

_FIXED = {  # the one value of a field that Autoencoder is built for
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}
# Fields that a file may lack, such as those younger than the published checkpoints: diffusers' defaults stand for them.
_DEFAULTS = {
    field: _FIXED[field] for field in ("_class_name", "mid_block_add_attention", "latents_mean", "latents_std")
}


def autoencoder_component(config_json: Mapping[str, Any]) -> Component:
    """The name table of an `AutoencoderKL` from its `config.json`; the component's `config` is an `AutoencoderConfig`.

    "decoder/up_blocks_0/resnets_1/conv1/kernel" ↔ "decoder.up_blocks.0.resnets.1.conv1.weight". Attention's weights
    are matrices with the names `to_q`, `to_k`, `to_v`, `to_out.0`; the older `query`, `key`, `value`, `proj_attn` are
    refused like any other name.

    Raises:
      ValueError: a field is missing or describes another network; names field, found and right value.
    """
    config = _config(config_json)
    side = config.downsampling
    shapes = parameter_shapes(Autoencoder(config).init, jnp.zeros((1, side, side, config.image_channels)))
    return Component(config, shapes, {path: _source(path, shape) for path, shape in shapes.items()})


def _source(path: str, shape: Shape) -> Source:
    *modules, leaf = path.split("/")
    names = (_NUMBERED.sub(r"\1.\2", _RENAMED.get(module, module)) for module in modules)
    return Source(".".join((*names, _LEAVES[leaf])), _PATTERNS[len(shape)])


def _config(config_json: Mapping[str, Any]) -> AutoencoderConfig:
    fields: dict[str, Any] = _DEFAULTS | {k: list(v) if isinstance(v, tuple) else v for k, v in config_json.items()}
    _check_sizes(fields)
    expected = _FIXED | {
        "out_channels": fields["in_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * len(fields["block_out_channels"]),
        "up_block_types": ["UpDecoderBlock2D"] * len(fields["block_out_channels"]),
    }
    for field, right in expected.items():
        _check(fields, field, field in fields and fields[field] == right, repr(right))
    return AutoencoderConfig(
        channels=tuple(fields["block_out_channels"]),
        layers_per_block=fields["layers_per_block"],
        latent_channels=fields["latent_channels"],
        image_channels=fields["in_channels"],
        groups=fields["norm_num_groups"],
        scaling_factor=float(fields["scaling_factor"]),
        shift_factor=float(fields["shift_factor"]),
    )


def _check_sizes(fields: Mapping[str, Any]) -> None:
    for field in ("layers_per_block", "latent_channels", "in_channels", "norm_num_groups"):
        _check(fields, field, _is_positive(fields.get(field)), "a positive integer")
    widths, groups = fields.get("block_out_channels"), fields["norm_num_groups"]
    suitable = isinstance(widths, list) and widths and all(_is_positive(c) and c % groups == 0 for c in widths)
    _check(fields, "block_out_channels", suitable, f"positive multiples of norm_num_groups={groups}")
    for field in ("scaling_factor", "shift_factor"):
        _check(fields, field, type(fields.get(field)) in (int, float), "a number")
    _check(fields, "scaling_factor", fields["scaling_factor"] > 0, "a positive number")


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _check(fields: Mapping[str, Any], field: str, correct: Any, right: str) -> None:
    if not correct:
        found = repr(fields[field]) if field in fields else "nothing"
        raise ValueError(f"autoencoder config {field}: found {found}, expected {right}")
