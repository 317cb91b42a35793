"""PEFT's and diffusers' network and ours with the same weights, and adapters for both."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from flax.traverse_util import flatten_dict, unflatten_dict
from peft import LoraConfig, PeftModel, get_peft_model

from fopd_jax.adapters.lora import Adapter, effective, init_adapter
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.lora.modules import places
from fopd_jax.interop.lora.peft import read_lora, write_comfyui, write_diffusers, write_peft
from fopd_jax.interop.sd3.diffusers import transformer_from_diffusers
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig(
    depth=5, num_heads=2, head_dim=8, dual_layers=2, qk_norm=True, patch_size=2, channels=3,
    context_dim=6, pooled_dim=5, table_size=6, base_size=3,
)  # fmt: skip
ATTENTION = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
]  # fmt: skip
IMAGE_ATTENTION = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
EVERYTHING = ATTENTION + IMAGE_ATTENTION + FEED_FORWARD
QUERY = "base_model.model.transformer_blocks.0.attn.to_q"
WRITERS: dict[str, Callable[[Path, Adapter, MMDiTConfig], None]] = {
    "peft": write_peft,
    "diffusers.safetensors": write_diffusers,
    "diffusers_folder": write_diffusers,
    "comfyui.safetensors": write_comfyui,
}


@functools.cache
def base() -> SD3Transformer2DModel:
    """Random weights, gates and position table included. To be copied, never adapted in place."""
    random = torch.Generator().manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=6, patch_size=2, in_channels=3, out_channels=3, num_layers=5, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=5,
        pos_embed_max_size=6, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    for tensor in model.state_dict().values():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=random))
    return model.eval()


@functools.cache
def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    shapes = ((2, 8, 6, 3), (2, 4, 6), (2, 5))
    x, context, pooled = (random.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return x, np.array([500.0, 40.0], np.float32), context, pooled


def torch_velocity(model: Any) -> np.ndarray:
    x, timestep, context, pooled = (torch.tensor(each) for each in inputs())
    with torch.no_grad():
        out = model(
            hidden_states=x.permute(0, 3, 1, 2), timestep=timestep,
            encoder_hidden_states=context, pooled_projections=pooled,
        ).sample  # fmt: skip
    return out.permute(0, 2, 3, 1).numpy()


@functools.cache
def variables() -> dict[str, Any]:
    tensors = {name: tensor.numpy() for name, tensor in base().state_dict().items()}
    return transformer_from_diffusers(tensors, CONFIG, rows=4, columns=3)


@functools.cache
def compiled() -> Callable[..., jax.Array]:
    return jax.jit(MMDiT(CONFIG, scan_layers=True).apply)


def our_velocity(adapter: Adapter, *, pad: bool = True) -> np.ndarray:
    """With adapters padded to one shape, so that the network compiles once for all of them."""
    tree = flatten_dict(effective(adapter))
    if pad:
        for place in places(CONFIG).values():
            for leaf, shape in place.factor_shapes(6).items():
                found = tree.get((*place.path, leaf), np.zeros(shape, np.float32))
                missing = [(0, size - own) for size, own in zip(shape, found.shape, strict=True)]
                tree[*place.path, leaf] = np.pad(found, missing)
    return np.asarray(compiled()({**variables(), "adapter": unflatten_dict(tree)}, *inputs()))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def randomise(model: torch.nn.Module) -> None:
    """Random factors of both kinds; PEFT starts with B = 0."""
    random = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)


def peft_model(**fields: Any) -> PeftModel:
    settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **fields})
    model = get_peft_model(copy.deepcopy(base()), settings)
    randomise(model)
    return model.eval()


def save_peft(folder: Path, **fields: Any) -> PeftModel:
    model = peft_model(**fields)
    model.save_pretrained(str(folder))
    return model


def random_adapter(scale: float = 2.0, targets: tuple[str, ...] = tuple(TARGETS), rank: int = 3) -> Adapter:
    shape = jax.eval_shape(
        lambda: init_adapter(jax.random.key(0), variables()["params"], LoRAConfig(rank, 1.0, targets), TARGETS)
    )
    random = np.random.default_rng(3)
    weights = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, dtype=np.float32), shape.weights)
    return Adapter(weights, scale)


def check_equal(found: Adapter, expected: Adapter) -> None:
    jax.tree.map(np.testing.assert_array_equal, found.weights, expected.weights)
    assert found.scale == expected.scale
    assert {leaf.dtype for leaf in jax.tree.leaves(found.weights)} == {np.dtype(np.float32)}


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def pipeline() -> StableDiffusion3Pipeline:
    absent = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    return StableDiffusion3Pipeline(
        transformer=copy.deepcopy(base()), scheduler=FlowMatchEulerDiscreteScheduler(), **absent
    )


def refused(path: Path, message: str) -> None:
    """One line that begins with the file's name and holds the message."""
    with pytest.raises(ValueError) as caught:
        read_lora(path, CONFIG)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text
