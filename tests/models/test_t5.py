"""T5's encoder against transformers' `T5EncoderModel`: true structure, small widths, every tensor random.

Tolerances on ‖a - b‖/‖b‖, float32: 2e-5 for one module, 1e-4 for the whole encoder. In bfloat16, four layers of about
eight roundings in series are a random walk of 32 steps of eps/2, which 4·eps bounds.
"""

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
from transformers.models.t5.modeling_t5 import T5Attention

from fopd_jax.interop.files.tables import from_tensors
from fopd_jax.interop.sd3.text_encoders import t5_component
from fopd_jax.models.t5 import (
    T5_XXL,
    Attention,
    GatedMLP,
    Layer,
    RelativePositionBias,
    RMSNorm,
    T5Config,
    T5Encoder,
    relative_position_bucket,
)

MODULE_TOLERANCE = 2e-5
NETWORK_TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 4 * float(jnp.finfo(jnp.bfloat16).eps)
LENGTHS = (1, 7, 77, 300)  # the last one beyond the largest distance, both ways

SMALL = T5Config(
    vocab_size=100, width=48, depth=4, num_heads=4, head_dim=16, mlp_dim=112,
    num_buckets=32, max_distance=128, rms_norm_eps=1e-6,
)  # fmt: skip


def torch_config(config: T5Config) -> transformers.T5Config:
    return transformers.T5Config(
        architectures=["T5EncoderModel"],
        vocab_size=config.vocab_size,
        d_model=config.width,
        num_layers=config.depth,
        num_heads=config.num_heads,
        d_kv=config.head_dim,
        d_ff=config.mlp_dim,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.rms_norm_eps,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


@functools.cache
def oracle() -> transformers.T5EncoderModel:
    """Weights of variance 1/fan-in, embeddings of tokens and distances of 1, scales 1 + 0.2·N.

    Queries are smaller by √H, as T5 initialises them, since its attention is not scaled.
    """
    model = transformers.T5EncoderModel(torch_config(SMALL)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif name == "shared.weight" or "relative_attention_bias" in name:
                parameter.copy_(noise)
            else:
                fan_in = parameter.shape[1] * (SMALL.head_dim if name.endswith(".q.weight") else 1)
                parameter.copy_(noise / fan_in**0.5)
    return model


@functools.cache
def our_params() -> dict[str, Any]:
    component = t5_component(json.loads(torch_config(SMALL).to_json_string(use_diff=False)))
    assert component.config == SMALL
    tensors = {name: tensor.numpy() for name, tensor in oracle().state_dict().items()}
    return jax.tree.map(jnp.asarray, from_tensors(component, tensors))


def layer_params(index: int) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[index], our_params()["layers"])


def texts(length: int) -> np.ndarray:
    """Words, EOS (1) and padding (0), which is attended like all else; the second text fills its row."""
    ids = np.random.default_rng(0).integers(2, SMALL.vocab_size, (2, length), dtype=np.int32)
    ids[0, length // 2 :] = 0
    ids[0, length // 2], ids[1, -1] = 1, 1
    return ids


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


@functools.cache
def expected_states(length: int) -> torch.Tensor:
    with torch.no_grad():
        return oracle()(torch.tensor(texts(length), dtype=torch.long)).last_hidden_state


def our_states(params: dict[str, Any], length: int, dtype: Any = jnp.float32) -> jax.Array:
    apply = jax.jit(T5Encoder(SMALL, dtype).apply)
    return apply({"params": params}, jnp.asarray(texts(length)))


@pytest.mark.parametrize("length", LENGTHS)
def test_encoder_matches_transformers(length: int) -> None:
    found = our_states(our_params(), length)
    assert found.dtype == jnp.float32
    for row in range(len(found)):
        check(found[row], expected_states(length)[row], NETWORK_TOLERANCE, f"encoder, {length} tokens, row {row}")


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 100), (16, 64), (8, 20)])
def test_buckets_are_transformers_own_at_every_distance(num_buckets: int, max_distance: int) -> None:
    relative = np.arange(-2000, 2001)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(relative), num_buckets=num_buckets, max_distance=max_distance
    ).numpy()
    found = relative_position_bucket(relative, num_buckets, max_distance)
    np.testing.assert_array_equal(found, expected)
    assert set(found.tolist()) == set(expected.tolist()) <= set(range(num_buckets))


@pytest.mark.parametrize("length", LENGTHS)
def test_position_bias(length: int) -> None:
    """A copy of table entries, so equal to the last bit."""
    expected = oracle().encoder.block[0].layer[0].SelfAttention.compute_bias(length, length)
    found = RelativePositionBias(SMALL).apply({"params": our_params()["relative_attention_bias"]}, length)
    np.testing.assert_array_equal(found, expected.detach().numpy())


