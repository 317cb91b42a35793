"""Merges of adapters: exact ones against float64, TIES against PEFT and the paper, DARE against its expectation."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fopd_jax.adapters.lora import Adapter, conform, delta, effective, revive
from fopd_jax.adapters.merging import (
    average_factors,
    combine,
    concatenate,
    dare,
    kept_energy,
    merge,
    merge_measured,
    ties,
    trim,
    truncate,
)
from fopd_jax.config.schema import LoRAConfig

# ---- sums of products


def _experts(count: int, d_in: int, d_out: int, ranks: tuple[int, ...], scales: tuple[float, ...]) -> list[Adapter]:
    """Random adapters of one scanned and one single layer, float32."""
    rng = np.random.default_rng(5)

    def layer(rank: int, *layers: int) -> dict[str, jax.Array]:
        a, b = rng.normal(size=(*layers, d_in, rank)), rng.normal(size=(*layers, rank, d_out))
        return {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}

    return [
        Adapter({"blocks": {"attn": {"to_q": layer(rank, 2)}}, "last_block": {"attn": {"to_q": layer(rank)}}}, scale)
        for rank, scale in zip(ranks[:count], scales, strict=True)
    ]


def _dense(adapter: Adapter) -> dict[str, np.ndarray]:
    """ΔW by module in float64, written out apart from the package."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(adapter.weights, sep="/").items()}
    return {path[:-2]: adapter.scale * flat[path] @ flat[f"{path[:-1]}b"] for path in flat if path.endswith("/a")}


def _average(adapters: list[Adapter], weights: tuple[float, ...]) -> dict[str, np.ndarray]:
    dense = [_dense(adapter) for adapter in adapters]
    return {path: sum(w * each[path] for w, each in zip(weights, dense, strict=True)) for path in dense[0]}


