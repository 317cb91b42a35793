"""The text encoders' name tables against transformers' own state dicts, both directions, and what is refused."""

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from fopd_jax.interop.files.tables import Component, from_tensors, to_tensors
from fopd_jax.interop.sd3.text_encoders import clip_component, t5_component
from fopd_jax.models.clip import CLIP_G, CLIP_L
from fopd_jax.models.t5 import T5_XXL

# What the `config.json` of SD3.5's three text encoders say.
CLIP_L_FIELDS = {
    "architectures": ["CLIPTextModelWithProjection"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
    "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
    "projection_dim": 768, "torch_dtype": "float16", "transformers_version": "4.41.2", "vocab_size": 49408,
}  # fmt: skip
CLIP_G_FIELDS = CLIP_L_FIELDS | {
    "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
    "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip
T5_FIELDS = {
    "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096,
    "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24,
    "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.41.2", "use_cache": True, "vocab_size": 32128,
}  # fmt: skip
PUBLISHED = {
    "text_encoder": (clip_component, CLIP_L_FIELDS, CLIP_L),
    "text_encoder_2": (clip_component, CLIP_G_FIELDS, CLIP_G),
    "text_encoder_3": (t5_component, T5_FIELDS, T5_XXL),
}
SMALL_CLIP = CLIP_L_FIELDS | {
    "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3, "num_hidden_layers": 11,
    "projection_dim": 7, "vocab_size": 30, "max_position_embeddings": 9,
}  # fmt: skip
SMALL_T5 = T5_FIELDS | {"d_model": 12, "d_kv": 3, "num_heads": 2, "d_ff": 20, "num_layers": 11, "vocab_size": 30}
SMALL: dict[str, tuple[Callable[..., Component], dict[str, Any]]] = {
    "clip": (clip_component, SMALL_CLIP),
    "t5": (t5_component, SMALL_T5),
}
POSITION_IDS = "text_model.embeddings.position_ids"
EMBED_TOKENS = "encoder.embed_tokens.weight"


def torch_model(fields: Mapping[str, Any]) -> transformers.PreTrainedModel:
    if fields["model_type"] == "t5":
        return transformers.T5EncoderModel(transformers.T5Config(**fields))
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**fields))


@functools.cache
def model(kind: str) -> transformers.PreTrainedModel:
    return torch_model(SMALL[kind][1])


@functools.cache
def component(kind: str) -> Component:
    build, fields = SMALL[kind]
    return build(fields)


def random_tensors(kind: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """What a published checkpoint holds: the tied embedding once."""
    random = np.random.default_rng(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model(kind).state_dict().items() if name != EMBED_TOKENS}
    return {name: random.standard_normal(shape, dtype=np.float32).astype(dtype) for name, shape in shapes.items()}


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_configuration_is_the_preset(folder: str) -> None:
    build, fields, preset = PUBLISHED[folder]
    assert build(fields).config == preset


@pytest.mark.parametrize("folder", PUBLISHED)
def test_tensors_of_the_preset(folder: str) -> None:
    """Every name and shape at the true size."""
    build, fields, _ = PUBLISHED[folder]
    with torch.device("meta"):
        tensors = torch_model(fields).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != EMBED_TOKENS}
    assert build(fields).tensor_shapes() == shapes


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("kind", SMALL)
def test_round_trip_keeps_every_tensor(kind: str, dtype: Any) -> None:
    tensors = random_tensors(kind, dtype)
    params = from_tensors(component(kind), tensors)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    back = to_tensors(component(kind), params)
    assert back.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(back[name], tensors[name], err_msg=name)


@pytest.mark.parametrize("kind", SMALL)
def test_saved_checkpoint_is_read_and_written_back(kind: str, tmp_path: Path) -> None:
    """As the installed transformers writes it, configuration included; what we write, it loads."""
    original = model(kind)
    original.save_pretrained(tmp_path)
    table = SMALL[kind][0](json.loads((tmp_path / "config.json").read_text()))
    assert table.config == component(kind).config
    back = to_tensors(table, from_tensors(table, load_file(tmp_path / "model.safetensors")))
    copy = torch_model(SMALL[kind][1])
    result = copy.load_state_dict({name: torch.tensor(tensor) for name, tensor in back.items()}, strict=False)
    assert result.missing_keys == ([EMBED_TOKENS] if kind == "t5" else [])  # tied, so it is there all the same
    assert not result.unexpected_keys
    for name, tensor in original.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor), name


