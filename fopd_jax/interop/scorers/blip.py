"""BLIP's published layouts → ours: transformers' `BlipForQuestionAnswering`, BLIP's own VQA and ImageReward's file.

The name tables are the only place that knows both sides; `{}` stands for the number of a layer.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fopd_jax.interop.files.safetensors import Tree
from fopd_jax.interop.files.tables import CONVOLUTION, LINEAR, SAME, Component, Source, from_tensors, parameter_shapes
from fopd_jax.interop.scorers import aesthetic
from fopd_jax.interop.scorers.weights import depth_of, shape_of
from fopd_jax.models.blip import BLIPConfig, BLIPText, BLIPTextConfig, BLIPVision, BLIPVisionConfig

NETWORK, STACK = "blip", "layers"
HEAD_DIM = 64  # of every published tower; files without a configuration do not say it
SPECIAL = ("[DEC]", "[ENC]")
"""What BLIP adds to BERT's words: an answer begins with the first, and its own VQA marks a question by the second."""

_VISION_HF = {  # our module → transformers'
    "class_embedding": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "layers/layer_norm1": "encoder.layers.{}.layer_norm1",
    "layers/qkv": "encoder.layers.{}.self_attn.qkv",
    "layers/projection": "encoder.layers.{}.self_attn.projection",
    "layers/layer_norm2": "encoder.layers.{}.layer_norm2",
    "layers/fc1": "encoder.layers.{}.mlp.fc1",
    "layers/fc2": "encoder.layers.{}.mlp.fc2",
    "post_layernorm": "post_layernorm",
}
_VISION = {  # our module → BLIP's own
    "class_embedding": "cls_token",
    "position_embedding": "pos_embed",
    "patch_embedding": "patch_embed.proj",
    "layers/layer_norm1": "blocks.{}.norm1",
    "layers/qkv": "blocks.{}.attn.qkv",
    "layers/projection": "blocks.{}.attn.proj",
    "layers/layer_norm2": "blocks.{}.norm2",
    "layers/fc1": "blocks.{}.mlp.fc1",
    "layers/fc2": "blocks.{}.mlp.fc2",
    "post_layernorm": "norm",
}
_TEXT = {  # our module → BERT's, in both
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm",
    **{
        f"layers/{module}/{ours}": f"encoder.layer.{{}}.{module}.{theirs}"
        for module in ("attention", "crossattention")
        for ours, theirs in {
            "query": "self.query", "key": "self.key", "value": "self.value",
            "output": "output.dense", "norm": "output.LayerNorm",
        }.items()
    },
    "layers/intermediate": "encoder.layer.{}.intermediate.dense",
    "layers/output": "encoder.layer.{}.output.dense",
    "layers/norm": "encoder.layer.{}.output.LayerNorm",
}  # fmt: skip
_ANSWER = {  # our parameter → the decoder's own, and its pattern
    "transform/kernel": ("cls.predictions.transform.dense.weight", LINEAR),
    "transform/bias": ("cls.predictions.transform.dense.bias", SAME),
    "transform_norm/scale": ("cls.predictions.transform.LayerNorm.weight", SAME),
    "transform_norm/bias": ("cls.predictions.transform.LayerNorm.bias", SAME),
    "decoder/kernel": ("cls.predictions.decoder.weight", LINEAR),
    "decoder/bias": ("cls.predictions.bias", SAME),
}
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}
_UNUSED = re.compile(r".*\.position_ids|text_decoder\.cls\.predictions\.decoder\.bias")  # the latter a second name


def recognises(names: Collection[str]) -> bool:
    """Whether a checkpoint with these tensors is one of BLIP's that scores."""
    plain = {name.removeprefix("blip.") for name in names}
    has_text = any(".crossattention." in name for name in plain)
    return has_text and any(name.startswith(("visual_encoder.", "vision_model.")) for name in plain)


