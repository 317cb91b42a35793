"""MMDiT's modules, embeddings and position table against those of diffusers' `SD3Transformer2DModel`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed, get_1d_sincos_pos_embed_from_grid

from fopd_jax.models.mmdit import (
    PRESETS,
    Block,
    Embedder,
    FeedForward,
    JointAttention,
    MMDiT,
    MMDiTConfig,
    Modulation,
    centre_crop,
    position_table,
    timestep_embedding,
)
from fopd_jax.models.norms import layer_norm, modulate
from tests.models.mmdit_oracle import (
    BATCH,
    COLUMNS,
    FULL,
    MODULE_TOLERANCE,
    ROWS,
    TEXT,
    check,
    check_gradients,
    network_inputs,
    normal,
    oracle,
    our_inputs,
    our_variables,
    torch_gradients,
)

BLOCKS = {"dual": 0, "plain": FULL.dual_layers, "last": FULL.depth - 1}


def compare_module(
    prefix: str,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    *inputs: np.ndarray,
    config: MMDiTConfig = FULL,
) -> None:
    """Outputs, gradients of inputs and gradients of parameters under `prefix` of Σ output² of the two functions.

    `ours(params, *inputs)` and `theirs(*inputs)` return the same flat list of arrays.
    """
    oracle(config).zero_grad()
    tensors = [torch.tensor(x).requires_grad_() for x in inputs]
    expected = theirs(*tensors)
    sum(y.square().sum() for y in expected).backward()

    def loss(params: Any, *arrays: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        out = ours(params, *arrays)
        return jnp.stack([jnp.square(y).sum() for y in out]).sum(), out

    path = prefix.split("/")
    pick = functools.partial(functools.reduce, lambda tree, name: tree[name], path)
    arguments = (pick(our_variables(config)["params"]), *map(jnp.asarray, inputs))
    gradient = jax.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True)
    (d_params, *d_inputs), out = jax.jit(gradient)(*arguments)
    check(out, [y.detach().numpy() for y in expected], MODULE_TOLERANCE, prefix)
    for i, (found, tensor) in enumerate(zip(d_inputs, tensors, strict=True)):
        check(found, tensor.grad.numpy(), MODULE_TOLERANCE, f"{prefix}, d/d input {i}")
    check_gradients(d_params, pick(torch_gradients(config)), MODULE_TOLERANCE, prefix)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk-norm", "no qk-norm"])
def test_joint_attention(kind: str, qk_norm: bool) -> None:
    config, index = dataclasses.replace(FULL, qk_norm=qk_norm), BLOCKS[kind]
    name = {"dual": "dual_blocks_0", "plain": "blocks_0", "last": "last_block"}[kind]
    module = JointAttention(config, "xla", text_output=kind != "last")

    def theirs(x: torch.Tensor, context: torch.Tensor) -> list[torch.Tensor]:
        out, text = oracle(config).transformer_blocks[index].attn(x, context)
        return [out] if kind == "last" else [out, text]

    def ours(params: Any, x: jax.Array, context: jax.Array) -> list[jax.Array]:
        return [y for y in module.apply({"params": params}, x, context, None) if y is not None]

    x, context = normal(4, BATCH, ROWS * COLUMNS, config.width), normal(5, BATCH, TEXT, config.width)
    compare_module(f"{name}/attn", ours, theirs, x, context, config=config)


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk-norm", "no qk-norm"])
def test_image_only_attention(qk_norm: bool) -> None:
    config = dataclasses.replace(FULL, qk_norm=qk_norm)
    module = JointAttention(config, "xla", text_output=False)
    compare_module(
        "dual_blocks_0/attn2",
        lambda params, x: [module.apply({"params": params}, x, None, None)[0]],
        lambda x: [oracle(config).transformer_blocks[0].attn2(x)],
        normal(6, BATCH, ROWS * COLUMNS, config.width),
        config=config,
    )


@pytest.mark.parametrize("kind", BLOCKS)
def test_block(kind: str) -> None:
    name = {"dual": "dual_blocks_0", "plain": "blocks_0", "last": "last_block"}[kind]
    module = Block(FULL, "xla", dual=kind == "dual", last=kind == "last")

    def theirs(x: torch.Tensor, context: torch.Tensor, embedding: torch.Tensor) -> list[torch.Tensor]:
        text, image = oracle(FULL).transformer_blocks[BLOCKS[kind]](x, context, embedding)
        return [image] if text is None else [image, text]

    def ours(params: Any, x: jax.Array, context: jax.Array, embedding: jax.Array) -> list[jax.Array]:
        (image, text), _ = module.apply({"params": params}, (x, context), embedding, None)
        return [image] if kind == "last" else [image, text]

    shapes = (ROWS * COLUMNS, FULL.width), (TEXT, FULL.width), (FULL.width,)
    compare_module(name, ours, theirs, *(normal(7 + i, BATCH, *shape) for i, shape in enumerate(shapes)))


def test_feed_forward() -> None:
    compare_module(
        "blocks_0/ff",
        lambda params, x: [FeedForward().apply({"params": params}, x, None)],
        lambda x: [oracle(FULL).transformer_blocks[FULL.dual_layers].ff(x)],
        normal(10, BATCH, TEXT, FULL.width),
    )


@pytest.mark.parametrize(
    ("name", "torch_name"), [("time_embed", "timestep_embedder"), ("pooled_embed", "text_embedder")]
)
def test_embedder(name: str, torch_name: str) -> None:
    width_in = {"time_embed": 256, "pooled_embed": FULL.pooled_dim}[name]
    compare_module(
        name,
        lambda params, x: [Embedder(FULL.width).apply({"params": params}, x)],
        lambda x: [getattr(oracle(FULL).time_text_embed, torch_name)(x)],
        normal(11, BATCH, width_in),
    )


def test_timestep_embedding() -> None:
    timestep = np.array([0.0, 8.9, 277.9, 1000.0], np.float32)
    expected = oracle(FULL).time_text_embed.time_proj(torch.tensor(timestep)).numpy()
    check(timestep_embedding(jnp.asarray(timestep)), expected, MODULE_TOLERANCE, "timestep sinusoids")


def test_norm_out() -> None:
    def ours(params: Any, x: jax.Array, embedding: jax.Array) -> list[jax.Array]:
        scale, shift = Modulation(2).apply({"params": params}, embedding)
        return [modulate(layer_norm(x, jnp.float32), shift, scale)]

    x, embedding = normal(12, BATCH, TEXT, FULL.width), normal(13, BATCH, FULL.width)
    compare_module("norm_out", ours, lambda x, e: [oracle(FULL).norm_out(x, e)], x, embedding)


def test_layer_norm_of_a_large_mean() -> None:
    """Rounding and summing the mean costs a few half-ulps, mean·eps; a one-pass variance costs mean²·eps = 1e-2."""
    mean = np.float32(300)
    x = normal(14, BATCH, TEXT, FULL.width) + mean
    expected = torch.nn.functional.layer_norm(torch.tensor(x, dtype=torch.float64), (FULL.width,), eps=1e-6)
    tolerance = 2 * float(mean * np.finfo(np.float32).eps)
    check(layer_norm(jnp.asarray(x), jnp.float32), expected.numpy(), tolerance, "layer norm, mean 300")


def test_patch_embedding() -> None:
    """Patches as the network itself arranges them, read from its intermediates, plus the table of its constants."""
    variables = our_variables(FULL)

    def patch_embedding(*inputs: jax.Array) -> jax.Array:
        _, state = MMDiT(FULL, scan_layers=False).apply(
            variables,
            *inputs,
            capture_intermediates=lambda module, _: module.name == "patch_embed",
            mutable=["intermediates"],
        )
        return state["intermediates"]["patch_embed"]["__call__"][0]

    patches = jax.jit(patch_embedding)(*our_inputs(FULL))
    found = patches + variables["constants"]["pos_embed"].reshape(1, -1, FULL.width)
    expected = oracle(FULL).pos_embed(torch.tensor(network_inputs(FULL)["hidden_states"])).detach().numpy()
    check(found, expected, MODULE_TOLERANCE, "patch embedding with positions")


@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (2, 3), (1, 4), (8, 8)])
def test_centre_crop(rows: int, columns: int) -> None:
    embed = oracle(FULL).pos_embed
    expected = embed.cropped_pos_embed(FULL.patch_size * rows, FULL.patch_size * columns).numpy()
    whole = embed.pos_embed.numpy().reshape(FULL.table_size, FULL.table_size, FULL.width)
    np.testing.assert_array_equal(centre_crop(whole, rows, columns).reshape(expected.shape), expected)


def test_centre_crop_refuses_a_smaller_table() -> None:
    with pytest.raises(ValueError, match="pos_embed holds 3x5 patches, but the input has 4x5"):
        centre_crop(np.zeros((3, 5, 8), np.float32), 4, 5)


@pytest.mark.parametrize("preset", ["sd35_medium", "sd35_large"])
def test_position_table_has_the_presets_geometry(preset: str) -> None:
    """The whole table of diffusers at a small width, whose crops are compared; the grid's extremes included."""
    config = dataclasses.replace(PRESETS[preset], num_heads=1, head_dim=32)
    side = config.table_size
    arguments = {"height": 128, "width": 128, "patch_size": 2, "in_channels": 1, "embed_dim": config.width}
    embed = PatchEmbed(**arguments, pos_embed_max_size=side)
    for rows, columns in ((32, 32), (64, 64), (45, 96), (1, 3), (side, side)):
        expected = embed.cropped_pos_embed(2 * rows, 2 * columns).reshape(rows, columns, -1).numpy()
        np.testing.assert_allclose(position_table(config, rows, columns), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["sd35_medium", "sd35_large"])
def test_position_table_has_the_presets_frequencies(preset: str) -> None:
    config = PRESETS[preset]
    count = 32
    start = (config.table_size - count) // 2
    positions = torch.arange(start, start + count, dtype=torch.float32) / (config.table_size / config.base_size)
    expected = get_1d_sincos_pos_embed_from_grid(config.width // 2, positions).numpy()
    table = position_table(config, count, count)
    half = config.width // 2
    np.testing.assert_allclose(table[5, :, :half], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(table[:, 5, half:], expected, rtol=0, atol=1e-6)


def test_position_table_refuses_a_larger_grid() -> None:
    with pytest.raises(ValueError, match="grid of 9x4 patches exceeds the position table of 8 a side"):
        position_table(FULL, 9, 4)
