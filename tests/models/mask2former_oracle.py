"""transformers' Mask2Former over Swin of true structure and small widths, with random weights that make masks vary.

Matrices have variance 1/fan-in, biases 0.1, norms' scales 1 + 0.2·N. Deformable attention looks several cells around
itself, out of the map, too.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch.nn import functional

from fopd_jax.interop.scorers.mask2former import convert, network_config
from fopd_jax.models.mask2former import MASK2FORMER_SWIN_S, DecoderConfig, Mask2FormerConfig
from fopd_jax.models.pixel_decoder import PixelDecoderConfig
from fopd_jax.models.swin import SwinConfig

SMALL = Mask2FormerConfig(
    SwinConfig(width=24, depths=(2, 2, 4, 2), num_heads=(1, 2, 3, 6), window=7, mlp_ratio=4),
    PixelDecoderConfig(width=64, mask_width=32, depth=2, num_heads=4, mlp_dim=48),
    DecoderConfig(depth=4, num_heads=4, mlp_dim=80, num_queries=12, num_classes=80),
)
TRUE = MASK2FORMER_SWIN_S
PIXELS = "model.pixel_level_module."


def torch_config(config: Mask2FormerConfig) -> transformers.Mask2FormerConfig:
    swin, pixels, queries = config.backbone, config.pixel_decoder, config.decoder
    backbone = transformers.SwinConfig(
        embed_dim=swin.width,
        depths=list(swin.depths),
        num_heads=list(swin.num_heads),
        window_size=swin.window,
        mlp_ratio=float(swin.mlp_ratio),
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=pixels.width,
        hidden_dim=pixels.width,
        mask_feature_size=pixels.mask_width,
        encoder_layers=pixels.depth,
        encoder_feedforward_dim=pixels.mlp_dim,
        num_attention_heads=pixels.num_heads,
        decoder_layers=queries.depth + 1,
        dim_feedforward=queries.mlp_dim,
        num_queries=queries.num_queries,
        num_labels=queries.num_classes,
    )


def config_json(config: Mask2FormerConfig) -> dict[str, Any]:
    """As a checkpoint's `config.json` says it."""
    return json.loads(torch_config(config).to_json_string(use_diff=False))


@functools.cache
def oracle(config: Mask2FormerConfig) -> transformers.Mask2FormerForUniversalSegmentation:
    model = transformers.Mask2FormerForUniversalSegmentation(torch_config(config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("sampling_offsets.bias"):
                tensor.copy_(4 * noise)
            elif name == "class_predictor.weight":  # so that some classes are likely
                tensor.copy_(4 * noise / tensor.shape[1] ** 0.5)
            elif tensor.ndim == 1:
                is_scale = name.endswith("weight") and name != "criterion.empty_weight"
                tensor.copy_(1 + 0.2 * noise if is_scale else 0.1 * noise)
            elif "embed." in name or "queries" in name or "table" in name or name.endswith("level_embed"):
                tensor.copy_(noise)
            else:
                tensor.copy_(noise / (tensor.numel() // tensor.shape[0]) ** 0.5)
    return model


def published(config: Mask2FormerConfig) -> dict[str, np.ndarray]:
    """The oracle's tensors by their names in a published file, which `save_pretrained` would write."""
    return {_published_name(name): tensor.numpy() for name, tensor in oracle(config).state_dict().items()}


def _published_name(name: str) -> str:
    """transformers 5 calls the backbone's modules otherwise than its files do."""
    if not name.startswith(f"{PIXELS}encoder.swin.") or ".swin.layernorm." in name:
        return name
    for ours, theirs in {
        "encoder.swin.": "encoder.",
        "attention.q_proj": "attention.self.query",
        "attention.k_proj": "attention.self.key",
        "attention.v_proj": "attention.self.value",
        "attention.relative_position_bias.": "attention.self.",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }.items():
        name = name.replace(ours, theirs)
    return name


@functools.cache
def _our_params(config: Mask2FormerConfig) -> dict[str, Any]:
    shape, params = convert(published(config), config_json(config))
    assert network_config(json.loads(json.dumps(shape))) == config
    return jax.tree.map(jnp.asarray, params)


def variables(config: Mask2FormerConfig, part: str = "") -> dict[str, Any]:
    params: Mapping[str, Any] = _our_params(config)
    return {"params": params[part] if part else params}


def mmdet_instances(
    classes: torch.Tensor, masks: torch.Tensor, filled: tuple[int, int], inner: tuple[int, int], size: tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    """One picture's labels, scores, boxes, mask logits, by mmdet 2's `simple_test` and `instance_postprocess`."""
    masks = functional.interpolate(masks[None], filled, mode="bilinear", align_corners=False)
    masks = functional.interpolate(masks[..., : inner[0], : inner[1]], size, mode="bilinear", align_corners=False)[0]
    chances, best = classes.softmax(-1)[:, :-1].flatten().topk(100)
    labels, masks = best % (classes.shape[1] - 1), masks[best // (classes.shape[1] - 1)]
    inside = (masks > 0).float()
    quality = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    boxes = torch.zeros(100, 4)
    for box, mask in zip(boxes, inside.bool(), strict=True):
        if mask.any():
            x, y = torch.where(mask.any(0))[0], torch.where(mask.any(1))[0]
            box[:] = torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1])
    return labels, chances * quality, boxes, masks


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def relative_error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