def position_bias(seed: int, length: int) -> np.ndarray:
    return normal(seed, 1, SMALL.num_heads, length, length)


@pytest.mark.parametrize("index", range(SMALL.depth))
def test_layer(index: int) -> None:
    x, bias = normal(1, 2, 9, SMALL.width), position_bias(2, 9)
    expected = oracle().encoder.block[index](torch.tensor(x), position_bias=torch.tensor(bias))[0]
    found, _ = Layer(SMALL).apply({"params": layer_params(index)}, jnp.asarray(x), jnp.asarray(bias))
    check(found, expected, MODULE_TOLERANCE, f"layer {index}")


def test_attention() -> None:
    x, bias = normal(3, 2, 9, SMALL.width), position_bias(4, 9)
    expected = oracle().encoder.block[1].layer[0].SelfAttention(torch.tensor(x), position_bias=torch.tensor(bias))[0]
    params = layer_params(1)["attention"]
    found = Attention(SMALL).apply({"params": params}, jnp.asarray(x), jnp.asarray(bias))
    check(found, expected, MODULE_TOLERANCE, "attention")


def test_gated_mlp() -> None:
    """Inputs wide enough that exact and tanh-approximated GELU differ by more than the tolerance."""
    x = 3 * normal(5, 2, 9, SMALL.width)
    expected = oracle().encoder.block[1].layer[1].DenseReluDense(torch.tensor(x))
    found = GatedMLP(SMALL).apply({"params": layer_params(1)["mlp"]}, jnp.asarray(x))
    check(found, expected, MODULE_TOLERANCE, "gated MLP")


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # with the second, eps is as large as the mean square
def test_rms_norm(scale: float) -> None:
    x = scale * normal(6, 2, 9, SMALL.width)
    expected = oracle().encoder.final_layer_norm(torch.tensor(x))
    found = RMSNorm(SMALL.rms_norm_eps).apply({"params": our_params()["final_layer_norm"]}, jnp.asarray(x))
    check(found, expected, MODULE_TOLERANCE, f"norm, inputs of {scale}")


def test_bfloat16_compute_stays_near_float32() -> None:
    for length in LENGTHS:
        found = our_states(our_params(), length, jnp.bfloat16)
        assert found.dtype == jnp.bfloat16
        check(found, expected_states(length), BFLOAT16_TOLERANCE, f"encoder in bfloat16, {length} tokens")
        assert relative_error(found, expected_states(length)) > 1e-4


def test_bfloat16_holds_states_beyond_float16() -> None:
    """What writes to the residual stream, scaled by a power of two: the final norm takes that out again."""
    scale = 2.0**20
    params = jax.tree.map(lambda leaf: leaf, our_params())
    params["shared"]["embedding"] *= scale
    params["layers"]["attention"]["o"]["kernel"] *= scale
    params["layers"]["mlp"]["wo"]["kernel"] *= scale
    assert np.abs(params["shared"]["embedding"]).max() > np.finfo(np.float16).max
    found = our_states(params, 77, jnp.bfloat16)
    check(found, expected_states(77), BFLOAT16_TOLERANCE, f"encoder in bfloat16, states of {scale:.0e}")


def test_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="T5 overflows in float16; compute in bfloat16 or float32"):
        jax.eval_shape(T5Encoder(SMALL, jnp.float16).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def test_preset_has_the_size_of_transformers_model() -> None:
    with torch.device("meta"):
        model = transformers.T5EncoderModel(torch_config(T5_XXL))
    expected = 4_762_310_656
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    variables = jax.eval_shape(T5Encoder(T5_XXL).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected


def test_logical_axes() -> None:
    variables = jax.eval_shape(T5Encoder(SMALL).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    norm, heads = {"scale": P("layers", None)}, {"kernel": P("layers", "embed", "heads")}
    gate = {"kernel": P("layers", "embed", "mlp")}
    assert nn.get_partition_spec(variables)["params"] == {
        "shared": {"embedding": P("vocab", "embed")},
        "relative_attention_bias": {"embedding": P(None, "heads")},
        "layers": {
            "attention_norm": norm,
            "attention": {"q": heads, "k": heads, "v": heads, "o": {"kernel": P("layers", "heads", "embed")}},
            "mlp_norm": norm,
            "mlp": {"wi_0": gate, "wi_1": gate, "wo": {"kernel": P("layers", "mlp", "embed")}},
        },
        "final_layer_norm": {"scale": P(None)},
    }
