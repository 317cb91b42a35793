"""Names of Mask2Former's tensors in transformers' files and in mmdet's checkpoints, beside ours.

transformers' are those of `facebook/mask2former-swin-small-coco-instance`, which its `save_pretrained` writes to this
day; mmdet's are the `state_dict` of its checkpoints, of version 2, which GenEval needs, or of version 3, which renamed
the layers and which GenEval's download script has come to fetch.
"""

from typing import NamedTuple

from fopd_jax.models.pixel_decoder import LEVELS

Names = dict[str, str]
_FUSED = ("q_proj", "k_proj", "v_proj")
_ENCODER, _PIXELS = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder"
_QUERIES, _THEIR_PIXELS = "model.transformer_module", "panoptic_head.pixel_decoder"


class Layout(NamedTuple):
    """One publisher's names.

    `*_names` and `others`: our module → theirs, to which a parameter's own name is added; `*_layers`: where the layers
    are, by number; `mark`: how some names begin in this layout alone; `merged`: in which order the channels of four
    neighbours (h w) are merged. `#i` stands for the i-th third of a tensor that joins queries, keys and values.
    """

    name: str
    mark: str
    block_layers: str
    pixel_layers: str
    query_layers: str
    block_names: Names
    pixel_names: Names
    query_names: Names
    others: Names
    merged: str