def _error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest relative error of any one module."""
    assert found.keys() == expected.keys()
    return max(np.linalg.norm(found[path] - expected[path]) / np.linalg.norm(expected[path]) for path in expected)


UNEQUAL = {"ranks": (4, 3, 2), "scales": (2.0, 0.5, 3.0)}
SHARES = (0.5, 0.2, -0.3)  # extrapolation counts too


def test_delta_is_scale_times_a_times_b():
    (adapter,) = _experts(1, 12, 10, (4,), (2.0,))
    flat = flatten_dict(delta(adapter), sep="/")
    assert _error({path: np.asarray(leaf) for path, leaf in flat.items()}, _dense(adapter)) <= 1e-6


def test_concatenate_is_the_exact_weighted_sum_of_the_products_whatever_ranks_and_scales():
    experts = _experts(3, 12, 10, **UNEQUAL)
    joined = concatenate(experts, SHARES)
    assert {leaf.shape[-1] for path, leaf in flatten_dict(joined.weights).items() if path[-1] == "a"} == {9}
    assert _error(_dense(joined), _average(experts, SHARES)) <= 1e-6


def test_one_expert_with_weight_one_is_itself():
    (adapter,) = _experts(1, 12, 10, (4,), (2.0,))
    assert _error(_dense(concatenate([adapter], [1.0])), _dense(adapter)) <= 1e-7


@pytest.mark.parametrize("alpha", [1.0, 64.0])
def test_truncation_to_the_full_rank_reproduces_the_sum(alpha: float):
    joined = concatenate(_experts(3, 12, 10, **UNEQUAL), SHARES)
    whole = truncate(joined, LoRAConfig(9, alpha))
    assert whole.scale == alpha / 9
    assert _error(_dense(whole), _dense(joined)) <= 1e-5


@pytest.mark.parametrize("d_in", [12, 6])  # 6: the sum of the ranks exceeds the width
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_to_a_lower_rank_is_the_best_one(rank: int, d_in: int):
    joined = concatenate(_experts(3, d_in, 10, **UNEQUAL), SHARES)
    exact, short = _dense(joined), _dense(truncate(joined, LoRAConfig(rank, 2.0 * rank)))
    for path, matrix in exact.items():
        tail = np.linalg.svd(matrix, compute_uv=False)[..., rank:]
        error = np.linalg.norm(short[path] - matrix, axis=(-2, -1))
        np.testing.assert_allclose(error, np.sqrt(np.square(tail).sum(-1)), rtol=1e-5)


def test_truncation_balances_the_factors():
    short = truncate(concatenate(_experts(3, 12, 10, **UNEQUAL), SHARES), LoRAConfig(3, 6.0))
    flat = flatten_dict(short.weights, sep="/")
    for path in [path for path in flat if path.endswith("/a")]:
        columns, rows = np.linalg.norm(flat[path], axis=-2), np.linalg.norm(flat[f"{path[:-1]}b"], axis=-1)
        np.testing.assert_allclose(columns, rows, rtol=1e-5)


def test_truncation_cannot_raise_the_rank():
    (adapter,) = _experts(1, 12, 10, (4,), (2.0,))
    with pytest.raises(ValueError, match="found 5, but the merged layers have rank 4 at most"):
        truncate(adapter, LoRAConfig(5, 10.0))


def test_averaged_factors_keep_only_part_of_the_average():
    """For K independent experts both the norm ratio and the cosine tend to 1/√K."""
    experts = _experts(3, 192, 192, (16,) * 3, (2.0,) * 3)
    thirds = (1 / 3,) * 3
    exact, factors = _average(experts, thirds), _dense(average_factors(experts, thirds))
    for path, matrix in exact.items():
        for good, bad in zip(matrix.reshape(-1, 192 * 192), factors[path].reshape(-1, 192 * 192), strict=True):
            ratio = np.linalg.norm(bad) / np.linalg.norm(good)
            cosine = good @ bad / np.linalg.norm(good) / np.linalg.norm(bad)
            assert abs(ratio - 1 / math.sqrt(3)) < 0.02
            assert abs(cosine - 1 / math.sqrt(3)) < 0.02


def test_averaged_factors_respect_every_adapters_own_scale():
    experts = _experts(3, 12, 10, (4,) * 3, (2.0, 0.5, 3.0))
    folded = [Adapter(effective(each), 1.0) for each in experts]  # the same updates at one scale
    expected = _dense(average_factors(folded, SHARES))
    assert _error(_dense(average_factors(experts, SHARES)), expected) <= 1e-6


def test_merge_chooses_by_name():
    experts, thirds = _experts(3, 12, 10, (4,) * 3, (2.0,) * 3), (1 / 3,) * 3
    config = LoRAConfig(4, 8.0)
    expected = {
        "svd": truncate(concatenate(experts, thirds), config),
        "concatenate": concatenate(experts, thirds),
        "factors": average_factors(experts, thirds),
    }
    for method, adapter in expected.items():
        jax.tree.map(np.testing.assert_array_equal, merge(method, experts, thirds, config), adapter)
    with pytest.raises(ValueError, match=r"cold_start\.merge: found 'mean', expected one of \('svd', 'concatenate',"):
        merge("mean", experts, thirds, config)


@pytest.mark.parametrize("method", ["svd", "concatenate", "factors", "ties", "dare"])
def test_merges_name_the_precision_of_their_products(method: str):
    """At the default one accelerators round inputs to 8 or 11 bits."""
    experts, config = _experts(2, 12, 10, (4,) * 2, (2.0,) * 2), LoRAConfig(4, 8.0)
    with jax.default_matmul_precision("bfloat16"):
        traced = str(jax.make_jaxpr(lambda each: delta(merge(method, each, (0.5, 0.5), config)))(experts))
    products = traced.count("dot_general[")
    assert products >= (4 if method == "svd" else 1)
    assert traced.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


@pytest.mark.parametrize("method", ["svd", "concatenate", "factors"])
def test_a_merge_can_be_trained_in_every_component(method: str):
    """Where both factors are zero neither would ever get a gradient: of a layer no teacher adapts, of padded ranks."""
    experts = _experts(2, 12, 10, (2, 4), (2.0, 0.5))
    layers = jax.tree.map(lambda leaf: leaf, experts[1].weights)
    layers["blocks"]["ff"] = {"up": layers["blocks"]["attn"]["to_q"]}
    merged = merge(
        method, [conform(str(k), each, layers, 4) for k, each in enumerate(experts)], (0.5, 0.5), LoRAConfig(4)
    )
    alive = revive(jax.random.key(0), merged)
    assert alive.scale == merged.scale
    before, after = flatten_dict(merged.weights, sep="/"), flatten_dict(alive.weights, sep="/")
    assert before.keys() == after.keys()
    assert not before["blocks/ff/up/a"].any()
    for path, leaf in after.items():
        there = before[path] != 0
        np.testing.assert_array_equal(leaf[there], before[path][there])
        if path.endswith("a"):
            assert (leaf.any(-2) | after[f"{path[:-1]}b"].any(-1)).all()
    assert _dense(alive).keys() == _dense(merged).keys()
    for path, update in _dense(alive).items():
        np.testing.assert_array_equal(update, _dense(merged)[path])


# ---- element by element


def _ties(deltas: np.ndarray, weights: np.ndarray, density: float) -> np.ndarray:
    """As the paper defines it, in float64, by sorting."""
    trimmed = np.zeros_like(deltas)
    for each, kept in zip(deltas, trimmed, strict=True):
        largest = np.argsort(np.abs(each).ravel())[-max(int(density * each.size), 1) :]
        kept.ravel()[largest] = each.ravel()[largest]
    mass = np.einsum("k,k...->k...", weights, trimmed)
    agree = np.sign(mass) == np.where(mass.sum(0) >= 0, 1, -1)
    size = np.einsum("k,k...->...", weights, agree.astype(float))
    return weights.sum() * (mass * agree).sum(0) / np.where(size > 0, size, 1)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_trimming_keeps_exactly_the_largest(density: float):
    delta = np.random.default_rng(0).normal(size=(31, 17)).astype(np.float32)
    kept = np.asarray(trim(jnp.asarray(delta), density))
    count = max(int(density * delta.size), 1)
    assert (kept != 0).sum() == count
    least = np.sort(np.abs(delta).ravel())[-count]
    np.testing.assert_array_equal(kept, np.where(np.abs(delta) >= least, delta, 0))
    assert not np.asarray(trim(jnp.zeros((3, 4)), density)).any()


@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), (0.5, 0.2, 0.3), (1.0, 2.0, 0.5)])
def test_ties_is_as_the_paper_defines_it(weights: tuple[float, ...]):
    deltas = np.random.default_rng(1).normal(size=(3, 20, 30))
    found = ties(jnp.asarray(deltas, jnp.float32), jnp.asarray(weights, jnp.float32), 0.3)
    np.testing.assert_allclose(found, _ties(deltas, np.asarray(weights), 0.3), rtol=2e-5, atol=1e-6)


def test_ties_of_one_signs_disagreement_takes_the_heavier_side():
    deltas = jnp.asarray([[[3.0, -1.0]], [[-1.0, -3.0]], [[-1.0, 2.0]]])
    np.testing.assert_allclose(ties(deltas, jnp.full(3, 1 / 3), 1.0), [[3.0, -2.0]], rtol=1e-6)


def test_dare_is_unbiased_and_drops_as_often_as_it_says():
    rng, density, draws = np.random.default_rng(2), 0.3, 2000
    deltas, weights = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32), jnp.asarray([0.7, 0.3])
    keys = jax.random.split(jax.random.key(0), draws)
    found = np.asarray(jax.vmap(lambda key: dare(key, deltas, weights, density))(keys), np.float64)
    expected = np.einsum("k,kio->io", weights, deltas)
    variance = np.einsum("k,kio->io", np.square(weights), np.square(deltas)) * (1 / density - 1)
    errors = (found.mean(0) - expected) / np.sqrt(variance / draws)  # 30 of them, about standard normal
    assert np.abs(errors).max() < 4.5
    np.testing.assert_allclose(found.var(0), variance, rtol=0.2)
    alone = np.asarray(combine("dare", jax.random.key(1), jnp.ones((1, 100, 100)), jnp.ones(1), density))
    assert set(np.unique(alone)) == {0.0, np.float32(1 / density)}
    assert abs((alone != 0).mean() - density) < 5 * math.sqrt(density * (1 - density) / alone.size)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_dense_merges_are_the_best_of_their_rank_and_say_what_they_keep(method: str):
    experts, thirds = _experts(3, 12, 10, **UNEQUAL), (1 / 3,) * 3
    full, energies = merge_measured(method, experts, thirds, LoRAConfig(10, 20.0), 0.5)
    everything = kept_energy(energies)
    assert everything is not None
    assert everything.overall == pytest.approx(1, abs=1e-5)
    short, energies = merge_measured(method, experts, thirds, LoRAConfig(2, 6.0), 0.5)
    assert short.scale == 3.0
    assert {path: matrix.shape for path, matrix in _dense(short).items()} == {
        "blocks/attn/to_q": (2, 12, 10), "last_block/attn/to_q": (12, 10),
    }  # fmt: skip
    shares, kept, whole = [], 0.0, 0.0
    for path, matrix in _dense(full).items():
        squares = np.square(np.linalg.svd(matrix, compute_uv=False))
        error = np.square(np.linalg.norm(_dense(short)[path] - matrix, axis=(-2, -1)))
        np.testing.assert_allclose(error, squares[..., 2:].sum(-1), rtol=1e-3)
        shares += np.atleast_1d(squares[..., :2].sum(-1) / squares.sum(-1)).tolist()
        kept, whole = kept + squares[..., :2].sum(), whole + squares.sum()
    found = kept_energy(energies)
    assert found is not None
    assert found.overall == pytest.approx(kept / whole, rel=1e-4)
    assert found.worst == pytest.approx(min(shares), rel=1e-4)
    assert found.layer == ["blocks/attn/to_q[0]", "blocks/attn/to_q[1]", "last_block/attn/to_q"][np.argmin(shares)]


def test_ties_of_adapters_is_ties_of_their_products_layer_by_layer():
    experts, weights = _experts(3, 12, 10, **UNEQUAL), (0.5, 0.3, 0.2)
    found = _dense(merge("ties", experts, weights, LoRAConfig(10, 5.0), 0.4))
    for path, matrix in found.items():
        parts = np.stack([_dense(each)[path] for each in experts])
        layers = parts[:, None] if parts.ndim == 3 else parts
        expected = np.stack([_ties(layers[:, i], np.asarray(weights), 0.4) for i in range(layers.shape[1])])
        assert np.linalg.norm(matrix - expected.reshape(matrix.shape)) <= 1e-4 * np.linalg.norm(expected)


def test_what_is_dropped_is_the_seeds_alone_and_differs_by_layer():
    ones = Adapter({name: {"a": jnp.ones((2, 30, 1)), "b": jnp.ones((2, 1, 30))} for name in "xy"}, 1.0)
    config, one = LoRAConfig(30, 30.0), [1.0]
    first, again, other = (merge("dare", [ones], one, config, 0.5, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    masks = [np.round(each[name]["a"] @ each[name]["b"]) for each in (first.weights, other.weights) for name in "xy"]
    layers = np.concatenate(masks)
    assert len(np.unique(layers.reshape(8, -1), axis=0)) == 8


def test_the_exact_sum_says_what_its_rank_keeps():
    joined = concatenate(_experts(3, 12, 10, **UNEQUAL), SHARES)
    _, energies = merge_measured("svd", _experts(3, 12, 10, **UNEQUAL), SHARES, LoRAConfig(3, 6.0))
    squares = {path: np.square(np.linalg.svd(each, compute_uv=False)) for path, each in _dense(joined).items()}
    for path, (kept, whole) in energies.items():
        np.testing.assert_allclose(kept, squares[path][..., :3].sum(-1), rtol=1e-4)
        np.testing.assert_allclose(whole, squares[path].sum(-1), rtol=1e-4)
    assert merge_measured("concatenate", _experts(3, 12, 10, **UNEQUAL), SHARES, LoRAConfig(3))[1] == {}
    assert kept_energy({}) is None


def test_a_merged_layer_that_nobody_adapts_stays_zero():
    nothing = Adapter({"x": {"a": jnp.zeros((6, 2)), "b": jnp.zeros((2, 5))}}, 2.0)
    for method in ("ties", "dare"):
        merged, energies = merge_measured(method, [nothing, nothing], (0.5, 0.5), LoRAConfig(2, 4.0))
        np.testing.assert_array_equal(_dense(merged)["x"], np.zeros((6, 5)))
        assert kept_energy(energies) is None


# ---- PEFT's own merges

PEFT_RANK, SIZES = 4, {"first": (12, 10), "second": (10, 14)}


@pytest.mark.parametrize(("theirs", "ours"), [("svd", "svd"), ("cat", "concatenate"), ("ties_svd", "ties")])
def test_merges_are_those_of_peft(theirs: str, ours: str, tmp_path: Path):
    """`add_weighted_adapter` with weights of 1 for TIES, whose mean PEFT does not divide by their sum."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    rng = np.random.default_rng(4)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (d_in, d_out) in SIZES.items():
                setattr(self, name, torch.nn.Linear(d_in, d_out))

    lora = peft.LoraConfig(r=PEFT_RANK, lora_alpha=8, target_modules=list(SIZES))
    model = peft.get_peft_model(Network(), lora, adapter_name="one")
    model.add_adapter("two", lora)
    experts: dict[str, dict[str, Any]] = {"one": {}, "two": {}}
    for adapter, layers in experts.items():
        for name, (d_in, d_out) in SIZES.items():
            a, b = (rng.normal(size=size).astype(np.float32) for size in ((d_in, PEFT_RANK), (PEFT_RANK, d_out)))
            module = getattr(model.base_model.model, name)
            module.lora_A[adapter].weight.data = torch.tensor(a.T.copy())
            module.lora_B[adapter].weight.data = torch.tensor(b.T.copy())
            layers[name] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    weights = (1.0, 1.0) if ours == "ties" else (0.6, 0.4)
    model.add_weighted_adapter(
        ["one", "two"], list(weights), "merged", combination_type=theirs, density=0.3 if ours == "ties" else None,
        **({} if ours == "concatenate" else {"svd_rank": PEFT_RANK}),
    )  # fmt: skip
    shares = (0.5, 0.5) if ours == "ties" else weights
    adapters = [Adapter(layers, 2.0) for layers in experts.values()]
    found = _dense(merge(ours, adapters, shares, LoRAConfig(PEFT_RANK, 8.0), 0.3))
    for name in SIZES:
        expected = getattr(model.base_model.model, name).get_delta_weight("merged").detach().numpy().T
        assert np.linalg.norm(found[name] - expected) <= 1e-4 * np.linalg.norm(expected)
