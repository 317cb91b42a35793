"""transformers' CLIPModel with random tensors, small or of true size, and what lies beside it in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
import transformers

from fopd_jax.interop.scorers.words import vocabulary
from fopd_jax.models.clip import CLIPTextConfig
from fopd_jax.models.clip_vision import CLIPVisionConfig

M = TypeVar("M", bound=torch.nn.Module)
MERGES = (
    "t h", "th e</w>", "c a", "ca t</w>", "d o", "do g</w>", "o f</w>", "p h", "ph o", "pho t", "phot o</w>",
    "r e", "re d</w>", "' s</w>", "a</w> b", "é</w> é",
)  # fmt: skip
"""A few that make words, some of which never apply."""
VOCABULARY = len(vocabulary(MERGES))
TEXT = CLIPTextConfig(
    vocab_size=VOCABULARY, width=32, depth=2, num_heads=2, mlp_dim=64, max_length=20, projection_dim=24,
    activation="quick_gelu", layer_norm_eps=1e-5, eos_token_id=2,
)  # fmt: skip
VISION = CLIPVisionConfig(
    width=48, depth=3, num_heads=3, mlp_dim=96, projection_dim=24, activation="quick_gelu", layer_norm_eps=1e-5,
    image_size=28, patch_size=7,
)  # fmt: skip


def text_config(ours: CLIPTextConfig) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=ours.vocab_size,
        max_position_embeddings=ours.max_length,
        eos_token_id=ours.eos_token_id,
        bos_token_id=0,
        **_common(ours),
    )


def vision_config(ours: CLIPVisionConfig) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(image_size=ours.image_size, patch_size=ours.patch_size, **_common(ours))


def _common(ours: CLIPTextConfig | CLIPVisionConfig) -> dict[str, Any]:
    return {
        "hidden_size": ours.width,
        "num_hidden_layers": ours.depth,
        "num_attention_heads": ours.num_heads,
        "intermediate_size": ours.mlp_dim,
        "projection_dim": ours.projection_dim,
        "hidden_act": ours.activation,
        "layer_norm_eps": ours.layer_norm_eps,
    }


def randomise(model: M) -> M:
    """Weights of variance 1/fan-in, embeddings of 1, biases of 0.04, scales 1 + 0.2·N."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or not tensor.ndim:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                tensor.copy_(noise if "embedding." in name and tensor.ndim == 2 else noise / tensor[0].numel() ** 0.5)
    return model.eval()


def make_model(vision: CLIPVisionConfig = VISION, text: CLIPTextConfig = TEXT) -> transformers.CLIPModel:
    config = transformers.CLIPConfig(
        text_config=text_config(text).to_dict(),
        vision_config=vision_config(vision).to_dict(),
        projection_dim=vision.projection_dim,
        logit_scale_init_value=4.6052,
    )
    return randomise(transformers.CLIPModel(config))


def write_words(folder: Path, merges: tuple[str, ...] = MERGES) -> None:
    """`vocab.json` and `merges.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges)), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def write_folder(folder: Path, model: transformers.CLIPModel) -> Path:
    """As transformers writes it, with the tokenizer."""
    model.save_pretrained(folder)
    write_words(folder)
    return folder


class SmallClip(NamedTuple):
    """`source`: transformers' folder, tokenizer included; `converted`: ours."""

    source: Path
    converted: Path


def convert_small(folder: Path, tool: ModuleType) -> SmallClip:
    """A small random CLIP as transformers writes it, and as `tool`, tools/convert_reward_weights.py, converts it."""
    made = SmallClip(write_folder(folder / "source", make_model()), folder / "clip.safetensors")
    tool.main(["--src", str(made.source), "--dst", str(made.converted)])
    return made


def numpy_tensors(model: torch.nn.Module) -> Mapping[str, Any]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}
