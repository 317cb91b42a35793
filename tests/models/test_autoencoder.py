"""The autoencoder against diffusers' `AutoencoderKL`: true structure, small widths, every tensor random and non-zero.

Tolerances on ‖a - b‖/‖b‖, float32: 2e-5 for one module, 1e-4 for a whole encoder or decoder; gradients alike.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from flax.traverse_util import flatten_dict, unflatten_dict

from fopd_jax.interop.files.tables import from_tensors
from fopd_jax.interop.sd3.autoencoder import autoencoder_component
from fopd_jax.models.autoencoder import (
    SD3_VAE,
    Attention,
    Autoencoder,
    AutoencoderConfig,
    DownBlock,
    GroupNorm,
    ResnetBlock,
    UpBlock,
    from_flow_latents,
    sample_posterior,
    to_flow_latents,
)

MODULE_TOLERANCE = 2e-5
NETWORK_TOLERANCE = 1e-4
BATCH, ROWS, COLUMNS = 2, 5, 3  # of the latents: not square, odd
SMALL = dataclasses.replace(SD3_VAE, channels=(8, 16, 24, 24), latent_channels=5, groups=4)
TINY = dataclasses.replace(SD3_VAE, channels=(4, 6), layers_per_block=1, latent_channels=2, groups=2)


def torch_arguments(config: AutoencoderConfig) -> dict[str, Any]:
    return {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(config.channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(config.channels),
        "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


@functools.cache
def oracle(config: AutoencoderConfig) -> AutoencoderKL:
    """Weights of variance 1/fan-in, biases 0.2·N, norm scales 1 + 0.2·N."""
    model = AutoencoderKL(**torch_arguments(config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model


def from_torch(tensors: dict[str, torch.Tensor], config: AutoencoderConfig) -> dict[str, Any]:
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    return jax.tree.map(jnp.asarray, from_tensors(autoencoder_component(torch_arguments(config)), arrays))


@functools.cache
def our_params(config: AutoencoderConfig) -> dict[str, Any]:
    return from_torch(oracle(config).state_dict(), config)


def pick(tree: dict[str, Any], path: str) -> dict[str, Any]:
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def images(config: AutoencoderConfig, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    scale = config.downsampling
    return np.tanh(normal(1, BATCH, scale * rows, scale * columns, config.image_channels))


def latents(config: AutoencoderConfig, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    return normal(2, BATCH, rows, columns, config.latent_channels)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x.detach().numpy(), 1, -1))


def relative_error(found: Any, expected: Any) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(found: Any, expected: Any, tolerance: float, label: str) -> None:
    assert np.shape(found) == np.shape(expected), label
    error = relative_error(found, expected)
    print(f"{label}: {error:.1e}")
    assert error <= tolerance, f"{label}: relative error {error:.2e} > {tolerance:.0e}"


@functools.cache
def compiled(config: AutoencoderConfig, method: str) -> Callable[..., Any]:
    return jax.jit(functools.partial(Autoencoder(config).apply, method=method))


def run(config: AutoencoderConfig, method: str, params: Any, x: Any) -> Any:
    return compiled(config, method)({"params": params}, jnp.asarray(x))


@functools.cache
def encoded() -> tuple[np.ndarray, np.ndarray]:
    mean, log_variance = run(SMALL, "encode", our_params(SMALL), images(SMALL))
    return np.asarray(mean), np.asarray(log_variance)


@functools.cache
def decoded() -> np.ndarray:
    return np.asarray(run(SMALL, "decode", our_params(SMALL), latents(SMALL)))


def expected_encoding(config: AutoencoderConfig, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and log-variance of diffusers' posterior, the mean scaled as its SD3 pipelines do."""
    with torch.no_grad():
        posterior = oracle(config).encode(channels_first(x)).latent_dist
    mean = (posterior.mean - config.shift_factor) * config.scaling_factor
    return channels_last(mean), channels_last(posterior.logvar)


