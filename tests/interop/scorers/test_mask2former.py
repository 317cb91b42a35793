"""Mask2Former's published layouts → ours. transformers' files are written by transformers itself.

No checkpoint of mmdet was at hand: its names and layouts are those of its documentation and sources, written
down here a second time, as a way from transformers' names to mmdet's. That the network then computes the same is seen
by the tests of the network, since all layouts must give the same parameters.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fopd_jax.interop.scorers.mask2former import convert, network_config, recognises
from fopd_jax.interop.scorers.weights import load_weights, save_weights
from tests.models.mask2former_oracle import SMALL, TRUE, config_json, oracle, published, torch_config

UNUSED = ("criterion.empty_weight", "swin.layernorm")
LAST = "model.transformer_module.decoder.layers.3."
RENAMED = (
    # transformers' → mmdet 2's, first match first; layers' numbers stay
    (r"model\.pixel_level_module\.encoder\.embeddings\.patch_embeddings\.", "backbone.patch_embed."),
    (r"model\.pixel_level_module\.encoder\.embeddings\.", "backbone.patch_embed."),
    (r"model\.pixel_level_module\.encoder\.encoder\.layers\.", "backbone.stages."),
    (r"(backbone\.stages\.\d+\.blocks\.\d+\.)layernorm_before", r"\1norm1"),
    (r"(backbone\.stages\.\d+\.blocks\.\d+\.)layernorm_after", r"\1norm2"),
    (r"(backbone\.stages\.\d+\.blocks\.\d+\.)attention\.output\.dense", r"\1attn.w_msa.proj"),
    (r"(backbone\.stages\.\d+\.blocks\.\d+\.)attention\.self\.", r"\1attn.w_msa."),
    (r"(backbone\.stages\.\d+\.blocks\.\d+\.)intermediate\.dense", r"\1ffn.layers.0.0"),
    (r"(backbone\.stages\.\d+\.blocks\.\d+\.)output\.dense", r"\1ffn.layers.1"),
    (r".*decoder\.input_projections\.(\d)\.0", r"panoptic_head.pixel_decoder.input_convs.\1.conv"),
    (r".*decoder\.input_projections\.(\d)\.1", r"panoptic_head.pixel_decoder.input_convs.\1.gn"),
    (r"model\.pixel_level_module\.decoder\.adapter_1\.0", "panoptic_head.pixel_decoder.lateral_convs.0.conv"),
    (r"model\.pixel_level_module\.decoder\.adapter_1\.1", "panoptic_head.pixel_decoder.lateral_convs.0.gn"),
    (r"model\.pixel_level_module\.decoder\.layer_1\.0", "panoptic_head.pixel_decoder.output_convs.0.conv"),
    (r"model\.pixel_level_module\.decoder\.layer_1\.1", "panoptic_head.pixel_decoder.output_convs.0.gn"),
    (r"model\.pixel_level_module\.decoder\.mask_projection", "panoptic_head.pixel_decoder.mask_feature"),
    (r"model\.pixel_level_module\.decoder\.level_embed", "panoptic_head.pixel_decoder.level_encoding.weight"),
    (r"model\.pixel_level_module\.decoder\.encoder\.", "panoptic_head.pixel_decoder.encoder."),
    (r"(pixel_decoder\.encoder\.layers\.\d+\.)self_attn_layer_norm", r"\1norms.0"),
    (r"(pixel_decoder\.encoder\.layers\.\d+\.)final_layer_norm", r"\1norms.1"),
    (r"(pixel_decoder\.encoder\.layers\.\d+\.)self_attn", r"\1attentions.0"),
    (r"model\.transformer_module\.decoder\.layers\.", "panoptic_head.transformer_decoder.layers."),
    (r"(transformer_decoder\.layers\.\d+\.)cross_attn_layer_norm", r"\1norms.0"),
    (r"(transformer_decoder\.layers\.\d+\.)self_attn_layer_norm", r"\1norms.1"),
    (r"(transformer_decoder\.layers\.\d+\.)final_layer_norm", r"\1norms.2"),
    (r"(transformer_decoder\.layers\.\d+\.)cross_attn", r"\1attentions.0.attn"),
    (r"(transformer_decoder\.layers\.\d+\.)self_attn", r"\1attentions.1.attn"),
    (r"\.fc1\.", ".ffns.0.layers.0.0."),
    (r"\.fc2\.", ".ffns.0.layers.1."),
    (r"model\.transformer_module\.decoder\.layernorm", "panoptic_head.transformer_decoder.post_norm"),
    (r"model\.transformer_module\.queries_embedder", "panoptic_head.query_embed"),
    (r"model\.transformer_module\.queries_features", "panoptic_head.query_feat"),
    (r"model\.transformer_module\.level_embed", "panoptic_head.level_embed"),
    (r"class_predictor", "panoptic_head.cls_embed"),
)  # fmt: skip


@functools.cache
def as_mmdet() -> dict[str, np.ndarray]:
    """The oracle's tensors as mmdet would have saved them."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in published(SMALL).items():
        if any(part in name for part in UNUSED):
            continue
        if normed := re.fullmatch(r".*hidden_states_norms\.stage(\d)\.(.*)", name):
            name = f"backbone.norm{int(normed[1]) - 1}.{normed[2]}"
        if embedder := re.fullmatch(r".*mask_embedder\.(\d)\.0\.(.*)", name):
            name = f"panoptic_head.mask_embed.{2 * int(embedder[1])}.{embedder[2]}"
        for pattern, other in RENAMED:
            name = re.sub(pattern, other, name)
        found[name] = unfolded(tensor) if "downsample" in name else tensor
    for name in [each for each in found if re.search(r"w_msa\.query|attn\.q_proj", each)]:
        parts = ("query", "key", "value") if "query" in name else ("q_proj", "k_proj", "v_proj")
        joined = name.replace("query", "qkv").replace(".q_proj.", ".in_proj_")
        found[joined] = np.concatenate([found.pop(name.replace(parts[0], part)) for part in parts])
    table = next(each for each in found if each.endswith("relative_position_bias_table"))
    found[table.replace("bias_table", "index")] = np.zeros((49, 49), np.int64)
    return found