def test_layouts() -> None:
    clip, t5 = (from_tensors(component(kind), random_tensors(kind)) for kind in SMALL)
    tensors = random_tensors("clip")
    query = tensors["text_model.encoder.layers.10.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(clip["layers"]["self_attn"]["q_proj"]["kernel"][10], query.T)
    np.testing.assert_array_equal(clip["text_projection"]["kernel"], tensors["text_projection.weight"].T)
    tensors = random_tensors("t5")
    up = tensors["encoder.block.2.layer.1.DenseReluDense.wi_1.weight"]
    np.testing.assert_array_equal(t5["layers"]["mlp"]["wi_1"]["kernel"][2], up.T)
    np.testing.assert_array_equal(t5["shared"]["embedding"], tensors["shared.weight"])


@pytest.mark.parametrize(
    ("kind", "name", "tensor"),
    [
        ("clip", POSITION_IDS, np.arange(9)[None]),
        ("t5", EMBED_TOKENS, random_tensors("t5")["shared.weight"]),
    ],
)
def test_unused_tensors_are_known(kind: str, name: str, tensor: np.ndarray) -> None:
    tensors = random_tensors(kind)
    found = from_tensors(component(kind), tensors | {name: tensor})
    jax.tree.map(np.testing.assert_array_equal, found, from_tensors(component(kind), tensors))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("clip", "text_model.encoder.layers.11.mlp.fc1.bias"),
        ("clip", "text_projection.bias"),
        ("clip", "vision_model.embeddings.position_ids"),
        ("t5", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("t5", "decoder.embed_tokens.weight"),
    ],
)
def test_unknown_tensor(kind: str, name: str) -> None:
    tensors = random_tensors(kind) | {name: np.zeros(3, np.float32)}
    message = f"tensor {name!r}: found shape (3,), expected no such tensor"
    with pytest.raises(ValueError, match=exactly(message)):
        from_tensors(component(kind), tensors)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("clip", "text_projection.weight"),
        ("clip", "text_model.encoder.layers.3.self_attn.k_proj.bias"),
        ("t5", "shared.weight"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ],
)
def test_missing_tensor(kind: str, name: str) -> None:
    tensors = random_tensors(kind)
    shape = tensors.pop(name).shape
    with pytest.raises(ValueError, match=exactly(f"tensor {name!r}: missing, expected shape {shape}")):
        from_tensors(component(kind), tensors)


REFUSED = {
    ("clip", "model_type", "clip"): "found 'clip', expected 'clip_text_model'",
    ("clip", "architectures", ("CLIPTextModel",)): "found ['CLIPTextModel'], expected ['CLIPTextModelWithProjection']",
    ("clip", "hidden_act", "gelu_new"): "found 'gelu_new', expected 'quick_gelu' or 'gelu'",
    ("clip", "num_attention_heads", 5): "found 5, expected a divisor of hidden_size 12",
    ("clip", "eos_token_id", None): "found None, expected one id",
    ("clip", "eos_token_id", -1): "found -1, expected one id",
    ("clip", "num_hidden_layers", 0): "found 0, expected a positive integer",
    ("clip", "hidden_size", 12.0): "found 12.0, expected a positive integer",
    ("clip", "layer_norm_eps", "1e-5"): "found '1e-5', expected a number from 0 to below 1",
    ("t5", "model_type", "umt5"): "found 'umt5', expected 't5'",
    ("t5", "architectures", ("T5ForConditionalGeneration",)): (
        "found ['T5ForConditionalGeneration'], expected ['T5EncoderModel']"
    ),
    ("t5", "feed_forward_proj", "relu"): "found 'relu', expected 'gated-gelu'",
    ("t5", "num_layers", None): "found None, expected a positive integer",
    ("t5", "d_kv", True): "found True, expected a positive integer",
    ("t5", "layer_norm_epsilon", -1e-6): "found -1e-06, expected a number from 0 to below 1",
    ("t5", "relative_attention_num_buckets", 3): "found 3, expected at least 4",
    ("t5", "relative_attention_max_distance", 1): "found 1, expected more than 8",
}


@pytest.mark.parametrize(("kind", "field", "value"), REFUSED)
def test_refused_configuration(kind: str, field: str, value: Any) -> None:
    build, fields = SMALL[kind]
    message = f"text encoder config {field}: {REFUSED[kind, field, value]}"
    with pytest.raises(ValueError, match=exactly(message)):
        build(fields | {field: list(value) if isinstance(value, tuple) else value})


@pytest.mark.parametrize(
    ("kind", "field", "right"),
    [
        ("clip", "architectures", "['CLIPTextModelWithProjection']"),
        ("clip", "projection_dim", "a value"),
        ("t5", "feed_forward_proj", "'gated-gelu'"),
        ("t5", "relative_attention_max_distance", "a value"),
    ],
)
def test_missing_field(kind: str, field: str, right: str) -> None:
    build, fields = SMALL[kind]
    with pytest.raises(ValueError, match=exactly(f"text encoder config {field}: found nothing, expected {right}")):
        build({name: value for name, value in fields.items() if name != field})