def expected_decoding(config: AutoencoderConfig, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        z = channels_first(x) / config.scaling_factor + config.shift_factor
        return channels_last(oracle(config).decode(z).sample)


def test_encode_matches_diffusers() -> None:
    mean, log_variance = expected_encoding(SMALL, images(SMALL))
    check(encoded()[0], mean, NETWORK_TOLERANCE, "encode, mean")
    unscaled = encoded()[1] - np.float32(2 * np.log(SMALL.scaling_factor))
    check(unscaled, log_variance, NETWORK_TOLERANCE, "encode, log-variance")


def test_decode_matches_diffusers() -> None:
    check(decoded(), expected_decoding(SMALL, latents(SMALL)), NETWORK_TOLERANCE, "decode")


def test_bfloat16_stays_near_and_comes_out_in_float32() -> None:
    """About thirty roundings of 2⁻⁹ one after the other, as a random walk: 1%; twice that is allowed."""
    rough = Autoencoder(SMALL, jnp.bfloat16)
    found = jax.jit(functools.partial(rough.apply, method="decode"))({"params": our_params(SMALL)}, latents(SMALL))
    assert found.dtype == jnp.float32  # type: ignore[union-attr]
    assert 1e-3 < relative_error(found, decoded()) < 0.02


@pytest.mark.slow
def test_true_size_matches_diffusers() -> None:
    rows = columns = 128 // SD3_VAE.downsampling
    x, z, params = images(SD3_VAE, rows, columns)[:1], latents(SD3_VAE, rows, columns)[:1], our_params(SD3_VAE)
    mean, log_variance = run(SD3_VAE, "encode", params, x)
    expected_mean, expected_log_variance = expected_encoding(SD3_VAE, x)
    check(mean, expected_mean, NETWORK_TOLERANCE, "true size, encode, mean")
    unscaled = log_variance - 2 * np.log(SD3_VAE.scaling_factor)
    check(unscaled, expected_log_variance, NETWORK_TOLERANCE, "true size, encode, log-variance")
    check(run(SD3_VAE, "decode", params, z), expected_decoding(SD3_VAE, z), NETWORK_TOLERANCE, "true size, decode")


MODULES: dict[str, tuple[nn.Module, str, str, int]] = {  # label → (ours, its path, diffusers' path, input channels)
    "resnet": (ResnetBlock(8, 4), "encoder/down_blocks_0/resnets_1", "encoder.down_blocks.0.resnets.1", 8),
    "resnet, shortcut": (ResnetBlock(16, 4), "encoder/down_blocks_1/resnets_0", "encoder.down_blocks.1.resnets.0", 8),
    "attention": (Attention(4), "decoder/mid_block/attention", "decoder.mid_block.attentions.0", 24),
    "down block": (DownBlock(16, 2, 4, True), "encoder/down_blocks_1", "encoder.down_blocks.1", 8),
    "up block": (UpBlock(16, 3, 4, True), "decoder/up_blocks_2", "decoder.up_blocks.2", 24),
}


@pytest.mark.parametrize("label", MODULES)
def test_module_matches_diffusers(label: str) -> None:
    """Outputs, and gradients of the sum of output² in the input and in every parameter; the grid is odd on a side."""
    module, path, torch_path, channels = MODULES[label]
    x, theirs = normal(3, BATCH, 6, 5, channels), oracle(SMALL).get_submodule(torch_path)
    oracle(SMALL).zero_grad()
    torch_x = channels_first(x).requires_grad_()
    expected = theirs(torch_x, None) if label.startswith("resnet") else theirs(torch_x)
    expected.square().sum().backward()

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = module.apply({"params": params}, x)
        assert isinstance(y, jax.Array)
        return jnp.square(y).sum(), y

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (d_params, d_x), y = gradient(pick(our_params(SMALL), path), jnp.asarray(x))
    check(y, channels_last(expected), MODULE_TOLERANCE, label)
    assert torch_x.grad is not None
    check(d_x, channels_last(torch_x.grad), MODULE_TOLERANCE, f"{label}, d/d input")
    check_parameter_gradients(d_params, path, label)


def check_parameter_gradients(found: dict[str, Any], path: str, label: str) -> None:
    """Each layer's weight and bias together: the bias of keys alone can have no gradient but rounding."""
    gradients = dict(oracle(SMALL).state_dict())
    gradients |= {name: p.grad for name, p in oracle(SMALL).named_parameters() if p.grad is not None}
    expected = flatten_dict(pick(from_torch(gradients, SMALL), path))
    leaves = flatten_dict(found)
    assert leaves.keys() == expected.keys()
    for layer in {leaf[:-1] for leaf in leaves}:
        ours, theirs = (
            np.concatenate([np.ravel(leaf) for name, leaf in sorted(tree.items()) if name[:-1] == layer])
            for tree in (leaves, expected)
        )
        check(ours, theirs, MODULE_TOLERANCE, f"{label}, d/d {'/'.join(layer)}")


def test_group_norm_of_a_large_mean() -> None:
    """Rounding and summing the mean costs a few half-ulps, mean·eps; a one-pass variance costs mean²·eps = 1e-2."""
    mean = np.float32(300)
    x = normal(4, BATCH, 8, 8, 8) + mean
    scale, bias = normal(5, 8), normal(6, 8)
    found = GroupNorm(4).apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x))
    tensors = (torch.tensor(v, dtype=torch.float64) for v in (scale, bias))
    expected = torch.nn.functional.group_norm(channels_first(x).double(), 4, *tensors, eps=1e-6)
    check(found, channels_last(expected), 2 * float(mean * np.finfo(np.float32).eps), "group norm, mean 300")