def convert(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None) -> tuple[dict[str, Any], Tree]:
    """The shape, with `kind` imagereward or vqa, and the parameters of a whole state dict.

    `config`: transformers' configuration, in whose layout alone it is needed. ImageReward's head of five layers
    without activations becomes the one affine map that it is.

    Raises:
      ValueError: a tensor is missing, superfluous or misshapen, or the configuration is; names it.
    """
    tensors = {name.removeprefix("blip."): each for name, each in tensors.items() if not _UNUSED.fullmatch(name)}
    is_transformers = any(name.startswith("vision_model.") for name in tensors)
    if is_transformers and config is None:
        raise ValueError("config.json: missing, expected that of transformers' BlipForQuestionAnswering")
    prefix, names = ("vision_model", _VISION_HF) if is_transformers else ("visual_encoder", _VISION)
    parts = _split(tensors, (f"{prefix}.", "text_encoder.", "text_decoder.", "mlp."))
    vision, text = parts[f"{prefix}."], parts["text_encoder."]
    ours = BLIPConfig(_vision_config(vision, names, config), _text_config(text, config))
    trees = {"vision": _tower(_vision_component(ours.vision, names), vision, f"{prefix}.")}
    kind = "vqa" if parts["text_decoder."] else "imagereward"
    if kind == "vqa":
        if parts["mlp."]:
            raise ValueError(f"tensor 'mlp.{min(parts['mlp.'])}': expected no such tensor of {kind}")
        trees["question"] = _tower(_text_component(ours.text), text, "text_encoder.")
        trees |= _answer(ours.text, parts["text_decoder."])
    else:
        trees["text"] = _tower(_text_component(ours.text), text, "text_encoder.")
        trees["head"] = _head(parts["mlp."])  # the aesthetic predictor's layers
    return {"kind": kind, "marked_question": not is_transformers, **dataclasses.asdict(ours)}, trees


