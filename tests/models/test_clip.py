"""CLIP's text tower against transformers' `CLIPTextModelWithProjection`: true structure, small widths, random tensors.

Tolerances on ‖a - b‖/‖b‖, float32: 2e-5 for one module, 1e-4 for the whole tower. In bfloat16, four layers of about
eight roundings in series are a random walk of 32 steps of eps/2, which 4·eps bounds.
"""

import dataclasses
import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec as P

from fopd_jax.interop.files.tables import from_tensors
from fopd_jax.interop.sd3.text_encoders import clip_component
from fopd_jax.models.clip import (
    CLIP_G,
    CLIP_L,
    MLP,
    Attention,
    CLIPText,
    CLIPTextConfig,
    Layer,
    LayerNorm,
    eos_position,
)

MODULE_TOLERANCE = 2e-5
NETWORK_TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 4 * float(jnp.finfo(jnp.bfloat16).eps)
VOCABULARY, BOS, EOS, MODERN_EOS = 100, 98, 99, 41

L_LIKE = CLIPTextConfig(
    vocab_size=VOCABULARY, width=48, depth=3, num_heads=3, mlp_dim=192, max_length=77, projection_dim=48,
    activation="quick_gelu", layer_norm_eps=1e-5, eos_token_id=2,
)  # fmt: skip
G_LIKE = dataclasses.replace(L_LIKE, width=80, depth=4, num_heads=5, mlp_dim=320, projection_dim=56, activation="gelu")
MODERN = dataclasses.replace(L_LIKE, eos_token_id=MODERN_EOS)
CASES = {"L": L_LIKE, "G": G_LIKE, "modern EOS": MODERN}
PADDING = {"L": EOS, "G": 0, "modern EOS": VOCABULARY - 1}


def torch_config(config: CLIPTextConfig) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        architectures=["CLIPTextModelWithProjection"],
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        max_position_embeddings=config.max_length,
        projection_dim=config.projection_dim,
        hidden_act=config.activation,
        layer_norm_eps=config.layer_norm_eps,
        eos_token_id=config.eos_token_id,
        bos_token_id=0,
    )


