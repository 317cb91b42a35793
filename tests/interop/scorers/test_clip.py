"""CLIP's two published layouts, what is refused of each, and true sizes' shapes."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fopd_jax.interop.scorers.clip import convert, open_clip_shape, read_shape, recognises
from fopd_jax.models.clip import CLIP_L, CLIPText
from fopd_jax.models.clip_vision import VIT_H_14, VIT_L_14, CLIPVision
from tests.interop.scorers.clip_oracle import TEXT, VISION, make_model, numpy_tensors
from tests.interop.scorers.open_clip_oracle import OpenClip, make_open_clip

TOLERANCE = 1e-4
Tensors = dict[str, np.ndarray]


def wide(width: int) -> Any:
    """open_clip's heads follow from widths."""
    return dataclasses.replace(VISION, width=width, num_heads=width // 64, mlp_dim=64)


OPEN_TEXT = dataclasses.replace(TEXT, width=128)
THEIRS = make_model()
CONFIG = json.loads(THEIRS.config.to_json_string(use_diff=False))


def transformers_tensors() -> Tensors:
    return dict(numpy_tensors(THEIRS))


def open_tensors(model: OpenClip) -> Tensors:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def relative_error(found: Any, expected: torch.Tensor) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected.numpy()) / np.linalg.norm(expected.numpy()))


