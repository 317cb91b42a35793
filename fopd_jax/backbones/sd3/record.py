"""The record of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206)."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter
from fopd_jax.backbones.record import Backbone, Files, LatentShape, Tokens
from fopd_jax.backbones.sd3.flops import coordinates_backward, pass_flops
from fopd_jax.config.sizes import check_size
from fopd_jax.interop.files.converted import load_table, read_manifest
from fopd_jax.interop.lora.peft import read_lora, write_peft
from fopd_jax.interop.sd3.convert import byte_bar, write_diffusers
from fopd_jax.interop.sd3.diffusers import CLASS_NAME
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig

CLIP_LENGTH = 77  # tokens of both towers
DOWNSAMPLING = 8  # of the autoencoder


def build(shape: MMDiTConfig, attention: Any, dtype: Any, remat: str, kernels: Any) -> MMDiT:
    return MMDiT(shape, attention, dtype, remat=remat, kernels=kernels)


def inputs(
    x: Float[Array, "b h w c"], sigma: Float[Array, "*s"], conditioning: Any
) -> tuple[Float[Array, "b h w c"], Float[Array, " b"], Any, Any]:
    """The network is fed 1000·sigma."""
    timestep = jnp.broadcast_to(1000.0 * sigma, x.shape[:1])
    return x, timestep, conditioning.context, conditioning.pooled


def latent_shape(shape: MMDiTConfig, size: tuple[int, int]) -> LatentShape:
    unit = DOWNSAMPLING * shape.patch_size
    check_size("model.resolution", size, unit, unit * shape.table_size)
    return size[0] // DOWNSAMPLING, size[1] // DOWNSAMPLING, shape.channels


def encoded(shape: MMDiTConfig, t5_length: int) -> tuple[tuple[int, int], tuple[int]]:
    return (CLIP_LENGTH + t5_length, shape.context_dim), (shape.pooled_dim,)


def tokens(shape: MMDiTConfig, latent: LatentShape, text: int) -> Tokens:
    return Tokens(latent[0] * latent[1] // shape.patch_size**2, text)


def constants(folder: Path, shape: MMDiTConfig, latent: LatentShape) -> dict[str, np.ndarray]:
    """The middle of the checkpoint's own position table, in float32."""
    crop = (shape.table_size, latent[0] // shape.patch_size, latent[1] // shape.patch_size)
    return {"pos_embed": load_table(folder, crop).astype(np.float32)}


def write_adapter(folder: Path, adapter: Adapter, shape: MMDiTConfig, card: AdapterCard) -> None:
    write_peft(folder, adapter, shape, card)


def write_network(folder: Path, base: Path, params: Any) -> None:
    """As diffusers' folder, with the position table of the converted base."""
    write_diffusers(folder, read_manifest(base), params, load_table(base), progress=byte_bar)


SD3 = Backbone(
    name="sd3",
    presets=PRESETS,
    module=MMDiT,
    build=build,
    inputs=inputs,
    latent_shape=latent_shape,
    encoded=encoded,
    targets=TARGETS,
    flops=pass_flops,
    tokens=tokens,
    files=Files(CLASS_NAME, read_lora, write_adapter, constants, write_network),
    coordinates=coordinates_backward,
    float8=True,
    kernels=True,
)
