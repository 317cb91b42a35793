"""CLIP's published layouts → ours: transformers' `CLIPModel`, and open_clip's, which HPSv2's files have as well.

The name tables are the only place that knows both sides; `{}` stands for the number of a layer.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from fopd_jax.interop.files.safetensors import Tree
from fopd_jax.interop.files.tables import LINEAR, SAME, Component, Source, check_names, from_tensors, parameter_shapes
from fopd_jax.interop.scorers.weights import depth_of, shape_of
from fopd_jax.interop.scorers.words import read_merges
from fopd_jax.interop.sd3.text_encoders import CLIP_NAMES, STACK, sources_of
from fopd_jax.models.clip import LEGACY_EOS_TOKEN_ID, Activation, CLIPText, CLIPTextConfig, CLIPTowerConfig
from fopd_jax.models.clip_vision import CLIPVision, CLIPVisionConfig

NETWORK = "clip"
_PATCHES = "o c p q -> (p q c) o"
_SCALE = "logit_scale"
_IGNORED = re.compile(
    r"(text_model|vision_model)\.embeddings\.position_ids"  # 0, 1, 2, …, which old versions wrote
    r"|attn_mask|input_resolution|context_length|vocab_size"  # constants of OpenAI's files
)
_LAYER_EPS = 1e-5  # of every open_clip tower

# ---- transformers' names

_VISION_NAMES = {
    "position_embedding": "vision_model.embeddings.position_embedding",
    "pre_layernorm": "vision_model.pre_layrnorm",  # sic
    **{ours: name.replace("text_model", "vision_model") for ours, name in CLIP_NAMES.items() if STACK in ours},
    "post_layernorm": "vision_model.post_layernorm",
    "visual_projection": "visual_projection",
}
_VISION_ODD = {
    "class_embedding": Source("vision_model.embeddings.class_embedding"),
    "patch_embedding/kernel": Source("vision_model.embeddings.patch_embedding.weight", _PATCHES),
}

# ---- open_clip's names


def _open_clip_layers(prefix: str) -> dict[str, str]:
    names = {
        "layer_norm1": "ln_1", "self_attn/out_proj": "attn.out_proj", "layer_norm2": "ln_2",
        "mlp/fc1": "mlp.c_fc", "mlp/fc2": "mlp.c_proj",
    }  # fmt: skip
    return {f"{STACK}/{ours}": f"{prefix}transformer.resblocks.{{}}.{theirs}" for ours, theirs in names.items()}


def _open_clip_joined(prefix: str) -> dict[str, Source]:
    """Queries, keys and values are one tensor there, which `_apart` takes apart."""
    return {
        f"{STACK}/self_attn/{part}_proj/{leaf}": Source(
            f"{prefix}transformer.resblocks.{{}}.attn.in_proj_{theirs}[{part}]", pattern
        )
        for part in "qkv"
        for leaf, theirs, pattern in (("kernel", "weight", LINEAR), ("bias", "bias", SAME))
    }


_OPEN_TEXT_NAMES = {
    "token_embedding": "token_embedding",
    **_open_clip_layers(""),
    "final_layer_norm": "ln_final",
}
_OPEN_TEXT_ODD = {
    "position_embedding/embedding": Source("positional_embedding"),
    "text_projection/kernel": Source("text_projection"),
    **_open_clip_joined(""),
}
_OPEN_VISION_NAMES = {
    "pre_layernorm": "visual.ln_pre",
    **_open_clip_layers("visual."),
    "post_layernorm": "visual.ln_post",
}
_OPEN_VISION_ODD = {
    "class_embedding": Source("visual.class_embedding"),
    "patch_embedding/kernel": Source("visual.conv1.weight", _PATCHES),
    "position_embedding/embedding": Source("visual.positional_embedding"),
    "visual_projection/kernel": Source("visual.proj"),
    **_open_clip_joined("visual."),
}
_WIDE_HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Heads of the vision towers H, g and G by width; in all others, as in all text towers, a head is 64 wide."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of one tower's tensors: our modules → theirs, and our parameters that follow no rule."""

    names: Mapping[str, str]
    odd: Mapping[str, Source]

    def name(self, path: str) -> str:
        return next(iter(sources_of(path, self.names, 1, self.odd).values())).name


_TRANSFORMERS = {"text": Layout(CLIP_NAMES, {}), "vision": Layout(_VISION_NAMES, _VISION_ODD)}
_OPEN_CLIP = {
    "text": Layout(_OPEN_TEXT_NAMES, _OPEN_TEXT_ODD),
    "vision": Layout(_OPEN_VISION_NAMES, _OPEN_VISION_ODD),
}


