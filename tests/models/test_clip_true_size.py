"""Both published sizes of CLIP, L/14 and H/14, against transformers on random tensors, a tower at a time.

Tensors go by way of a file, so that of a tower one copy is in memory: 2.5 GB of H/14's vision. Real pictures' sizes,
preprocessed by transformers' own processor for the one and by ours for the other. Tolerance on unit vectors: 1e-4.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fopd_jax.interop.files.tables import Component, from_tensors
from fopd_jax.interop.files.tensor_files import open_tensor_file
from fopd_jax.interop.scorers.clip import text_component, vision_component
from fopd_jax.models.clip import CLIP_L, CLIPText
from fopd_jax.models.clip_vision import VIT_H_14, VIT_L_14, CLIPVision
from fopd_jax.parallel.parts import own_mesh
from fopd_jax.rewards.preprocessing import TRANSFORMERS, preprocess
from tests.interop.scorers.clip_oracle import randomise, text_config, vision_config

TEXT_H_14 = dataclasses.replace(
    CLIP_L, width=1024, depth=24, num_heads=16, mlp_dim=4096, projection_dim=1024, activation="gelu"
)
TOLERANCE = 1e-4


def answer(model: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> np.ndarray:
    """Their embeddings, of norm 1; the tensors are left in a file."""
    with torch.no_grad():
        made: Any = model(**inputs)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return torch.nn.functional.normalize(made[0]).numpy()


def check(tower: Any, component: Component, tensors: Any, inputs: np.ndarray, expected: np.ndarray) -> None:
    params = from_tensors(component, tensors)
    out = jax.jit(tower.apply)({"params": params}, inputs)
    found = np.asarray(out[1] if isinstance(out, tuple) else out)
    found = found / np.linalg.norm(found, axis=-1, keepdims=True)
    error = np.abs(found - expected).max()
    print(f"{type(tower).__name__}, {tower.config.width} wide: {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("config", [VIT_L_14, VIT_H_14], ids=["L", "H"])
def test_vision(config: Any, load_script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((512, 512), (300, 451))]
    theirs = CLIPImageProcessorPil()([Image.fromarray(each) for each in pictures], return_tensors="pt")
    path, tool = tmp_path / "vision.safetensors", load_script("tools/convert_reward_weights.py")
    model = randomise(transformers.CLIPVisionModelWithProjection(vision_config(config)))
    expected = answer(model, dict(theirs), path)
    del model
    pixels = preprocess(pictures, TRANSFORMERS, config.image_size, own_mesh(), 1)
    tensors = tool.map_tensors(open_tensor_file(path))
    check(CLIPVision(config), vision_component(config), tensors, pixels, expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CLIP_L, TEXT_H_14], ids=["L", "H"])
def test_text(config: Any, load_script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 49000, (2, 77), dtype=np.int32)
    ids[0, 30:], ids[1, 76] = 49407, 49407
    path, tool = tmp_path / "text.safetensors", load_script("tools/convert_reward_weights.py")
    model = randomise(transformers.CLIPTextModelWithProjection(text_config(config)))
    expected = answer(model, {"input_ids": torch.tensor(ids, dtype=torch.long)}, path)
    del model
    check(CLIPText(config), text_component(config), tool.map_tensors(open_tensor_file(path)), ids, expected)
