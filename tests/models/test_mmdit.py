"""MMDiT against diffusers' `SD3Transformer2DModel`: true structure, small widths, every tensor random and non-zero.

Tolerances on ‖a - b‖/‖b‖, float32: 2e-5 for one module, 2e-4 for the whole network, forward and gradients alike.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed, get_1d_sincos_pos_embed_from_grid
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from flax.traverse_util import flatten_dict

from fopd_jax.interop.sd3.diffusers import module_names, transformer_from_diffusers
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
    convert_layers,
    layer_norm,
    modulate,
    position_table,
    timestep_embedding,
)

MODULE_TOLERANCE = 2e-5
NETWORK_TOLERANCE = 2e-4
ROWS, COLUMNS, TEXT, BATCH = 3, 5, 7, 2

FULL = MMDiTConfig(
    depth=4, num_heads=3, head_dim=16, dual_layers=1, qk_norm=True, patch_size=2, channels=3,
    context_dim=20, pooled_dim=12, table_size=8, base_size=4,
)  # fmt: skip
CASES = {
    "dual and plain, qk-norm": FULL,
    "dual only, no qk-norm": dataclasses.replace(FULL, depth=3, dual_layers=2, qk_norm=False),
    "plain only, qk-norm": dataclasses.replace(FULL, depth=3, num_heads=2, head_dim=32, dual_layers=0),
    "plain only, no qk-norm": dataclasses.replace(FULL, depth=2, dual_layers=0, qk_norm=False),
}
NETWORKS = (  # (case, scanned); both forms where all kinds of block meet
    ("dual and plain, qk-norm", True),
    ("dual and plain, qk-norm", False),
    ("dual only, no qk-norm", True),
    ("plain only, qk-norm", False),
    ("plain only, no qk-norm", True),
)
QUICK_COMPILE = {"xla_backend_optimization_level": 0}  # compiling takes far longer than running here
BLOCKS = {"dual": 0, "plain": FULL.dual_layers, "last": FULL.depth - 1}


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


@functools.cache
def torch_network(config: MMDiTConfig) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """Output, parameters' gradients, latents' gradient of the sum of output² in the oracle, in our layout."""
    model = oracle(config)
    model.zero_grad()
    inputs = {k: torch.tensor(v) for k, v in network_inputs(config).items()}
    inputs["hidden_states"].requires_grad_()
    out = model(**inputs, return_dict=False)[0]
    out.square().sum().backward()
    latents_gradient = channels_last(inputs["hidden_states"].grad.numpy())
    return channels_last(out.detach().numpy()), torch_gradients(config), latents_gradient


@functools.cache
def our_network(config: MMDiTConfig, scan: bool, remat: str = "none") -> tuple[Any, dict[str, Any], Any]:
    """The same of ours; parameters' gradients in per-layer form."""
    model = MMDiT(config, scan_layers=scan, remat=remat)
    variables = our_variables(config)
    params = convert_layers(variables["params"], scan=True) if scan else variables["params"]
    x, *rest = our_inputs(config)

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = model.apply({"params": params, "constants": variables["constants"]}, x, *rest)
        return jnp.square(out).sum(), out

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK_COMPILE)
    (d_params, d_x), out = gradient(params, x)
    return out, convert_layers(d_params, scan=False), d_x


@pytest.mark.parametrize(("case", "scan"), NETWORKS)
def test_network_matches_diffusers(case: str, scan: bool) -> None:
    config = CASES[case]
    out, d_params, d_x = our_network(config, scan)
    expected, expected_d_params, expected_d_x = torch_network(config)
    check(out, expected, NETWORK_TOLERANCE, f"network, {case}")
    check(d_x, expected_d_x, NETWORK_TOLERANCE, f"network, {case}, d/d latents")
    check_gradients(d_params, expected_d_params, NETWORK_TOLERANCE, f"network, {case}")


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
    (d_params, *d_inputs), out = jax.jit(gradient, compiler_options=QUICK_COMPILE)(*arguments)
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