def add_tokenizer(shape: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The shape with the words of a tokenizer's folder or `vocab.txt`.

    Raises:
      ValueError: as `read_vocabulary`, or the network has another number of words.
    """
    words = read_vocabulary(path)
    if len(words) != (size := shape["text"]["vocab_size"]):
        raise ValueError(f"tokenizer: {path}: found {len(words)} words with BLIP's own two, expected {size}")
    return {**shape, "vocabulary": words}


def _head(tensors: Mapping[str, np.ndarray]) -> Tree:
    try:
        _, params = aesthetic.convert(tensors, None)
    except ValueError as error:
        raise ValueError(str(error).replace("tensor '", "tensor 'mlp.", 1)) from error
    return {"kernel": params["kernel"][:, None], "bias": params["bias"][None]}


def read_vocabulary(path: Path) -> list[str]:
    """BERT's words with BLIP's two, in the order of their ids, from a `vocab.txt` or a folder that holds one.

    Raises:
      ValueError: there is none, or a word that BLIP needs is missing; names the file.
    """
    file = path / "vocab.txt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"tokenizer: {file}: no such file, expected the vocab.txt of bert-base-uncased")
    words = file.read_text(encoding="utf-8").split("\n")
    words = words[:-1] if words[-1] == "" else words
    if missing := [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in words]:
        raise ValueError(f"tokenizer: {file}: found no {missing[0]} among {len(words)} lines, expected BERT's words")
    return [*words, *(word for word in SPECIAL if word not in words)]


def _split(tensors: Mapping[str, np.ndarray], prefixes: tuple[str, ...]) -> dict[str, dict[str, np.ndarray]]:
    parts: dict[str, dict[str, np.ndarray]] = {prefix: {} for prefix in prefixes}
    for name, tensor in tensors.items():
        found = [prefix for prefix in prefixes if name.startswith(prefix)]
        if not found:
            raise ValueError(f"tensor {name!r}: found shape {tensor.shape}, expected no such tensor")
        parts[found[0]][name.removeprefix(found[0])] = tensor
    return parts


def _tower(component: Component, tensors: Mapping[str, np.ndarray], prefix: str) -> Tree:
    try:
        return from_tensors(component, tensors, np.float32)
    except ValueError as error:
        raise ValueError(str(error).replace("tensor '", f"tensor '{prefix}", 1)) from error


def _answer(config: BLIPTextConfig, tensors: Mapping[str, np.ndarray]) -> Tree:
    """The decoder's tower and what makes words of its states."""
    bert = {name.removeprefix("bert."): each for name, each in tensors.items() if name.startswith("bert.")}
    tower = _text_component(dataclasses.replace(config, encoder_width=config.width))
    trees: dict[str, Any] = {"answer": _tower(tower, bert, "text_decoder.bert.")}
    words = {"cls.predictions.decoder.weight": bert["embeddings.word_embeddings.weight"]} | dict(tensors)  # tied
    rest = {name for name in tensors if not name.startswith("bert.")} - {name for name, _ in _ANSWER.values()}
    if rest:
        raise ValueError(f"tensor 'text_decoder.{min(rest)}': expected no such tensor")
    for path, (name, pattern) in _ANSWER.items():
        if name not in words:
            raise ValueError(f"tensor 'text_decoder.{name}': missing")
        module, leaf = path.split("/")
        value = np.array(Source(name, pattern).to_ours(words[name]), np.float32)
        trees.setdefault(module, {})[leaf] = value
    return trees


def _vision_component(config: BLIPVisionConfig, names: Mapping[str, str]) -> Component:
    sample = jnp.zeros((1, config.image_size, config.image_size, 3))
    return _component(config, parameter_shapes(BLIPVision(config).init, sample), names)


def _text_component(config: BLIPTextConfig) -> Component:
    ids = jnp.zeros((1, 1), int)
    states = jnp.zeros((1, 1, config.encoder_width))
    return _component(config, parameter_shapes(BLIPText(config).init, ids, ids == 0, states), _TEXT)


def _component(
    network: BLIPVisionConfig | BLIPTextConfig, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> Component:
    sources = {}
    for path, shape in shapes.items():
        module, _, leaf = path.rpartition("/")
        name = names[module or leaf] + (f".{_LEAVES[leaf]}" if module else "")
        ranks = {2: LINEAR, 4: CONVOLUTION}
        pattern = ranks[len(shape) - path.startswith(f"{STACK}/")] if leaf == "kernel" else SAME
        for layer in range(shape[0]) if path.startswith(f"{STACK}/") else (None,):
            ours = path if layer is None else path.replace(STACK, f"{STACK}_{layer}", 1)
            sources[ours] = Source(name.format(layer), pattern)
    return Component(network, shapes, sources, (STACK,))


def _vision_config(
    tensors: Mapping[str, np.ndarray], names: Mapping[str, str], config: Mapping[str, Any] | None
) -> BLIPVisionConfig:
    """Everything but heads and epsilons can be read off the tensors."""
    kernel = shape_of(tensors, f"{names['patch_embedding']}.weight", 4)
    positions = shape_of(tensors, names["position_embedding"], 3)[1] - 1
    depth = depth_of(tensors, names["layers/qkv"])
    theirs = _transformers(config).vision_config if config else None
    heads = theirs.num_attention_heads if theirs else _heads(kernel[0])
    return BLIPVisionConfig(
        kernel[0], depth, heads, shape_of(tensors, f"{names['layers/fc1'].format(0)}.weight", 2)[0],
        math.isqrt(positions) * kernel[2], kernel[2], theirs.layer_norm_eps if theirs else 1e-6,
    )  # fmt: skip


def _text_config(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None) -> BLIPTextConfig:
    vocabulary, width = shape_of(tensors, "embeddings.word_embeddings.weight", 2)
    theirs = _transformers(config).text_config if config else None
    return BLIPTextConfig(
        vocabulary, width, depth_of(tensors, _TEXT["layers/intermediate"]),
        theirs.num_attention_heads if theirs else _heads(width),
        shape_of(tensors, "encoder.layer.0.intermediate.dense.weight", 2)[0],
        shape_of(tensors, "embeddings.position_embeddings.weight", 2)[0],
        shape_of(tensors, "encoder.layer.0.crossattention.self.key.weight", 2)[1],
        theirs.layer_norm_eps if theirs else 1e-12,
    )  # fmt: skip


def _heads(width: int) -> int:
    if width % HEAD_DIM:
        raise ValueError(f"a tower of width {width}, expected a multiple of {HEAD_DIM}, the width of its heads")
    return width // HEAD_DIM


def _transformers(config: Mapping[str, Any]) -> Any:
    """transformers' configuration with its defaults, which its files leave out."""
    from transformers import BlipConfig

    return BlipConfig(**config)
