"""The image autoencoder of Stable Diffusion 3 (Rombach et al. 2022, arXiv 2112.10752; 16 channels: arXiv 2403.03206).

Images and latents are NHWC; images lie in [-1, 1]. Parameter names follow diffusers' `AutoencoderKL`, which is the
oracle of the tests. The flow does not live on the encoder's z but on *flow latents* (z - shift)·scale, of unit
variance: `Autoencoder` speaks of nothing else. Letters: B batch, T pixels as tokens, G groups, C channels.

Parameters may have any floating dtype. Everything is computed in float32, or of a network of another `dtype` all but
statistics of norms and softmax in that one; what comes out is float32. Convolutions and matrix products name their
precision, since accelerators otherwise round a float32 product's inputs to far fewer bits.
"""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, Key

from fopd_jax.models.attention import attention

Dtype = Any
_PRECISION: Literal["highest"] = "highest"
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # of the encoder's z, as in diffusers


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of one autoencoder, and the affine map from its latents to the flow's.

    `channels`: widths of the resolutions, finest first; each but the last is followed by a halving. `layers_per_block`:
    residual blocks per resolution of the encoder; the decoder has one more. `groups`: of every norm.
    """

    channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    image_channels: int
    groups: int
    scaling_factor: float
    shift_factor: float

    @property
    def downsampling(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.channels) - 1)


SD3_VAE = AutoencoderConfig(
    channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    image_channels=3,
    groups=32,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)


def to_flow_latents(z: Float[Array, "*b c"], config: AutoencoderConfig) -> Float[Array, "*b c"]:
    """The encoder's z → flow latents."""
    return (z - config.shift_factor) * config.scaling_factor


def from_flow_latents(latents: Float[Array, "*b c"], config: AutoencoderConfig) -> Float[Array, "*b c"]:
    """Flow latents → the decoder's z; inverse of `to_flow_latents`."""
    return latents / config.scaling_factor + config.shift_factor


def sample_posterior(
    key: Key[Array, ""], mean: Float[Array, "b h w c"], log_variance: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """One sample of N(mean, exp(log_variance)), both as `Autoencoder.encode` gives them."""
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)


def _kernel_init(rank: int) -> Any:
    axes = (None,) * (rank - 2) + ("channels_in", "channels_out")
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)


_bias_init: Any = nn.with_logical_partitioning(nn.initializers.zeros, ("channels_out",))


def _convolution(
    features: int, name: str, dtype: Dtype, size: int = 3, stride: int = 1, padding: Any = "SAME"
) -> nn.Conv:
    """A square convolution, child of the calling module."""
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding,
        dtype=dtype,
        precision=_PRECISION,
        kernel_init=_kernel_init(4),
        bias_init=_bias_init,
        name=name,
    )


def _dense(features: int, name: str, dtype: Dtype) -> nn.Dense:
    """An affine layer, child of the calling module."""
    return nn.Dense(
        features,
        dtype=dtype,
        precision=_PRECISION,
        kernel_init=_kernel_init(2),
        bias_init=_bias_init,
        name=name,
    )


