"""Random BLIPs of transformers, and the same weights under the names of BLIP's own code."""

from typing import Any

import numpy as np
import torch
from transformers import BlipConfig, BlipForQuestionAnswering

START = 62  # [DEC]
HEAD_SIZES = (1024, 128, 64, 16, 1)


def make_config(heads: int = 2, **sizes: dict[str, Any]) -> BlipConfig:
    """A BLIP of two layers a tower, for 32 pixels and texts of 40 tokens; `sizes` are fields of its two sections."""
    vision = {
        "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": heads,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    text = {
        "vocab_size": 64, "hidden_size": 128, "encoder_hidden_size": 128, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": heads, "max_position_embeddings": 40, "bos_token_id": START,
        "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3, "projection_dim": 16,
    }  # fmt: skip
    return BlipConfig(vision_config=vision | sizes.get("vision", {}), text_config=text | sizes.get("text", {}))


def make_vqa(config: BlipConfig, seed: int = 0) -> BlipForQuestionAnswering:
    torch.manual_seed(seed)
    model = BlipForQuestionAnswering(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    return model


def tensors_of(model: BlipForQuestionAnswering) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


_VISION = {
    "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
    "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
    "vision_model.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
    "vision_model.encoder.layers": "visual_encoder.blocks",
    "vision_model.post_layernorm": "visual_encoder.norm",
    "self_attn.projection": "attn.proj",
    "self_attn.qkv": "attn.qkv",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
}


def own_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As BLIP's own code calls them, with the counters that its BERT saves."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("vision_model."):
            for theirs, own in _VISION.items():
                name = name.replace(theirs, own)
        renamed[name] = tensor
    for tower in ("text_encoder", "text_decoder.bert"):
        if f"{tower}.embeddings.word_embeddings.weight" in renamed:
            renamed[f"{tower}.embeddings.position_ids"] = np.arange(40)[None]
    return renamed


def image_reward_file(tensors: dict[str, np.ndarray], seed: int = 1) -> dict[str, np.ndarray]:
    """ImageReward's file of the same picture's and question's towers, with a random head."""
    rng = np.random.default_rng(seed)
    kept = {name: each for name, each in own_names(tensors).items() if not name.startswith("text_decoder.")}
    found = {f"blip.{name}": tensor for name, tensor in kept.items()}
    width = tensors["text_encoder.embeddings.word_embeddings.weight"].shape[1]
    for index, size in zip((0, 2, 4, 6, 7), HEAD_SIZES, strict=True):
        found[f"mlp.layers.{index}.weight"] = rng.normal(0, width**-0.5, (size, width)).astype(np.float32)
        found[f"mlp.layers.{index}.bias"] = rng.normal(0, 0.1, size).astype(np.float32)
        width = size
    return found