@functools.cache
def oracle(config: CLIPTextConfig) -> transformers.CLIPTextModelWithProjection:
    """Weights of variance 1/fan-in, embeddings of 1, biases of 0.04, scales 1 + 0.2·N."""
    model = transformers.CLIPTextModelWithProjection(torch_config(config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                tensor.copy_(noise if "embedding" in name else noise / tensor.shape[1] ** 0.5)
    return model


@functools.cache
def our_params(config: CLIPTextConfig) -> dict[str, Any]:
    component = clip_component(json.loads(torch_config(config).to_json_string(use_diff=False)))
    assert component.config == config
    tensors = {name: tensor.numpy() for name, tensor in oracle(config).state_dict().items()}
    return jax.tree.map(jnp.asarray, from_tensors(component, tensors))


def layer_params(config: CLIPTextConfig, index: int) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[index], our_params(config)["layers"])


def texts(case: str, length: int) -> np.ndarray:
    """BOS, words, EOS, padding, the EOS at the earliest place, in the middle and at the last place."""
    config = CASES[case]
    words = np.random.default_rng(0).integers(50, BOS, (3, length), dtype=np.int32)
    words[:, 0] = BOS
    for row, end in zip(words, (1, length // 2, length - 1), strict=True):
        row[end:] = PADDING[case]
        row[end] = EOS if config.eos_token_id == 2 else config.eos_token_id
    return words


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def relative_error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check(found: Any, expected: torch.Tensor, tolerance: float, label: str) -> None:
    error = relative_error(found, expected.detach().numpy())
    print(f"{label}: {error:.1e}")
    assert error <= tolerance, f"{label}: relative error {error:.2e} > {tolerance:.0e}"


def expected_outputs(config: CLIPTextConfig, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = oracle(config)(torch.tensor(ids, dtype=torch.long), output_hidden_states=True)
    return out.hidden_states[-2], out.text_embeds


def our_outputs(config: CLIPTextConfig, ids: np.ndarray, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    apply = jax.jit(CLIPText(config, dtype).apply)
    return apply({"params": our_params(config)}, jnp.asarray(ids))


@pytest.mark.parametrize("length", [77, 6])
@pytest.mark.parametrize("case", CASES)
def test_tower_matches_transformers(case: str, length: int) -> None:
    ids = texts(case, length)
    for found, expected, name in zip(
        our_outputs(CASES[case], ids), expected_outputs(CASES[case], ids), ("hidden", "pooled"), strict=True
    ):
        assert found.dtype == jnp.float32
        for row in range(len(ids)):  # alone, so that no row hides behind another
            check(found[row], expected[row], NETWORK_TOLERANCE, f"{name}, {case}, {length} tokens, row {row}")


def test_hidden_states_of_one_layer_are_the_embeddings() -> None:
    config = dataclasses.replace(L_LIKE, depth=1)
    ids = texts("L", 20)
    hidden, _ = our_outputs(config, ids)
    embeddings = oracle(config).text_model.embeddings(torch.tensor(ids, dtype=torch.long))
    np.testing.assert_array_equal(hidden, embeddings.detach().numpy())


def test_attention_is_causal() -> None:
    ids = texts("G", 12)
    changed = ids.copy()
    changed[:, 7:] = 5
    found, other = (np.asarray(our_outputs(G_LIKE, each)[0]) for each in (ids, changed))
    np.testing.assert_allclose(found[:, :7], other[:, :7], rtol=0, atol=1e-6)
    assert np.abs(found[:, 7:] - other[:, 7:]).min(axis=-1).max() > 1e-3


@pytest.mark.parametrize(
    ("eos_token_id", "ids", "position"),
    [
        (2, [98, 50, 99, 99, 99], 2),  # the first of several
        (2, [98, 50, 60, 99, 0], 3),
        (2, [98, 2, 60, 61, 99], 4),  # not the id 2 itself
        (41, [98, 50, 41, 99, 41], 2),  # not the highest
        (41, [98, 50, 60, 99, 99], 0),  # none
        (99, [98, 99, 99, 99, 99], 1),
    ],
)
def test_eos_position(eos_token_id: int, ids: list[int], position: int) -> None:
    """What the function says, and what transformers pools."""
    assert eos_position(jnp.asarray([ids]), eos_token_id).tolist() == [position]
    config = dataclasses.replace(L_LIKE, eos_token_id=eos_token_id)
    model = oracle(config)
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
        states = model.text_projection(model.text_model.final_layer_norm(out.hidden_states[-1]))
    check(states[:, position], out.text_embeds, 1e-6, "transformers' own pooling")


@pytest.mark.parametrize("case", ["L", "G"])
def test_layer(case: str) -> None:
    config = CASES[case]
    x = normal(1, 2, 9, config.width)
    mask = torch.full((1, 1, 9, 9), -torch.inf).triu(1)
    for index in range(config.depth):
        expected = oracle(config).text_model.encoder.layers[index](torch.tensor(x), mask)
        states = (jnp.asarray(x), jnp.zeros_like(x))
        (found, before), _ = Layer(config).apply({"params": layer_params(config, index)}, states)
        check(found, expected, MODULE_TOLERANCE, f"layer {index}, {case}")
        np.testing.assert_array_equal(before, x)


@pytest.mark.parametrize("case", ["L", "G"])
def test_attention(case: str) -> None:
    config = CASES[case]
    x = normal(2, 2, 9, config.width)
    mask = torch.full((1, 1, 9, 9), -torch.inf).triu(1)
    expected, _ = oracle(config).text_model.encoder.layers[1].self_attn(torch.tensor(x), mask)
    found = Attention(config).apply({"params": layer_params(config, 1)["self_attn"]}, jnp.asarray(x))
    check(found, expected, MODULE_TOLERANCE, f"attention, {case}")


@pytest.mark.parametrize("case", ["L", "G"])
def test_mlp(case: str) -> None:
    """Inputs wide enough that the GELUs' three approximations differ by more than the tolerance."""
    config = CASES[case]
    x = 3 * normal(3, 2, 9, config.width)
    expected = oracle(config).text_model.encoder.layers[1].mlp(torch.tensor(x))
    found = MLP(config).apply({"params": layer_params(config, 1)["mlp"]}, jnp.asarray(x))
    check(found, expected, MODULE_TOLERANCE, f"MLP, {case}")


@pytest.mark.parametrize("scale", [1.0, 3e-3])  # with the second, eps is as large as the variance
@pytest.mark.parametrize("name", ["layer_norm1", "layer_norm2"])
def test_layer_norm(name: str, scale: float) -> None:
    x = scale * normal(4, 2, 9, L_LIKE.width)
    expected = getattr(oracle(L_LIKE).text_model.encoder.layers[2], name)(torch.tensor(x))
    found = LayerNorm(L_LIKE.layer_norm_eps).apply({"params": layer_params(L_LIKE, 2)[name]}, jnp.asarray(x))
    check(found, expected, MODULE_TOLERANCE, f"{name}, inputs of {scale}")


def test_layer_norm_of_a_large_mean() -> None:
    """Rounding and summing the mean costs a few half-ulps, mean·eps; a one-pass variance costs mean²·eps = 1e-2."""
    mean = np.float32(300)
    x = normal(5, 2, 9, L_LIKE.width) + mean
    norm = oracle(L_LIKE).text_model.final_layer_norm
    weight, bias = norm.weight.double(), norm.bias.double()
    expected = torch.nn.functional.layer_norm(torch.tensor(x).double(), (L_LIKE.width,), weight, bias, eps=1e-5)
    found = LayerNorm(1e-5).apply({"params": our_params(L_LIKE)["final_layer_norm"]}, jnp.asarray(x))
    check(found, expected, 2 * float(mean * np.finfo(np.float32).eps), "layer norm, mean 300")


@pytest.mark.parametrize("case", ["L", "G"])
def test_bfloat16_compute_stays_near_float32(case: str) -> None:
    ids = texts(case, 77)
    for found, expected, name in zip(
        our_outputs(CASES[case], ids, jnp.bfloat16),
        expected_outputs(CASES[case], ids),
        ("hidden", "pooled"),
        strict=True,
    ):
        assert found.dtype == jnp.bfloat16
        check(found, expected, BFLOAT16_TOLERANCE, f"{name} in bfloat16, {case}")
        assert relative_error(found, expected) > 1e-4


def test_too_long_text_is_refused() -> None:
    with pytest.raises(ValueError, match="texts of 78 tokens exceed the 77 positions of CLIP"):
        jax.eval_shape(CLIPText(L_LIKE).init, jax.random.key(0), jnp.zeros((1, 78), jnp.int32))


@pytest.mark.parametrize(("config", "expected"), [(CLIP_L, 123_650_304), (CLIP_G, 694_659_840)])
def test_preset_has_the_size_of_transformers_model(config: CLIPTextConfig, expected: int) -> None:
    with torch.device("meta"):
        model = transformers.CLIPTextModelWithProjection(torch_config(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    variables = jax.eval_shape(CLIPText(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected


def test_logical_axes() -> None:
    variables = jax.eval_shape(CLIPText(L_LIKE).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    norm = {"scale": P("layers", None), "bias": P("layers", None)}
    heads = {"kernel": P("layers", "embed", "heads"), "bias": P("layers", "heads")}
    assert nn.get_partition_spec(variables)["params"] == {
        "token_embedding": {"embedding": P("vocab", "embed")},
        "position_embedding": {"embedding": P(None, "embed")},
        "layers": {
            "layer_norm1": norm,
            "self_attn": {
                "q_proj": heads,
                "k_proj": heads,
                "v_proj": heads,
                "out_proj": {"kernel": P("layers", "heads", "embed"), "bias": P("layers", "embed")},
            },
            "layer_norm2": norm,
            "mlp": {
                "fc1": {"kernel": P("layers", "embed", "mlp"), "bias": P("layers", "mlp")},
                "fc2": {"kernel": P("layers", "mlp", "embed"), "bias": P("layers", "embed")},
            },
        },
        "final_layer_norm": {"scale": P(None), "bias": P(None)},
        "text_projection": {"kernel": P("embed", None)},
    }