TRANSFORMERS = Layout(
    name="transformers",
    mark=f"{_QUERIES}.",
    block_layers=_ENCODER + ".encoder.layers.{}.blocks.{}.",
    pixel_layers=_PIXELS + ".encoder.layers.{}.",
    query_layers=_QUERIES + ".decoder.layers.{}.",
    block_names={
        "layernorm_before": "layernorm_before.",
        "attention": "attention.self.",
        "attention/q_proj": "attention.self.query.",
        "attention/k_proj": "attention.self.key.",
        "attention/v_proj": "attention.self.value.",
        "attention/o_proj": "attention.output.dense.",
        "layernorm_after": "layernorm_after.",
        "fc1": "intermediate.dense.",
        "fc2": "output.dense.",
    },
    pixel_names={
        "self_attn/sampling_offsets": "self_attn.sampling_offsets.",
        "self_attn/attention_weights": "self_attn.attention_weights.",
        "self_attn/value_proj": "self_attn.value_proj.",
        "self_attn/output_proj": "self_attn.output_proj.",
        "self_attn_layer_norm": "self_attn_layer_norm.",
        "fc1": "fc1.",
        "fc2": "fc2.",
        "final_layer_norm": "final_layer_norm.",
    },
    query_names={
        **{f"cross_attn/{each}": f"cross_attn.in_proj_#{i}" for i, each in enumerate(_FUSED)},
        "cross_attn/out_proj": "cross_attn.out_proj.",
        "cross_attn_layer_norm": "cross_attn_layer_norm.",
        **{f"self_attn/{each}": f"self_attn.{each}." for each in _FUSED},
        "self_attn/out_proj": "self_attn.out_proj.",
        "self_attn_layer_norm": "self_attn_layer_norm.",
        "fc1": "fc1.",
        "fc2": "fc2.",
        "final_layer_norm": "final_layer_norm.",
    },
    others={
        "encoder/patch_embeddings": f"{_ENCODER}.embeddings.patch_embeddings.projection.",
        "encoder/norm": f"{_ENCODER}.embeddings.norm.",
        **{
            f"encoder/downsample{i}/{each}": f"{_ENCODER}.encoder.layers.{i - 1}.downsample.{each}."
            for i in range(1, 4)
            for each in ("norm", "reduction")
        },
        **{f"encoder/norm{i}": f"{_ENCODER}.hidden_states_norms.stage{i}." for i in range(1, 5)},
        **{
            f"pixel_decoder/{ours}/{each}": f"{_PIXELS}.{theirs}.{part}."
            for part, each in enumerate(("conv", "norm"))
            for ours, theirs in {
                **{f"input_projections_{i}": f"input_projections.{i}" for i in range(LEVELS)},
                "adapter_1": "adapter_1",
                "layer_1": "layer_1",
            }.items()
        },
        "pixel_decoder/level_embed": f"{_PIXELS}.level_embed",
        "pixel_decoder/mask_projection": f"{_PIXELS}.mask_projection.",
        "decoder/queries_features": f"{_QUERIES}.queries_features.weight",
        "decoder/queries_embedder": f"{_QUERIES}.queries_embedder.weight",
        "decoder/level_embed": f"{_QUERIES}.level_embed.weight",
        "decoder/layernorm": f"{_QUERIES}.decoder.layernorm.",
        **{
            f"decoder/mask_embedder/layers_{i}": f"{_QUERIES}.decoder.mask_predictor.mask_embedder.{i}.0."
            for i in range(3)
        },
        "decoder/class_predictor": "class_predictor.",
    },
    merged="(w h c)",
)
MMDET = Layout(
    name="mmdet 2",
    mark="panoptic_head.transformer_decoder.layers.0.attentions.",
    block_layers="backbone.stages.{}.blocks.{}.",
    pixel_layers=_THEIR_PIXELS + ".encoder.layers.{}.",
    query_layers="panoptic_head.transformer_decoder.layers.{}.",
    block_names={
        "layernorm_before": "norm1.",
        "attention": "attn.w_msa.",
        **{f"attention/{each}": f"attn.w_msa.qkv.#{i}" for i, each in enumerate(_FUSED)},
        "attention/o_proj": "attn.w_msa.proj.",
        "layernorm_after": "norm2.",
        "fc1": "ffn.layers.0.0.",
        "fc2": "ffn.layers.1.",
    },
    pixel_names={
        "self_attn/sampling_offsets": "attentions.0.sampling_offsets.",
        "self_attn/attention_weights": "attentions.0.attention_weights.",
        "self_attn/value_proj": "attentions.0.value_proj.",
        "self_attn/output_proj": "attentions.0.output_proj.",
        "self_attn_layer_norm": "norms.0.",
        "fc1": "ffns.0.layers.0.0.",
        "fc2": "ffns.0.layers.1.",
        "final_layer_norm": "norms.1.",
    },
    query_names={
        **{f"cross_attn/{each}": f"attentions.0.attn.in_proj_#{i}" for i, each in enumerate(_FUSED)},
        "cross_attn/out_proj": "attentions.0.attn.out_proj.",
        "cross_attn_layer_norm": "norms.0.",
        **{f"self_attn/{each}": f"attentions.1.attn.in_proj_#{i}" for i, each in enumerate(_FUSED)},
        "self_attn/out_proj": "attentions.1.attn.out_proj.",
        "self_attn_layer_norm": "norms.1.",
        "fc1": "ffns.0.layers.0.0.",
        "fc2": "ffns.0.layers.1.",
        "final_layer_norm": "norms.2.",
    },
    others={
        "encoder/patch_embeddings": "backbone.patch_embed.projection.",
        "encoder/norm": "backbone.patch_embed.norm.",
        **{
            f"encoder/downsample{i}/{each}": f"backbone.stages.{i - 1}.downsample.{each}."
            for i in range(1, 4)
            for each in ("norm", "reduction")
        },
        **{f"encoder/norm{i}": f"backbone.norm{i - 1}." for i in range(1, 5)},
        **{
            f"pixel_decoder/{ours}/{each}": f"{_THEIR_PIXELS}.{theirs}.{part}."
            for each, part in (("conv", "conv"), ("norm", "gn"))
            for ours, theirs in {
                **{f"input_projections_{i}": f"input_convs.{i}" for i in range(LEVELS)},
                "adapter_1": "lateral_convs.0",
                "layer_1": "output_convs.0",
            }.items()
        },
        "pixel_decoder/level_embed": f"{_THEIR_PIXELS}.level_encoding.weight",
        "pixel_decoder/mask_projection": f"{_THEIR_PIXELS}.mask_feature.",
        "decoder/queries_features": "panoptic_head.query_feat.weight",
        "decoder/queries_embedder": "panoptic_head.query_embed.weight",
        "decoder/level_embed": "panoptic_head.level_embed.weight",
        "decoder/layernorm": "panoptic_head.transformer_decoder.post_norm.",
        **{f"decoder/mask_embedder/layers_{i}": f"panoptic_head.mask_embed.{2 * i}." for i in range(3)},
        "decoder/class_predictor": "panoptic_head.cls_embed.",
    },
    merged="(c h w)",
)
MMDET3 = MMDET._replace(
    name="mmdet 3",
    mark="panoptic_head.transformer_decoder.layers.0.cross_attn.",
    pixel_names={
        ours: theirs.replace("attentions.0.", "self_attn.").replace("ffns.0.", "ffn.")
        for ours, theirs in MMDET.pixel_names.items()
    },
    query_names={
        ours: theirs.replace("attentions.0.", "cross_attn.")
        .replace("attentions.1.", "self_attn.")
        .replace("ffns.0.", "ffn.")
        for ours, theirs in MMDET.query_names.items()
    },
)
LAYOUTS = (TRANSFORMERS, MMDET, MMDET3)
