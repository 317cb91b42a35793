"""CLIP's vision tower (Radford et al. 2021, arXiv 2103.00020): a vision transformer whose class token is the image.

transformers' `CLIPVisionModelWithProjection` is the oracle of the tests, and parameters are named after it. The layers
are the text tower's, without the causal mask. Letters: B batch, H W image, P patches, D width.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fopd_jax.models.clip import CLIPTowerConfig, Dtype, LayerNorm, dense, embed, stack

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in [0, 1]; the same for every published tower."""


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(CLIPTowerConfig):
    """Shape of a vision tower: square images of `image_size` pixels a side, in patches of `patch_size`."""

    causal: ClassVar[bool] = False
    image_size: int
    patch_size: int

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


VIT_L_14 = CLIPVisionConfig(
    width=1024, depth=24, num_heads=16, mlp_dim=4096, projection_dim=768, activation="quick_gelu", layer_norm_eps=1e-5,
    image_size=224, patch_size=14,
)  # fmt: skip
VIT_H_14 = CLIPVisionConfig(
    width=1280, depth=32, num_heads=16, mlp_dim=5120, projection_dim=1024, activation="gelu", layer_norm_eps=1e-5,
    image_size=224, patch_size=14,
)  # fmt: skip


def normalise(pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """RGB in [0, 1] → what the tower reads."""
    mean, std = (jnp.asarray(each, pixels.dtype)[None, None, None] for each in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


class CLIPVision(nn.Module):
    """The whole tower: normalised images → projected features `[B, P]` in `dtype`, of any length.

    `dtype` is that of the computation, float32 or bfloat16; norms and softmax are in float32. Layers live in one
    scanned stack, `layers`.
    """

    config: CLIPVisionConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p"]:
        """Encode images.

        Raises:
          ValueError: they are not of `image_size`.
        """
        config, dtype, size = self.config, self.dtype, self.config.image_size
        if images.shape[1:3] != (size, size):
            raise ValueError(f"found images of {images.shape[1:3]} pixels, expected {size} x {size}")
        p = config.patch_size
        patches = rearrange(images, "B (H p) (W q) c -> B (H W) (p q c)", p=p, q=p)  # a convolution of stride p
        x = dense(config.width, (None, "embed"), dtype, "patch_embedding", bias=False)(patches)
        first: Any = self.param(
            "class_embedding", nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",)), (config.width,)
        )
        first = jnp.broadcast_to(first.astype(dtype)[None, None], (len(x), 1, config.width))
        positions = embed(config.patches + 1, config.width, (None, "embed"), dtype, "position_embedding")
        x = jnp.concatenate([first, x], axis=1) + positions(jnp.arange(config.patches + 1))[None]
        x = LayerNorm(config.layer_norm_eps, dtype, name="pre_layernorm")(x)
        (x, _), _ = stack(config, dtype)((x, x))
        last = LayerNorm(config.layer_norm_eps, dtype, name="post_layernorm")(x[:, 0])
        return dense(config.projection_dim, ("embed", None), dtype, "visual_projection", bias=False)(last)