def recognises(names: Collection[str]) -> bool:
    """Whether a checkpoint with these tensors is a CLIP with both towers, in either layout."""
    theirs = {"text_model.embeddings.token_embedding.weight", "visual_projection.weight"}
    return theirs <= set(names) or _is_open_clip(names)


def _is_open_clip(names: Collection[str]) -> bool:
    return {"visual.conv1.weight", "visual.proj"} <= set(names)


def convert(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None) -> tuple[dict[str, Any], Tree]:
    """The shape, `vision` and `text`, and the parameters, with `logit_scale` beside them, of a whole state dict.

    `config`: transformers' `config.json`, which its layout needs; of open_clip's layout `{"activation": …}`, since
    nothing in the tensors tells one GELU from the other.

    Raises:
      ValueError: a tensor is missing, superfluous or misshapen, or the configuration is; names it.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not _IGNORED.fullmatch(name)}
    is_open = _is_open_clip(tensors)
    tensors, layouts = (_apart(tensors), _OPEN_CLIP) if is_open else (tensors, _TRANSFORMERS)
    vision, text = (open_clip_shape if is_open else _transformers_shape)(tensors, config)
    components = {"vision": vision_component(vision, layouts["vision"]), "text": text_component(text, layouts["text"])}
    expected = {name: shape for each in components.values() for name, shape in each.tensor_shapes().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_names(found, expected | {_SCALE: found.get(_SCALE, ())})
    params: dict[str, Any] = {
        tower: from_tensors(each, {name: tensors[name] for name in each.tensor_shapes()}, np.float32)
        for tower, each in components.items()
    }
    params[_SCALE] = np.asarray(tensors[_SCALE], np.float32).reshape(())
    return {"vision": dataclasses.asdict(vision), "text": dataclasses.asdict(text)}, params


def add_tokenizer(shape: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The shape with the merges of a tokenizer's folder or file.

    Raises:
      ValueError: as `read_merges`.
    """
    return {**shape, "merges": read_merges(path, shape["text"]["vocab_size"])}


def read_shape(shape: Mapping[str, Any]) -> tuple[CLIPVisionConfig, CLIPTextConfig, list[str] | None]:
    """What `convert` and `add_tokenizer` wrote."""
    return CLIPVisionConfig(**shape["vision"]), CLIPTextConfig(**shape["text"]), shape.get("merges")


def vision_component(config: CLIPVisionConfig, layout: Layout = _TRANSFORMERS["vision"]) -> Component:
    """The name table of a vision tower."""
    sample = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    sizes = (("p", config.patch_size), ("q", config.patch_size))
    patches = dataclasses.replace(layout.odd["patch_embedding/kernel"], sizes=sizes)
    layout = Layout(layout.names, {**layout.odd, "patch_embedding/kernel": patches})
    return _component(config, parameter_shapes(CLIPVision(config).init, sample), layout)


def text_component(config: CLIPTextConfig, layout: Layout = _TRANSFORMERS["text"]) -> Component:
    """The name table of a text tower."""
    return _component(config, parameter_shapes(CLIPText(config).init, jnp.zeros((1, 1), jnp.int32)), layout)