def unfolded(tensor: np.ndarray) -> np.ndarray:
    """The last axis from the order in which transformers merges neighbours to that of mmdet's `nn.Unfold`."""
    width = tensor.shape[-1] // 4
    inputs = torch.arange(4.0 * width).reshape(1, width, 2, 2)  # each number is a channel at a place
    theirs = torch.nn.Unfold(2, stride=2)(inputs).flatten().tolist()
    ours = torch.cat([inputs[0, :, y, x] for x in (0, 1) for y in (0, 1)]).tolist()
    return tensor[..., [ours.index(each) for each in theirs]]


def as_mmdet3() -> dict[str, np.ndarray]:
    """As its third version renamed the layers of both transformers."""
    renamed = {
        r"(pixel_decoder\.encoder\.layers\.\d+\.)attentions\.0\.": r"\1self_attn.",
        r"(transformer_decoder\.layers\.\d+\.)attentions\.0\.": r"\1cross_attn.",
        r"(transformer_decoder\.layers\.\d+\.)attentions\.1\.": r"\1self_attn.",
        r"\.ffns\.0\.": ".ffn.",
    }
    found = {}
    for name, tensor in as_mmdet().items():
        for pattern, other in renamed.items():
            name = re.sub(pattern, other, name)
        found[name] = tensor
    return found


def values(tree: Any) -> np.ndarray:
    return np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]))


def test_every_number_that_transformers_saves_is_used_once(tmp_path: Path):
    oracle(SMALL).save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert {name: each.shape for name, each in tensors.items()} == {k: v.shape for k, v in published(SMALL).items()}
    assert recognises(tensors)
    shape, params = convert(tensors, config)
    used = {name: each for name, each in tensors.items() if not any(part in name for part in UNUSED)}
    np.testing.assert_array_equal(values(params), values(used))
    save_weights(tmp_path / "ours.safetensors", "mask2former", shape, params, {})
    stored, again = load_weights(tmp_path / "ours.safetensors", "mask2former", "rewards.geneval.weights")
    assert network_config(stored) == SMALL
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("layout", [as_mmdet, as_mmdet3])
def test_all_layouts_give_the_same_float32_parameters(layout: Callable[[], dict[str, np.ndarray]]):
    assert recognises(layout())
    half = {name: each.astype(np.float16) for name, each in layout().items()}
    ours, theirs = convert(half, None), convert(published(SMALL), config_json(SMALL))
    assert ours[0] == theirs[0]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16)), ours[1], theirs[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(ours[1])} == {np.dtype(np.float32)}


def test_the_published_configuration_is_ours():
    """transformers' defaults are those of `facebook/mask2former-swin-small-coco-instance`, but for its classes."""
    default, ours = (each.to_dict() for each in (type(torch_config(TRUE))(), torch_config(TRUE)))
    backbones = [each.pop("backbone_config") for each in (default, ours)]
    assert {key for key in default if default[key] != ours[key]} <= {"id2label", "label2id"}
    assert {key for key in backbones[0] if backbones[0][key] != backbones[1][key]} <= {"drop_path_rate"}


@pytest.mark.parametrize(
    ("layout", "name", "shape", "message"),
    [
        ("ours", LAST + "fc2.bias", None, f"tensor '{LAST}fc2.bias': missing, expected shape (64,)"),
        ("ours", LAST + "fc3.bias", (2,), f"tensor '{LAST}fc3.bias': found shape (2,), expected no such tensor"),
        ("ours", LAST + "cross_attn.in_proj_bias", (191,), "in_proj_bias': found shape (191,), expected (192,)"),
        ("ours", "class_predictor.weight", None, "tensor 'class_predictor.weight': found nothing, expected an array"),
        ("theirs", "backbone.stages.2.blocks.3.attn.w_msa.qkv.weight", None, "qkv.weight': missing, expected shape"),
        ("theirs", "backbone.stages.1.downsample.norm.bias", (4,), "norm.bias': found shape (4,), expected (192,)"),
        ("theirs", "backbone.stages.2.blocks.4.norm1.bias", (96,), "stages of (2, 2, 5, 2) blocks, expected even"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named(layout: str, name: str, shape: tuple[int, ...] | None, message: str):
    tensors = dict(published(SMALL) if layout == "ours" else as_mmdet())
    tensors.pop(name, None)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(tensors if shape is None else tensors | {name: np.zeros(shape, np.float32)}, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "maskformer"}, "config model_type: found 'maskformer', expected 'mask2former'"),
        ({"pre_norm": True}, "config pre_norm: found True, expected False"),
        ({"num_attention_heads": 8}, "config num_attention_heads: found 8, expected 4"),
        ({"backbone_config": {"model_type": "resnet"}}, "backbone_config.model_type: found 'resnet', expected 'swin'"),
    ],
)
def test_another_networks_config_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(published(SMALL), config_json(SMALL) | change)


def test_other_networks_are_not_recognised():
    others = ["text_model.embeddings.position_embedding.weight", "model.pixel_level_module.encoder.x", "backbone.norm0"]
    assert not recognises(others)
    with pytest.raises(ValueError, match="found no tensors whose names begin with one of"):
        convert({name: np.zeros(1, np.float32) for name in others}, None)
