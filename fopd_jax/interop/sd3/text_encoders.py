"""transformers' `CLIPTextModelWithProjection` and `T5EncoderModel` ↔ our text encoders: names, layouts, configuration.

The name tables are the only place that knows both sides; `{}` stands for the number of a layer. They are those of the
published SD3 and SD3.5 checkpoints, which transformers writes to this day.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import flax.linen as nn
import jax.numpy as jnp

from fopd_jax.interop.files.tables import LINEAR, SAME, Component, Source, parameter_shapes
from fopd_jax.models.clip import Activation, CLIPText, CLIPTextConfig
from fopd_jax.models.t5 import T5Config, T5Encoder

STACK = "layers"

_CLIP_FIELDS = {  # ours → transformers'
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_length": "max_position_embeddings",
    "projection_dim": "projection_dim",
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "eos_token_id": "eos_token_id",
}
CLIP_NAMES = {  # our module → transformers'
    "token_embedding": "text_model.embeddings.token_embedding",
    "position_embedding": "text_model.embeddings.position_embedding",
    "layers/layer_norm1": "text_model.encoder.layers.{}.layer_norm1",
    "layers/self_attn/q_proj": "text_model.encoder.layers.{}.self_attn.q_proj",
    "layers/self_attn/k_proj": "text_model.encoder.layers.{}.self_attn.k_proj",
    "layers/self_attn/v_proj": "text_model.encoder.layers.{}.self_attn.v_proj",
    "layers/self_attn/out_proj": "text_model.encoder.layers.{}.self_attn.out_proj",
    "layers/layer_norm2": "text_model.encoder.layers.{}.layer_norm2",
    "layers/mlp/fc1": "text_model.encoder.layers.{}.mlp.fc1",
    "layers/mlp/fc2": "text_model.encoder.layers.{}.mlp.fc2",
    "final_layer_norm": "text_model.final_layer_norm",
    "text_projection": "text_projection",
}
CLIP_UNUSED = (r"text_model\.embeddings\.position_ids",)  # 0, 1, 2, …, which old versions wrote

_T5_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "depth": "num_layers",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "rms_norm_eps": "layer_norm_epsilon",
}
_T5_NAMES = {
    "shared": "shared",
    "relative_attention_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "layers/attention_norm": "encoder.block.{}.layer.0.layer_norm",
    "layers/attention/q": "encoder.block.{}.layer.0.SelfAttention.q",
    "layers/attention/k": "encoder.block.{}.layer.0.SelfAttention.k",
    "layers/attention/v": "encoder.block.{}.layer.0.SelfAttention.v",
    "layers/attention/o": "encoder.block.{}.layer.0.SelfAttention.o",
    "layers/mlp_norm": "encoder.block.{}.layer.1.layer_norm",
    "layers/mlp/wi_0": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
    "layers/mlp/wi_1": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
    "layers/mlp/wo": "encoder.block.{}.layer.1.DenseReluDense.wo",
    "final_layer_norm": "encoder.final_layer_norm",
}
_T5_UNUSED = (r"encoder\.embed_tokens\.weight",)  # a second name of `shared.weight`
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}


def clip_component(config: Mapping[str, Any]) -> Component:
    """The name table of a `CLIPTextModelWithProjection` from its `config.json`; its `config` is a `CLIPTextConfig`.

    Raises:
      ValueError: a field is missing or describes a network that CLIPText is not; names field, found and right value.
    """
    right = {
        "model_type": ["clip_text_model"],
        "architectures": [["CLIPTextModelWithProjection"]],
        "hidden_act": get_args(Activation),
    }
    fields = _read(config, _CLIP_FIELDS, right)
    if fields["width"] % fields["num_heads"]:
        raise _wrong("num_attention_heads", fields["num_heads"], f"a divisor of hidden_size {fields['width']}")
    if (
        type(fields["eos_token_id"]) is not int or fields["eos_token_id"] < 0
    ):  # transformers' type admits None and lists
        raise _wrong("eos_token_id", fields["eos_token_id"], "one id")
    ours = CLIPTextConfig(**fields)
    return _component(ours, CLIPText(ours), CLIP_NAMES, CLIP_UNUSED)


def t5_component(config: Mapping[str, Any]) -> Component:
    """The name table of a `T5EncoderModel` (T5 v1.1) from its `config.json`; its `config` is a `T5Config`.

    Raises:
      ValueError: a field is missing or describes a network that T5Encoder is not; names field, found and right value.
    """
    right = {"model_type": ["t5"], "architectures": [["T5EncoderModel"]], "feed_forward_proj": ["gated-gelu"]}
    fields = _read(config, _T5_FIELDS, right)
    if (least := 4) > fields["num_buckets"]:
        raise _wrong("relative_attention_num_buckets", fields["num_buckets"], f"at least {least}")
    if fields["max_distance"] <= (exact := fields["num_buckets"] // 4):
        raise _wrong("relative_attention_max_distance", fields["max_distance"], f"more than {exact}")
    ours = T5Config(**fields)
    return _component(ours, T5Encoder(ours), _T5_NAMES, _T5_UNUSED)


def _read(config: Mapping[str, Any], fields: Mapping[str, str], right: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Our fields out of theirs, once every field of `right` has one of its right values."""
    for field in (*right, *fields.values()):
        if field not in config:
            raise _wrong(field, "nothing", " or ".join(map(repr, right.get(field, ()))) or "a value")
    for field, values in right.items():
        if config[field] not in values:
            raise _wrong(field, repr(config[field]), " or ".join(map(repr, values)))
    for ours, theirs in fields.items():
        _check_number(ours, theirs, config[theirs])
    return {ours: config[theirs] for ours, theirs in fields.items()}


def _check_number(ours: str, theirs: str, value: Any) -> None:
    """Sizes are counted from 1; an epsilon is a small number; the rest is checked where it is known what it means."""
    if ours.endswith("_eps"):
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise _wrong(theirs, repr(value), "a number from 0 to below 1")
    elif ours not in ("activation", "eos_token_id") and (type(value) is not int or value < 1):
        raise _wrong(theirs, repr(value), "a positive integer")


def _component(
    config: CLIPTextConfig | T5Config, network: nn.Module, names: Mapping[str, str], unused: tuple[str, ...]
) -> Component:
    shapes = parameter_shapes(network.init, jnp.zeros((1, 1), jnp.int32))
    sources = {path: source for stacked in shapes for path, source in sources_of(stacked, names, config.depth).items()}
    return Component(config=config, shapes=shapes, sources=sources, stacks=(STACK,), unused=unused)


def sources_of(
    stacked: str, names: Mapping[str, str], depth: int, odd: Mapping[str, Source] | None = None
) -> dict[str, Source]:
    """Per-layer path → tensor, for one parameter as the network reads it; `odd`: parameters that are no module's."""
    module, _, leaf = stacked.rpartition("/")
    if (source := (odd or {}).get(stacked)) is None:
        source = Source(f"{names[module]}.{_LEAVES[leaf]}", LINEAR if leaf == "kernel" else SAME)
    if not stacked.startswith(f"{STACK}/"):
        return {stacked: source}
    rest = stacked.removeprefix(f"{STACK}/")
    layers = range(depth)
    return {f"{STACK}_{i}/{rest}": dataclasses.replace(source, name=source.name.format(i)) for i in layers}


def _wrong(field: str, found: Any, right: Any) -> ValueError:
    return ValueError(f"text encoder config {field}: found {found}, expected {right}")