def test_latents_scale_as_the_pipelines_scale_them() -> None:
    z = jnp.asarray(normal(7, 2, 3, 4, 5))
    np.testing.assert_allclose(to_flow_latents(z, SD3_VAE), (z - 0.0609) * 1.5305, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(from_flow_latents(z, SD3_VAE), z / 1.5305 + 0.0609, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(from_flow_latents(to_flow_latents(z, SD3_VAE), SD3_VAE), z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sample", range(BATCH))
def test_samples_do_not_see_each_other(sample: int) -> None:
    """A batch of two gives each what it gets when the other is replaced, bit for bit."""
    others = np.array([i == sample for i in range(BATCH)])[:, None, None, None]
    x, z = (np.where(others, v, np.float32(0.5)) for v in (images(SMALL), latents(SMALL)))
    mean, log_variance = run(SMALL, "encode", our_params(SMALL), x)
    np.testing.assert_array_equal(mean[sample], encoded()[0][sample])
    np.testing.assert_array_equal(log_variance[sample], encoded()[1][sample])
    np.testing.assert_array_equal(run(SMALL, "decode", our_params(SMALL), z)[sample], decoded()[sample])


def test_log_variance_is_clamped_as_in_diffusers() -> None:
    leaves = dict(flatten_dict(our_params(SMALL)))
    path = ("encoder", "conv_out", "bias")
    extremes = np.where(np.arange(SMALL.latent_channels) % 2, np.float32(1e3), np.float32(-1e3))
    leaves[path] = leaves[path].at[SMALL.latent_channels :].set(extremes)
    _, log_variance = run(SMALL, "encode", unflatten_dict(leaves), images(SMALL))
    clamped = DiagonalGaussianDistribution(torch.tensor(np.tile(extremes, 2))[None, :, None, None]).logvar.numpy()
    expected = clamped[0, :, 0, 0] + np.float32(2 * np.log(SMALL.scaling_factor))
    np.testing.assert_allclose(log_variance, np.broadcast_to(expected, log_variance.shape), rtol=1e-6)


def test_posterior_samples_follow_diffusers_distribution(key: jax.Array) -> None:
    """n samples of each element against the scaled posterior of diffusers: mean within 5/√n and variance within
    5·√(2/n) of it, in its own standard deviations; few of 150 elements would pass a wrong one."""
    count = 5_000
    x = images(SMALL)[:1]
    with torch.no_grad():
        posterior = oracle(SMALL).encode(channels_first(x)).latent_dist
    mean, std = (channels_last(v) for v in (posterior.mean, posterior.std))
    mean, std = (mean - 0.0609) * 1.5305, std * 1.5305
    sample = jax.vmap(sample_posterior, in_axes=(0, None, None))
    samples = sample(jax.random.split(key, count), *(jnp.asarray(v[:1]) for v in encoded()))
    whitened = (np.asarray(samples, np.float64) - mean[None]) / std[None]
    assert np.abs(whitened.mean(0)).max() < 5 / count**0.5
    assert np.abs(whitened.var(0) - 1).max() < 5 * (2 / count) ** 0.5


def test_posterior_sample_is_a_function_of_its_key(key: jax.Array) -> None:
    mean, log_variance = (jnp.asarray(v) for v in encoded())
    first, again = (sample_posterior(key, mean, log_variance) for _ in range(2))
    other = sample_posterior(jax.random.key(1), mean, log_variance)
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).all()


def test_gradient_through_decode_matches_diffusers() -> None:
    def loss(z: jax.Array) -> jax.Array:
        image = Autoencoder(SMALL).apply({"params": our_params(SMALL)}, z, method="decode")
        assert isinstance(image, jax.Array)
        return jnp.square(image).sum()

    z = latents(SMALL)
    found = jax.jit(jax.grad(loss))(jnp.asarray(z))
    assert jnp.isfinite(found).all()
    torch_z = channels_first(z).requires_grad_()
    oracle(SMALL).decode(torch_z / SMALL.scaling_factor + SMALL.shift_factor).sample.square().sum().backward()
    assert torch_z.grad is not None
    check(found, channels_last(torch_z.grad), NETWORK_TOLERANCE, "decode, d/d latents")


def test_group_norm_of_a_flat_image_has_finite_gradients() -> None:
    """Every group has variance zero."""
    norm = GroupNorm(4)
    variables = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    gradient = jax.grad(lambda x: jnp.sin(norm.apply(variables, x)).sum())(jnp.full((1, 4, 4, 8), 0.3))
    assert jnp.isfinite(gradient).all()


def test_call_decodes_the_mean_it_encodes() -> None:
    params, x = our_params(TINY), images(TINY)
    mean, _ = run(TINY, "encode", params, x)
    expected = run(TINY, "decode", params, mean)
    check(run(TINY, "__call__", params, x), expected, NETWORK_TOLERANCE, "decoded mean")


def test_bfloat16_parameters_are_computed_with_in_float32() -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), our_params(TINY))
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    for method, x in (("encode", images(TINY)), ("decode", latents(TINY))):
        found, right = (jax.tree.leaves(run(TINY, method, tree, x)) for tree in (params, expected))
        for ours, theirs in zip(found, right, strict=True):
            assert ours.dtype == jnp.float32
            check(ours, theirs, NETWORK_TOLERANCE, f"{method}, bfloat16 parameters")


