"""The whole MMDiT against diffusers' `SD3Transformer2DModel`, and its own forms against each other."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from fopd_jax.interop.sd3.diffusers import module_names
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig, convert_layers
from tests.models.mmdit_oracle import (
    FULL,
    MODULE_TOLERANCE,
    NETWORK_TOLERANCE,
    channels_last,
    check,
    check_gradients,
    network_inputs,
    oracle,
    our_inputs,
    our_variables,
    relative_error,
    torch_arguments,
    torch_gradients,
)

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

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
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


def test_a_table_larger_than_the_grid_is_cropped_by_the_network() -> None:
    """One whole table serves every grid."""
    whole = oracle(FULL).pos_embed.pos_embed.numpy().reshape(FULL.table_size, FULL.table_size, FULL.width)
    variables = our_variables(FULL) | {"constants": {"pos_embed": jnp.asarray(whole)}}
    params = convert_layers(variables["params"], scan=True)
    apply = jax.jit(MMDiT(FULL).apply)
    found = apply({**variables, "params": params}, *our_inputs(FULL))
    check(found, torch_network(FULL)[0], NETWORK_TOLERANCE, "network with the whole table")


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
    apply = jax.jit(model.apply)
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