class GroupNorm(nn.Module):
    """Group norm with affine parameters of any floating dtype, eps 1e-6, two-pass variance; computed in float32."""

    groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        inits = {"scale": nn.initializers.ones, "bias": nn.initializers.zeros}
        scale, bias = (
            jnp.asarray(self.param(name, nn.with_logical_partitioning(init, ("channels_out",)), x.shape[-1:]))
            for name, init in inits.items()
        )
        x = x.astype(jnp.float32)
        centred = x - self._mean(x)
        normed = centred * jax.lax.rsqrt(self._mean(jnp.square(centred)) + 1e-6)
        y = normed * scale.astype(jnp.float32)[None, None, None] + bias.astype(jnp.float32)[None, None, None]
        return y.astype(self.dtype)

    def _mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
        means = rearrange(x.mean((1, 2)), "B (G C) -> B G C", G=self.groups).mean(-1)
        return repeat(means, "B G -> B 1 1 (G C)", C=x.shape[-1] // self.groups)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x projected where the width changes."""

    features: int
    groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        y = nn.silu(GroupNorm(self.groups, self.dtype, name="norm1")(x))
        y = _convolution(self.features, "conv1", self.dtype)(y)
        y = nn.silu(GroupNorm(self.groups, self.dtype, name="norm2")(y))
        y = _convolution(self.features, "conv2", self.dtype)(y)
        if x.shape[-1] != self.features:
            x = _convolution(self.features, "conv_shortcut", self.dtype, size=1)(x)
        return x + y


class Attention(nn.Module):
    """Residual attention of all pixels with each other, one head as wide as the input."""

    groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        tokens = rearrange(GroupNorm(self.groups, self.dtype, name="group_norm")(x), "B h w C -> B (h w) C")
        q, k, v = (_dense(x.shape[-1], name, self.dtype)(tokens)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        with jax.default_matmul_precision(_PRECISION):
            y = attention(q, k, v, "xla")[:, :, 0]
        return x + _dense(x.shape[-1], "to_out", self.dtype)(y).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = ResnetBlock(x.shape[-1], self.groups, self.dtype, name="resnets_0")(x)
        x = Attention(self.groups, self.dtype, name="attention")(x)
        return ResnetBlock(x.shape[-1], self.groups, self.dtype, name="resnets_1")(x)


class DownBlock(nn.Module):
    """Residual blocks of one resolution, then a halving by a strided convolution, padded below and on the right."""

    features: int
    layers: int
    groups: int
    downsample: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for i in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.downsample:
            x = _convolution(self.features, "downsampler", self.dtype, stride=2, padding=((0, 1), (0, 1)))(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks of one resolution, then a doubling: each pixel four times, and a convolution."""

    features: int
    layers: int
    groups: int
    upsample: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for i in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.upsample:
            x = repeat(x, "B h w C -> B (h p) (w q) C", p=2, q=2)
            x = _convolution(self.features, "upsampler", self.dtype)(x)
        return x


class Encoder(nn.Module):
    """Images → mean and log-variance of z, side by side on the channels, neither scaled nor clamped."""

    config: AutoencoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b height width c"]) -> Float[Array, "b h w two_z"]:
        config, dtype = self.config, self.dtype
        x = _convolution(config.channels[0], "conv_in", dtype)(images.astype(dtype))
        for i, features in enumerate(config.channels):
            halve = i < len(config.channels) - 1
            x = DownBlock(features, config.layers_per_block, config.groups, halve, dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(config.groups, dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(config.groups, dtype, name="conv_norm_out")(x))
        return _convolution(2 * config.latent_channels, "conv_out", dtype)(x).astype(jnp.float32)


class Decoder(nn.Module):
    """z, not scaled → images, not clipped."""

    config: AutoencoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b height width c"]:
        config, dtype = self.config, self.dtype
        x = _convolution(config.channels[-1], "conv_in", dtype)(z.astype(dtype))
        x = MidBlock(config.groups, dtype, name="mid_block")(x)
        for i, features in enumerate(reversed(config.channels)):
            double = i < len(config.channels) - 1
            x = UpBlock(features, config.layers_per_block + 1, config.groups, double, dtype, name=f"up_blocks_{i}")(x)
        x = nn.silu(GroupNorm(config.groups, dtype, name="conv_norm_out")(x))
        return _convolution(config.image_channels, "conv_out", dtype)(x).astype(jnp.float32)


class Autoencoder(nn.Module):
    """Encoder and decoder between images and flow latents: `apply(variables, …, method="encode")` or `"decode"`.

    Called, it decodes the mean of what it encodes. `dtype` is that of the computation, float32 or bfloat16.
    """

    config: AutoencoderConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def __call__(self, images: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        return self.decode(self.encode(images)[0])

    def encode(
        self, images: Float[Array, "b height width c"]
    ) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """Images in [-1, 1] → mean and log-variance of the flow latents, float32; h = height/8 for SD3.

        Both are in the flow's units: the log-variance is diffusers', clamped as there, plus 2·log(scaling_factor).

        Raises:
          ValueError: height or width is no multiple of `config.downsampling`.
        """
        height, width = images.shape[1:3]
        if height % self.config.downsampling or width % self.config.downsampling:
            raise ValueError(f"images of {height}x{width} pixels: expected multiples of {self.config.downsampling}")
        mean, log_variance = jnp.split(self.encoder(images), 2, axis=-1)
        log_variance = jnp.clip(log_variance, *LOG_VARIANCE_RANGE)
        return to_flow_latents(mean, self.config), log_variance + 2 * math.log(self.config.scaling_factor)

    def decode(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b height width c"]:
        """Flow latents → images in about [-1, 1], not clipped, float32; height = 8·h for SD3."""
        return self.decoder(from_flow_latents(latents.astype(jnp.float32), self.config))
