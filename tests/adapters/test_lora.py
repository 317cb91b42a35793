"""Adapters on small networks and on SD3.5-Medium's shapes: neutral start, routing, target groups."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fopd_jax.adapters.lora import (
    Adapter,
    conform,
    delta,
    effective,
    init_adapter,
    rank_of,
    revive,
    stack_bank,
    target_kernels,
    zeros_like,
)
from fopd_jax.backbones.weights import boxed_variables, init_variables
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig, convert_layers

Tree = Any
TINY = MMDiTConfig(
    depth=4, num_heads=2, head_dim=8, dual_layers=2, qk_norm=True, patch_size=2, channels=3,
    context_dim=5, pooled_dim=7, table_size=4, base_size=4,
)  # fmt: skip
LATENT = (4, 6, 3)
EVERYTHING = LoRAConfig(rank=3, alpha=6.0, targets=("attn", "attn2", "mlp"))


def _noisy(seed: int, tree: Tree, std: float) -> Tree:
    """Every leaf plus noise: at initialisation gates and `b` are zero and would hide what the adapters do."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [leaf + std * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noisy)


@functools.cache
def _variables() -> Tree:
    return _noisy(0, jax.jit(lambda: init_variables(MMDiT(TINY), LATENT, 0))(), 0.2)  # one compilation, not many


def _adapter(seed: int, config: LoRAConfig = EVERYTHING) -> Adapter:
    return _noisy(seed, init_adapter(jax.random.key(seed), _variables()["params"], config, TARGETS), 0.3)


def _inputs(batch: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(9), 3)
    x, context, pooled = (
        jax.random.normal(key, (batch, *shape)) for key, shape in zip(keys, (LATENT, (4, 5), (7,)), strict=True)
    )
    return x, jnp.linspace(50.0, 900.0, batch), context, pooled


@functools.cache
def _forward(scan: bool) -> Any:
    """`(adapter tree in scanned form, inputs, route) → v`, on a network in either form."""
    variables = {**_variables(), "params": convert_layers(_variables()["params"], scan=scan)}
    apply = jax.jit(MMDiT(TINY, scan_layers=scan).apply)

    def forward(adapter: Tree, inputs: tuple[jax.Array, ...], route: jax.Array | None = None) -> jax.Array:
        return apply({**variables, "adapter": convert_layers(adapter, scan=scan)}, *inputs, route)

    return forward


# ---- neutral start, scale, routing


@pytest.mark.parametrize("scan", [True, False])
def test_a_fresh_adapter_leaves_the_base_exactly_as_it_is(scan: bool):
    inputs = _inputs(2)
    base = _forward(scan)({}, inputs)
    fresh = init_adapter(jax.random.key(3), _variables()["params"], EVERYTHING, TARGETS)
    np.testing.assert_array_equal(_forward(scan)(effective(fresh), inputs), base)
    np.testing.assert_array_equal(_forward(scan)(effective(zeros_like(_adapter(1))), inputs), base)
    bank = stack_bank({"one": fresh, "two": zeros_like(fresh)})
    np.testing.assert_array_equal(_forward(scan)(bank, inputs, jnp.array([1, 0])), base)


def test_effective_multiplies_b_by_alpha_over_rank():
    adapter = _adapter(1)
    for path, leaf in flatten_dict(effective(adapter)).items():
        factor = 2.0 if path[-1] == "b" else 1.0  # alpha 6 / rank 3
        np.testing.assert_array_equal(leaf, factor * flatten_dict(adapter.weights)[path])


@pytest.mark.parametrize("scan", [True, False])
def test_a_mixed_batch_over_a_bank_equals_each_sample_alone_with_its_own_adapter(scan: bool):
    adapters = {name: _adapter(seed) for seed, name in enumerate(("text", "composition", "quality"), start=1)}
    route = np.array([2, 0, 1, 1, 0], np.int32)
    inputs = _inputs(len(route))
    routed = _forward(scan)(stack_bank(adapters), inputs, jnp.asarray(route))
    for i, k in enumerate(route):
        alone = [leaf[i : i + 1] for leaf in inputs]
        own = np.asarray(_forward(scan)(effective(list(adapters.values())[k]), tuple(alone)))
        base = np.asarray(_forward(scan)({}, tuple(alone)))
        norm = np.linalg.norm(own)
        assert np.linalg.norm(routed[i : i + 1] - own) <= 1e-5 * norm
        assert np.linalg.norm(own - base) > 1e-2 * norm  # else the comparison would prove nothing