def test_a_table_larger_than_the_grid_is_cropped_by_the_network() -> None:
    """One whole table serves every grid."""
    whole = oracle(FULL).pos_embed.pos_embed.numpy().reshape(FULL.table_size, FULL.table_size, FULL.width)
    variables = our_variables(FULL) | {"constants": {"pos_embed": jnp.asarray(whole)}}
    params = convert_layers(variables["params"], scan=True)
    apply = jax.jit(MMDiT(FULL).apply, compiler_options=QUICK_COMPILE)
    found = apply({**variables, "params": params}, *our_inputs(FULL))
    check(found, torch_network(FULL)[0], NETWORK_TOLERANCE, "network with the whole table")


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


@functools.cache
def abstract_init(config: MMDiTConfig, scan: bool = True) -> dict[str, Any]:
    p = config.patch_size
    shapes = ((1, p, p, config.channels), (1,), (1, 1, config.context_dim), (1, config.pooled_dim))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return nn.unbox(jax.eval_shape(MMDiT(config, scan_layers=scan).init, jax.random.key(0), *inputs))


@pytest.mark.parametrize("preset", ["sd35_medium", "sd35_large", "sd3_medium"])
def test_preset_has_the_size_of_diffusers_model(preset: str) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = SD3Transformer2DModel(**torch_arguments(config))
    expected = sum(p.numel() for p in model.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_init(config)["params"])) == expected
    owners = {name for name, module in model.named_modules() if module._parameters}
    assert set(module_names(config).values()) == {name for name in owners if "weight" in name_parameters(model, name)}
    if preset == "sd35_medium":
        assert expected == 2_243_171_520


def name_parameters(model: torch.nn.Module, name: str) -> set[str]:
    return {k for k, p in model.get_submodule(name)._parameters.items() if p is not None}


def test_bfloat16_compute_stays_near_float32() -> None:
    """Four blocks of about eight roundings in series: a random walk of 32 steps of eps/2, so 4·eps bounds it."""
    config = FULL
    variables = our_variables(config)
    params = convert_layers(variables["params"], scan=True)
    model = MMDiT(config, dtype=jnp.bfloat16)
    apply = jax.jit(model.apply, compiler_options=QUICK_COMPILE)
    found = apply({"params": params, "constants": variables["constants"]}, *our_inputs(config))
    assert found.dtype == jnp.float32
    error = relative_error(found, torch_network(config)[0])
    print(f"network in bfloat16: {error:.1e}")
    assert 1e-4 < error <= 4 * float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_remat_keeps_gradients(remat: str) -> None:
    config = CASES["plain only, no qk-norm"]
    for found, expected in zip(our_network(config, True, remat), our_network(config, True), strict=True):
        assert relative_error(found, expected) <= MODULE_TOLERANCE


def test_scanned_equals_unrolled() -> None:
    for found, expected in zip(our_network(FULL, True), our_network(FULL, False), strict=True):
        assert relative_error(found, expected) <= MODULE_TOLERANCE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [np, jnp])
def test_convert_layers_round_trip(case: str, backend: Any) -> None:
    layers = jax.tree.map(backend.asarray, our_variables(CASES[case])["params"])
    stacked = convert_layers(layers, scan=True)
    expected = abstract_init(CASES[case])["params"]
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, expected)
    assert all(isinstance(leaf, np.ndarray if backend is np else jax.Array) for leaf in jax.tree.leaves(stacked))
    back = convert_layers(stacked, scan=False)
    assert jax.tree.structure(back) == jax.tree.structure(layers)
    jax.tree.map(np.testing.assert_array_equal, back, layers)


def test_attention_is_not_replaced_where_it_cannot_run() -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("cudnn runs here")
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"(?i)cudnn|gpu|cuda"):
        jax.block_until_ready(MMDiT(FULL, "cudnn", scan_layers=False).apply(our_variables(FULL), *our_inputs(FULL)))
