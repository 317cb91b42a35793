"""diffusers' `SD3Transformer2DModel`: true structure, small widths, every tensor random and non-zero.

Tolerances on ‖a - b‖/‖b‖, float32: 2e-5 for one module, 2e-4 for the whole network, forward and gradients alike.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from flax.traverse_util import flatten_dict

from fopd_jax.interop.sd3.diffusers import transformer_from_diffusers
from fopd_jax.models.mmdit import MMDiTConfig

MODULE_TOLERANCE = 2e-5
NETWORK_TOLERANCE = 2e-4
ROWS, COLUMNS, TEXT, BATCH = 3, 5, 7, 2
FULL = MMDiTConfig(
    depth=4, num_heads=3, head_dim=16, dual_layers=1, qk_norm=True, patch_size=2, channels=3,
    context_dim=20, pooled_dim=12, table_size=8, base_size=4,
)  # fmt: skip


def torch_arguments(config: MMDiTConfig) -> dict[str, Any]:
    return {
        "sample_size": config.base_size * config.patch_size,
        "patch_size": config.patch_size,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "num_layers": config.depth,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_dim,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.table_size,
        "dual_attention_layers": tuple(range(config.dual_layers)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


@functools.cache
def oracle(config: MMDiTConfig) -> SD3Transformer2DModel:
    """Weights of variance 1/fan-in, biases 0.2·N, scales and the position table (not the closed form) random too."""
    model = SD3Transformer2DModel(**torch_arguments(config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(0.2 * noise + (1.0 if ".norm_" in name else 0.0))
            else:
                tensor.copy_(noise / (1.0 if name == "pos_embed.pos_embed" else tensor[0].numel() ** 0.5))
    return model


def from_torch(tensors: Mapping[str, torch.Tensor], config: MMDiTConfig) -> dict[str, Any]:
    """Our variables in per-layer form, as jax arrays."""
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    variables = transformer_from_diffusers(arrays, config, rows=ROWS, columns=COLUMNS, scan=False)
    return jax.tree.map(jnp.asarray, variables)


@functools.cache
def our_variables(config: MMDiTConfig) -> dict[str, Any]:
    return from_torch(oracle(config).state_dict(), config)


def torch_gradients(config: MMDiTConfig) -> dict[str, Any]:
    """Gradients that the last backward pass left in the oracle, as a tree of our parameters; zero where none."""
    model = oracle(config)
    gradients = dict(model.state_dict())  # for the table, which is no parameter
    gradients |= {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    return from_torch(gradients, config)["params"]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def relative_error(found: Any, expected: Any) -> float:
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, expected))
    if not b.any():  # such as the last block's text queries, whose rows are dropped: exactly zero on both sides
        return float(np.abs(a).max())
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(found: Any, expected: Any, tolerance: float, label: str) -> None:
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected), label
    error = relative_error(found, expected)
    print(f"{label}: {error:.1e}")
    assert error <= tolerance, f"{label}: relative error {error:.2e} > {tolerance:.0e}"


def check_gradients(found: dict[str, Any], expected: dict[str, Any], tolerance: float, label: str) -> None:
    """Layer by layer, weight and bias together: a bias of keys alone can have no gradient but rounding."""
    ours, theirs = ({k[:-1]: {} for k in flatten_dict(tree)} for tree in (found, expected))
    assert set(ours) == set(theirs)
    for groups, tree in ((ours, found), (theirs, expected)):
        for path, leaf in flatten_dict(tree).items():
            groups[path[:-1]][path[-1]] = leaf
    for path in ours:
        check(ours[path], theirs[path], tolerance, f"{label}, d/d {'/'.join(path)}")


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


@functools.cache
def network_inputs(config: MMDiTConfig) -> dict[str, np.ndarray]:
    """In torch's layout; the grid is not square, smaller than the table, and odd on both sides."""
    p = config.patch_size
    return {
        "hidden_states": normal(1, BATCH, config.channels, ROWS * p, COLUMNS * p),
        "timestep": np.array([8.9, 957.3], np.float32),
        "encoder_hidden_states": normal(2, BATCH, TEXT, config.context_dim),
        "pooled_projections": normal(3, BATCH, config.pooled_dim),
    }


def our_inputs(config: MMDiTConfig) -> tuple[jax.Array, ...]:
    inputs = network_inputs(config)
    arrays = (channels_last(inputs["hidden_states"]), *list(inputs.values())[1:])
    return tuple(map(jnp.asarray, arrays))