def test_transformers_layout() -> None:
    tensors = transformers_tensors()
    assert recognises(tensors)
    ids = {f"{tower}.embeddings.position_ids": np.arange(20) for tower in ("text_model", "vision_model")}
    shape, params = convert(tensors | ids, CONFIG)
    assert read_shape(json.loads(json.dumps(shape))) == (VISION, TEXT, None)
    assert params["logit_scale"] == np.float32(4.6052)
    count = sum(parameter.numel() for parameter in THEIRS.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_a_config_that_leaves_out_defaults() -> None:
    short = {name: value for name, value in CONFIG.items() if name in ("model_type", "text_config", "vision_config")}
    short["text_config"] = {
        name: value for name, value in CONFIG["text_config"].items() if name not in ("layer_norm_eps", "hidden_act")
    }
    assert convert(transformers_tensors(), short)[0]["text"] == dataclasses.asdict(TEXT)


@pytest.mark.parametrize(("width", "activation"), [(128, "quick_gelu"), (1280, "gelu")])
def test_open_clip_layout(width: int, activation: Any) -> None:
    """Its own attention module is the oracle: of 1280 features a head has 80, of others 64."""
    vision = dataclasses.replace(wide(width), depth=1, num_heads=16 if width == 1280 else 2, activation=activation)
    text = dataclasses.replace(OPEN_TEXT, activation=activation)
    model = make_open_clip(vision, text)
    tensors = {
        f"text.{name}" if name.startswith("ln_final") else name: each for name, each in open_tensors(model).items()
    }
    assert recognises(tensors)
    shape, params = convert(tensors, {"activation": activation})
    assert read_shape(shape) == (vision, text, None)
    random = np.random.default_rng(0)
    pixels, ids = random.standard_normal((2, 28, 28, 3), np.float32), random.integers(0, 520, (2, 9))
    ids[0, 4], ids[1, 8] = 529, 529
    with torch.no_grad():
        seen = model.visual(torch.tensor(pixels).permute(0, 3, 1, 2))
        read = model.encode_text(torch.tensor(ids))
    ours = jax.jit(CLIPVision(vision).apply)({"params": params["vision"]}, jnp.asarray(pixels))
    assert relative_error(ours, seen) <= TOLERANCE
    ours = jax.jit(CLIPText(text).apply)({"params": params["text"]}, jnp.asarray(ids))
    assert relative_error(ours[1], read) <= TOLERANCE  # type: ignore[index]


def test_activation_of_open_clip() -> None:
    tensors = open_tensors(make_open_clip(wide(128), OPEN_TEXT))
    with pytest.raises(ValueError, match="activation: these tensors do not tell it; say quick_gelu for OpenAI's"):
        convert(tensors, None)
    with pytest.raises(ValueError, match="activation: found 'relu', expected one of quick_gelu, gelu"):
        convert(tensors, {"activation": "relu"})
    for cfg, expected in (({"quick_gelu": True}, "quick_gelu"), ({}, "gelu")):
        assert convert(tensors, {"model_cfg": cfg})[0]["vision"]["activation"] == expected


@pytest.mark.parametrize(("vision", "text_width"), [(VIT_L_14, 768), (VIT_H_14, 1024)])
def test_published_sizes_are_read_off_open_clips_tensors(vision: Any, text_width: int) -> None:
    """Of one layer each: from empty tensors in true widths."""
    text = dataclasses.replace(
        CLIP_L, width=text_width, num_heads=text_width // 64, mlp_dim=4 * text_width, depth=1,
        projection_dim=vision.projection_dim, activation=vision.activation,
    )  # fmt: skip
    vision = dataclasses.replace(vision, depth=1)
    with torch.device("meta"):
        model = OpenClip(vision, text)
    tensors = {name: np.broadcast_to(np.float32(0), each.shape) for name, each in model.state_dict().items()}
    config = None if vision.width == 1280 else {"activation": "quick_gelu"}
    assert open_clip_shape(tensors, config) == (vision, text)


# ---- refusals


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {each: tensor for each, tensor in tensors.items() if each != name}


def reshaped(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


LAYER = "vision_model.encoder.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(LAYER), f"tensor '{LAYER}': missing, expected shape (48, 48)"),
        (without("logit_scale"), "tensor 'logit_scale': missing, expected shape ()"),
        (without("vision_model.embeddings.patch_embedding.weight"), "patch_embedding.weight': missing"),
        (reshaped(LAYER, 48, 47), f"tensor '{LAYER}': found shape (48, 47), expected (48, 48)"),
        (reshaped("extra.bias", 3), "tensor 'extra.bias': found shape (3,), expected no such tensor"),
        (reshaped("text_projection.weight", 3), "tensor 'text_projection.weight': found shape (3,), expected 2 axes"),
    ],
)
def test_tensors_that_are_refused(change: Callable[[Tensors], Tensors], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        convert(change(transformers_tensors()), CONFIG)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("visual.transformer.resblocks.2.attn.in_proj_weight"), "resblocks.2.attn.in_proj_weight[k]': missing"),
        (without("visual.ln_pre.bias"), "tensor 'visual.ln_pre.bias': missing, expected shape (128,)"),
        (reshaped("visual.extra", 2), "tensor 'visual.extra': found shape (2,), expected no such tensor"),
    ],
)
def test_open_clips_tensors_are_named_as_they_are(tensors: Callable[[Tensors], Tensors], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        convert(tensors(open_tensors(make_open_clip(wide(128), OPEN_TEXT))), {"activation": "gelu"})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json: model_type: found nothing, expected 'clip'"),
        ({"model_type": "siglip"}, "config.json: model_type: found 'siglip', expected 'clip'"),
        ({"vision": {"hidden_size": 96}}, "vision_config.hidden_size: found 96, but the tensors have 48"),
        ({"vision": {"num_attention_heads": 5}}, "config.json: "),
        ({"text": {"hidden_act": "relu"}}, "text_config.hidden_act: found 'relu', expected one of quick_gelu, gelu"),
        ({"text": {"max_position_embeddings": 77}}, "max_position_embeddings: found 77, but the tensors have 20"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any] | None, message: str) -> None:
    if config is not None and "model_type" not in config:
        changed = {f"{tower}_config": CONFIG[f"{tower}_config"] | fields for tower, fields in config.items()}
        config = CONFIG | changed
    with pytest.raises(ValueError) as caught:
        convert(transformers_tensors(), config)
    assert message in str(caught.value)