@pytest.mark.parametrize("names", [("to_k",), ("to_q", "add_v_proj")])
def test_a_projection_without_an_update_equals_one_whose_update_is_zero(names: tuple[str, ...]):
    """Queries, keys and values that all adapt share the product with `a`; others do not."""
    weights, inputs, forward = effective(_adapter(1)), _inputs(2), _forward(True)
    flat: dict[tuple[str, ...], Any] = flatten_dict(weights)
    some = unflatten_dict({path: leaf for path, leaf in flat.items() if path[-2] not in names})
    zero = unflatten_dict({path: jnp.zeros_like(leaf) if path[-2] in names else leaf for path, leaf in flat.items()})
    expected = np.asarray(forward(zero, inputs))
    assert np.linalg.norm(forward(some, inputs) - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(forward(weights, inputs) - expected) > 1e-3 * np.linalg.norm(expected)


def test_a_bank_holds_the_adapters_in_the_order_of_the_mapping_before_the_matrices():
    one, two = _adapter(1), _adapter(2)
    bank = flatten_dict(stack_bank({"z": one, "a": two}))
    for path, leaf in bank.items():
        expected = np.stack([flatten_dict(effective(each))[path] for each in (one, two)], axis=-3)
        np.testing.assert_array_equal(leaf, expected)


# ---- what does not fit


def test_a_bank_of_unequal_ranks_names_adapter_layer_found_and_expected():
    short = _adapter(2, LoRAConfig(2, 4.0, EVERYTHING.targets))
    with pytest.raises(
        ValueError, match=r"'short'.*'text'.*blocks/attn/\w+/a: found \(1, 16, 2\), expected \(1, 16, 3\)"
    ):
        stack_bank({"text": _adapter(1), "short": short})


@pytest.mark.parametrize("swapped", [False, True])
def test_a_bank_of_unequal_layers_names_the_one_that_is_missing_or_extra(swapped: bool):
    few, many = (_adapter(1, LoRAConfig(3, 6.0, targets)) for targets in (("attn",), ("attn", "attn2")))
    pair = [("few", few), ("many", many)]
    with pytest.raises(ValueError, match=r"attn2/\w+/a: found .*, expected ") as error:
        stack_bank(dict(pair[::-1] if swapped else pair))
    found, expected = ("nothing", "(2, 16, 3)") if swapped else ("(2, 16, 3)", "nothing")
    assert f"found {found}, expected {expected}" in str(error.value)


@pytest.mark.parametrize(
    ("targets", "message"),
    [((), r"adapter\.targets: found \(\)"), (("attn", "attn3"), r"adapter\.targets: found .*attn3.*attn2")],
)
def test_layers_that_a_family_does_not_name_are_refused(targets: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        init_adapter(jax.random.key(0), _variables()["params"], LoRAConfig(4, 8.0, targets), TARGETS)


# ---- other ranks, fewer layers


def _whole(adapter: Adapter) -> Adapter:
    """Small whole numbers, whose products and sums float32 holds exactly in any order."""
    return Adapter(jax.tree.map(lambda leaf: jnp.round(4 * leaf), adapter.weights), 2.0)


@pytest.mark.parametrize(("targets", "rank"), [(("attn",), 3), (("attn", "mlp"), 4), (EVERYTHING.targets, 9)])
def test_a_conformed_adapter_has_exactly_the_same_update(targets: tuple[str, ...], rank: int):
    layers = _adapter(1).weights
    adapter = _whole(_adapter(2, LoRAConfig(3, 6.0, targets)))
    padded = conform("two", adapter, layers, rank)
    assert padded.scale == adapter.scale
    shapes = {path: leaf.shape for path, leaf in flatten_dict(padded.weights).items()}
    assert shapes.keys() == flatten_dict(layers).keys()
    assert {shape[-1] if path[-1] == "a" else shape[-2] for path, shape in shapes.items()} == {rank}
    assert rank_of(padded) == rank
    expected = flatten_dict(delta(adapter), sep="/")
    for path, update in flatten_dict(delta(padded), sep="/").items():
        np.testing.assert_array_equal(update, expected.get(path, np.zeros_like(update)))
    assert any(leaf.any() for leaf in expected.values())


def test_an_adapter_that_fits_is_left_as_it_is():
    adapter = _adapter(1)
    jax.tree.map(np.testing.assert_array_equal, conform("one", adapter, adapter.weights, 3), adapter)


def test_layers_may_be_shapes_and_ranks_may_differ_by_layer():
    """PEFT's `rank_pattern`: the largest rank counts."""
    shapes = jax.eval_shape(lambda: _adapter(1))
    adapter = _whole(_adapter(2))
    query = adapter.weights["last_block"]["attn"]["to_q"]
    query["a"], query["b"] = query["a"][:, :1], query["b"][:1]
    assert rank_of(adapter) == 3
    padded = conform("two", adapter, shapes.weights, 3)
    assert padded.weights["last_block"]["attn"]["to_q"]["a"].shape == (16, 3)
    jax.tree.map(np.testing.assert_array_equal, delta(padded), delta(adapter))


@pytest.mark.parametrize(
    ("lora", "targets", "rank", "message"),
    [
        (LoRAConfig(3, 6.0, ("attn", "attn2")), ("attn",), 3, r"'two' adapts dual_blocks/attn2/\w+/[ab], but adapter"),
        (LoRAConfig(3, 6.0), ("mlp",), 3, r"'two' adapts \w+/attn/\w+/[ab], but adapter.targets leaves that layer out"),
        (LoRAConfig(4, 8.0), ("attn",), 3, r"'two' at \w+/attn/\w+/a: found shape \(1, 16, 4\), expected .* up to 3"),
    ],
)
def test_what_cannot_be_padded_is_named(lora: LoRAConfig, targets: tuple[str, ...], rank: int, message: str):
    layers = jax.eval_shape(lambda: _adapter(1, LoRAConfig(3, 6.0, targets))).weights
    with pytest.raises(ValueError, match=message):
        conform("two", _adapter(2, lora), layers, rank)


@pytest.mark.parametrize("leaf", ["a", "b"])
def test_a_layer_of_another_size_is_named(leaf: str):
    adapter, layers = _adapter(2), jax.eval_shape(lambda: _adapter(1)).weights
    up = adapter.weights["blocks"]["ff"]["up"]
    up[leaf] = up[leaf][:, :-1] if leaf == "a" else up[leaf][..., :-1]
    with pytest.raises(ValueError, match=rf"blocks/ff/up/{leaf}: found shape .*, expected \(1, \d+\) and a rank up to"):
        conform("two", adapter, layers, 3)


def test_what_is_alive_is_left_as_it_is():
    fresh = init_adapter(jax.random.key(1), _variables()["params"], EVERYTHING, TARGETS)
    for adapter in (fresh, _adapter(1)):
        jax.tree.map(np.testing.assert_array_equal, revive(jax.random.key(0), adapter), adapter)


# ---- targets and initial values


@functools.cache
def _medium() -> Tree:
    """SD3.5-Medium's parameter shapes."""
    return nn.unbox(boxed_variables(MMDiT(PRESETS["sd35_medium"]), (64, 64, 16))["params"])


def _count_modules(params: Tree, targets: tuple[str, ...]) -> int:
    """Dense layers that get an adapter; a scanned stack holds one per layer."""
    return sum(math.prod(kernel.shape[:-2]) for kernel in target_kernels(params, targets, TARGETS).values())


def test_default_targets_are_the_joint_attention_of_sd35_medium():
    config = LoRAConfig()
    assert _count_modules(_medium(), config.targets) == 191  # 24 blocks x 8, but the last has no to_add_out
    adapter = jax.eval_shape(lambda: init_adapter(jax.random.key(0), _medium(), config, TARGETS))
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 191 * 2 * 1536 * 32  # 18.8 million
    modules = {path[-3:-1] for path in flatten_dict(adapter.weights)}
    assert modules == {tuple(name.split("/")) for name in TARGETS["attn"]}
    assert not any("attn2" in path for path in flatten_dict(adapter.weights))


@pytest.mark.parametrize(
    ("targets", "modules"),
    [(("attn2",), 13 * 4), (("mlp",), 24 * 2 + 23 * 2), (("attn", "attn2", "mlp"), 191 + 52 + 94)],
)
def test_target_groups_of_sd35_medium(targets: tuple[str, ...], modules: int):
    assert _count_modules(_medium(), targets) == modules


def test_target_groups_do_not_depend_on_scanning():
    params = _variables()["params"]
    for group in TARGETS:
        assert _count_modules(params, (group,)) == _count_modules(convert_layers(params, scan=False), (group,))


def test_initial_values_are_pefts_gaussian_ones():
    shapes = jax.ShapeDtypeStruct((3, 256, 64), jnp.float32)
    params = {"blocks": {"attn": {"to_q": {"kernel": shapes}, "to_k": {"kernel": shapes}}}}
    adapter = init_adapter(jax.random.key(1), params, LoRAConfig(8, 16.0), TARGETS)
    a = np.stack([adapter.weights["blocks"]["attn"][name]["a"] for name in ("to_q", "to_k")])
    assert adapter.scale == 2.0
    for layer in a.reshape(6, -1):  # 2048 draws each: five standard errors
        assert abs(layer.std() * 8 - 1) < 5 / math.sqrt(2 * layer.size)
        assert abs(layer.mean() * 8) < 5 / math.sqrt(layer.size)
    assert len(np.unique(a)) > 0.99 * a.size  # no two layers share their draws
    for leaf in adapter.weights["blocks"]["attn"].values():
        assert leaf["b"].shape == (3, 8, 64)
        assert not leaf["b"].any()