def test_bfloat16_latents_are_unscaled_in_float32() -> None:
    z = jnp.asarray(latents(TINY)).astype(jnp.bfloat16)
    found, expected = (run(TINY, "decode", our_params(TINY), v) for v in (z, z.astype(jnp.float32)))
    check(found, expected, NETWORK_TOLERANCE, "decode, bfloat16 latents")


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize(("method", "products"), [("encode", 33), ("decode", 41)])
def test_every_product_names_its_precision(method: str, products: int) -> None:
    """Whatever the default is: accelerators round a float32 product's inputs otherwise."""
    x = {"encode": images, "decode": latents}[method](SMALL)
    apply: Callable[..., Any] = functools.partial(Autoencoder(SMALL).apply, method=method)
    with jax.default_matmul_precision("bfloat16"):
        jaxpr = jax.make_jaxpr(apply)({"params": our_params(SMALL)}, x)
    found = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(found) == products
    for equation in found:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, equation


def test_sides_must_be_multiples() -> None:
    with pytest.raises(ValueError, match=r"^images of 20x24 pixels: expected multiples of 8\b"):
        run(SMALL, "encode", our_params(SMALL), np.zeros((1, 20, 24, 3), np.float32))


def test_preset_has_the_size_of_diffusers_model() -> None:
    with torch.device("meta"):
        model = AutoencoderKL(**torch_arguments(SD3_VAE))
    shapes = jax.eval_shape(Autoencoder(SD3_VAE).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    found = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(shapes)))
    assert found == sum(p.numel() for p in model.parameters()) == 83_819_683
    assert SD3_VAE.downsampling == 8


def test_parameters_carry_logical_axes() -> None:
    shapes = jax.eval_shape(Autoencoder(SMALL).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    for path, leaf in flatten_dict(shapes["params"]).items():
        expected = {4: (None, None, "channels_in", "channels_out"), 2: ("channels_in", "channels_out")}
        assert leaf.names == expected.get(leaf.value.ndim, ("channels_out",)), path