def _component(config: CLIPTowerConfig, shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> Component:
    sources = {
        path: source
        for stacked in shapes
        for path, source in sources_of(stacked, layout.names, config.depth, layout.odd).items()
    }
    return Component(config, shapes, sources, (STACK,))


def _apart(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """open_clip's tensors, queries, keys and values apart, without the `text.` that some of its classes put before."""
    made = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text.")
        if ".attn.in_proj_" in name and len(tensor) % 3 == 0:
            made |= {f"{name}[{part}]": each for part, each in zip("qkv", np.split(tensor, 3), strict=True)}
        else:
            made[name] = tensor
    return made


# ---- shapes


def _measured(
    tensors: Mapping[str, np.ndarray], layouts: Mapping[str, Layout]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the tensors alone tell of the vision tower and of the text tower."""
    text, vision = layouts["text"], layouts["vision"]
    vocabulary, text_width = shape_of(tensors, text.name("token_embedding/embedding"), 2)
    width, _, patch, _ = shape_of(tensors, vision.name("patch_embedding/kernel"), 4)
    patches = shape_of(tensors, vision.name("position_embedding/embedding"), 2)[0] - 1
    fc1 = f"{STACK}/mlp/fc1/kernel"
    return (
        {
            "width": width,
            "depth": depth_of(tensors, vision.names[f"{STACK}/mlp/fc1"]),
            "mlp_dim": shape_of(tensors, vision.name(fc1), 2)[0],
            "projection_dim": _projected(tensors, vision.name("visual_projection/kernel")),
            "image_size": math.isqrt(patches) * patch,
            "patch_size": patch,
        },
        {
            "vocab_size": vocabulary,
            "width": text_width,
            "depth": depth_of(tensors, text.names[f"{STACK}/mlp/fc1"]),
            "mlp_dim": shape_of(tensors, text.name(fc1), 2)[0],
            "max_length": shape_of(tensors, text.name("position_embedding/embedding"), 2)[0],
            "projection_dim": _projected(tensors, text.name("text_projection/kernel")),
        },
    )


def _projected(tensors: Mapping[str, np.ndarray], name: str) -> int:
    """The projection's other side: transformers' is `[P, D]`, open_clip's `[D, P]`."""
    shape = shape_of(tensors, name, 2)
    return shape[0] if name.endswith(".weight") else shape[1]


def _transformers_shape(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None
) -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    """Numbers that the tensors do not tell come from the configuration, which must agree with what they do."""
    from transformers import CLIPConfig  # knows the defaults, which files leave out

    if config is None or config.get("model_type") != "clip":
        found = "nothing" if config is None else repr(config.get("model_type"))
        raise ValueError(f"config.json: model_type: found {found}, expected 'clip', as in a folder of CLIPModel")
    if "activation" in config:
        raise ValueError("activation: config.json says it; leave it out")
    try:
        theirs: Any = CLIPConfig(**{name: value for name, value in config.items() if name != "model_type"})
    except Exception as error:  # its versions have kinds of their own for what they refuse
        raise ValueError(f"config.json: refused by transformers ({' '.join(str(error).split())[-200:]})") from error
    vision, text = _measured(tensors, _TRANSFORMERS)
    names = {
        "width": "hidden_size", "depth": "num_hidden_layers", "mlp_dim": "intermediate_size",
        "image_size": "image_size", "patch_size": "patch_size", "vocab_size": "vocab_size",
        "max_length": "max_position_embeddings",
    }  # fmt: skip
    towers = {"vision_config": (theirs.vision_config, vision), "text_config": (theirs.text_config, text)}
    for tower, (stated, measured) in towers.items():
        for ours, name in names.items():
            if ours in measured and getattr(stated, name) != measured[ours]:
                found = getattr(stated, name)
                raise ValueError(f"config.json: {tower}.{name}: found {found}, but the tensors have {measured[ours]}")
        measured |= {
            "num_heads": stated.num_attention_heads,
            "activation": _activation(stated.hidden_act, f"config.json: {tower}.hidden_act"),
            "layer_norm_eps": float(stated.layer_norm_eps),
        }
        _check_heads(measured, f"config.json: {tower}.num_attention_heads")
    return CLIPVisionConfig(**vision), CLIPTextConfig(**text, eos_token_id=theirs.text_config.eos_token_id)


def open_clip_shape(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None
) -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    """The towers of open_clip's tensors, of which the widths tell the heads.

    Raises:
      ValueError: as `convert`.
    """
    vision, text = _measured(tensors, _OPEN_CLIP)
    common: dict[str, Any] = {
        "activation": _open_clip_activation(config or {}, vision["width"]), "layer_norm_eps": _LAYER_EPS
    }  # fmt: skip
    heads: int = _WIDE_HEADS.get(vision["width"]) or vision["width"] // 64
    return (
        CLIPVisionConfig(**vision, **common, num_heads=heads),
        CLIPTextConfig(**text, **common, num_heads=text["width"] // 64, eos_token_id=LEGACY_EOS_TOKEN_ID),
    )


def _open_clip_activation(config: Mapping[str, Any], width: int) -> Activation:
    if "activation" in config:
        return _activation(config["activation"], "activation")
    if width in _WIDE_HEADS:
        return "gelu"
    raise ValueError("activation: these tensors do not tell it; say quick_gelu for OpenAI's weights, gelu for LAION's")


def _activation(name: Any, field: str) -> Activation:
    if name not in get_args(Activation):
        raise ValueError(f"{field}: found {name!r}, expected one of {', '.join(get_args(Activation))}")
    return name


def _check_heads(shape: Mapping[str, Any], field: str) -> None:
    if shape["width"] % shape["num_heads"]:
        raise ValueError(f"{field}: found {shape['num_heads']}, expected a divisor of the width {shape['width']}")
