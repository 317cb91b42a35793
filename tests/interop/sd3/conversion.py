"""Conversions without a display, and torch's side of them."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from fopd_jax.interop.sd3.convert import convert

CLASSES: dict[str, Any] = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
STEMS = dict.fromkeys(CLASSES, "model") | dict.fromkeys(("transformer", "vae"), "diffusion_pytorch_model")
TABLE = "pos_embed.pos_embed"


def silent(title: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    return contextlib.nullcontext(lambda count: None)


def run(src: Path, dst: Path, dtype: str = "float32", components: list[str] | None = None) -> list[str]:
    return convert(src, dst, dtype=dtype, components=components, progress=silent)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
