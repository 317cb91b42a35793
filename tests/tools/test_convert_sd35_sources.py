"""Broken sources: one clear line each, and nothing left behind."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.caller import Caller, messages
from tests.tools.damage import (
    BIAS,
    CONFIG,
    FIRST,
    INDEX,
    QUERY,
    SECOND,
    WEIGHTS,
    cast,
    copy_into_second_shard,
    edit_bytes,
    edit_header,
    edit_json,
    edit_map,
    edit_tensors,
    empty_tokenizer,
    foreign_tokenizer,
    pickle_only,
    remove,
    set_first,
    shard,
    shift_offsets,
    truncated_vocabulary,
    twice,
    void,
)

TRANSPOSED = edit_tensors(lambda t: t.update({"context_embedder.weight": t["context_embedder.weight"].T.contiguous()}))
CASES: dict[str, tuple[str, Callable[[Path], Any], str]] = {  # kind → component, what is done, what is said
    # the pipeline
    "no source": ("transformer", lambda src: shutil.rmtree(src), "src: .*pipeline does not exist"),
    "no pipeline": ("transformer", remove("model_index.json"), "model_index.json: no such file"),
    "index is no JSON": ("vae", edit_bytes("model_index.json", lambda data: data[:-3]), "index.json: damaged JSON"),
    "index is no object": ("vae", edit_bytes("model_index.json", lambda data: b"[]"), "found list, expected a JSON"),
    "unknown pipeline": ("vae", edit_json("model_index.json", _class_name="FluxPipeline"), "found _class_name 'Flux"),
    "component not in pipeline": (
        "vae", edit_json("model_index.json", vae=[None, None]), "components: found 'vae', but model_index.json has only"
    ),
    "unknown component": ("unet", lambda src: None, "components: found 'unet', expected some of transformer, vae"),
    "missing folder": ("vae", remove("vae"), "vae/config.json: no such file"),
    "missing tokenizer": ("text_encoder_3", remove("tokenizer_3"), "tokenizer_3: missing or empty, expected"),
    "empty tokenizer": ("text_encoder_2", empty_tokenizer, "tokenizer_2: missing or empty, expected"),
    "tokenizer without words": (
        "text_encoder_3", remove("tokenizer_3/tokenizer.json"), "tokenizer_3: not the tokenizer of its text enc"
    ),
    "damaged tokenizer": (
        "text_encoder_3", edit_bytes("tokenizer_3/tokenizer.json", lambda data: data[:100]), "tokenizer_3: no tokenizer"
    ),
    "T5's vocabulary cut": ("text_encoder_3", truncated_vocabulary("tokenizer_3", 40), "tokenizer_3: .* unknown to it"),
    "T5's letters cut": (
        "text_encoder_3", edit_bytes("tokenizer_3/tokenizer.json", lambda data: data.replace(b'"q"', b'"q2"')),
        "tokenizer_3: .* 1 of .* tokens of an English sentence unknown",
    ),
    "CLIP's tokenizer for T5": (
        "text_encoder_3", foreign_tokenizer("tokenizer_3", "tokenizer"), "tokenizer_3: .* a vocabulary of 514 ids"
    ),
    "T5's tokenizer for CLIP": (
        "text_encoder_2", foreign_tokenizer("tokenizer_2", "tokenizer_3"), "tokenizer_2: .* a vocabulary of 256 ids"
    ),
    "another end of texts": (
        "text_encoder", edit_json("text_encoder/config.json", eos_token_id=7), "tokenizer: .* eos_token_id 513, exp"
    ),
    "another padding": (
        "text_encoder_3", edit_json("text_encoder_3/config.json", pad_token_id=9), "tokenizer_3: .*pad_token_id 0, exp"
    ),
    # the configuration
    "no configuration": ("transformer", remove(CONFIG), "transformer/config.json: no such file"),
    "truncated configuration": ("transformer", edit_bytes(CONFIG, lambda data: data[:100]), "json: damaged JSON"),
    "binary configuration": ("transformer", edit_bytes(CONFIG, lambda data: b"\xff" + data), "json: damaged JSON"),
    "field twice": (
        "transformer", edit_bytes(CONFIG, lambda data: data.replace(b"{", b'{"num_layers": 3,', 1)),
        "transformer/config.json: damaged JSON .key 'num_layers' appears twice",
    ),
    "unknown network": (
        "transformer", edit_json(CONFIG, _class_name="UNet2DConditionModel"),
        "config.json: transformer config _class_name: found 'UNet2DConditionModel', expected one of SD3Tran",
    ),
    "missing field": ("transformer", edit_json(CONFIG, patch_size=None), "patch_size: found nothing, expected"),
    "text for a number": ("transformer", edit_json(CONFIG, num_layers="4"), "num_layers: found '4', expected"),
    "no layers": ("transformer", edit_json(CONFIG, num_layers=0), "num_layers: found 0, expected a positive"),
    "number for a list": (
        "transformer", edit_json(CONFIG, dual_attention_layers=2), "dual_attention_layers: found 2, expected a list"
    ),
    "unknown activation": (
        "text_encoder", edit_json("text_encoder/config.json", hidden_act="swish"),
        "text_encoder/config.json: text encoder config hidden_act: found 'swish', expected",
    ),
    "unknown feed-forward": (
        "text_encoder_3", edit_json("text_encoder_3/config.json", feed_forward_proj="relu"),
        "text_encoder_3/config.json: .*feed_forward_proj: found 'relu', expected 'gated-gelu'",
    ),
    "other autoencoder": (
        "vae", edit_json("vae/config.json", use_quant_conv=True),
        "vae/config.json: autoencoder config use_quant_conv: found True, expected False",
    ),
    "more layers than tensors": (
        "transformer", edit_json(CONFIG, num_layers=5),
        "transformer: tensor 'transformer_blocks.3.attn.to_add_out.bias': missing, expected shape .48,.",
    ),
    # which files
    "no weights": ("transformer", remove(WEIGHTS), "found neither diffusion_pytorch_model.safetensors nor"),
    "pickle only": ("transformer", pickle_only, "found diffusion_pytorch_model.bin, a pickle, which is not read"),
    "single and sharded": (
        "transformer", lambda src: void((src / INDEX).write_text("{}")), "found both .*, expected one of them"
    ),
    "missing shard": ("transformer", shard(remove(SECOND)), "00002-of-00002.safetensors: missing, but .* lists it"),
    "no map": ("transformer", shard(edit_json(INDEX, weight_map=[])), "index.json: found no weight_map"),
    "map of lists": (
        "transformer", shard(edit_map(lambda names: names.update({QUERY: [1]}))), "index.json: found no weight_map"
    ),
    "truncated index": ("transformer", shard(edit_bytes(INDEX, lambda data: data[:99])), "index.json: damaged JSON"),
    "shard lacks a tensor": (
        "transformer", shard(edit_tensors(lambda tensors: tensors.pop(min(tensors)), FIRST)),
        "tensor 'context_embedder.bias': missing from .*-00001-of-00002.safetensors, where .* puts it",
    ),
    "tensor in two shards": (
        "transformer", shard(copy_into_second_shard),
        "tensor 'context_embedder.bias': found in .*-00002-of-00002.safetensors, expected in .*-00001-of-00002",
    ),
    "shard truncated": ("transformer", shard(edit_bytes(FIRST, lambda data: data[:-8])), "-00001-.*: file truncated"),
    # damaged files
    "truncated file": ("transformer", edit_bytes(WEIGHTS, lambda data: data[:-4]), "tensor .*: file truncated"),
    "nearly empty file": ("transformer", edit_bytes(WEIGHTS, lambda data: data[:5]), "truncated or no safetensors"),
    "header longer than file": (
        "transformer", edit_bytes(WEIGHTS, lambda data: b"\xff" * 4 + data[4:]), "truncated or no safetensors file"
    ),
    "bytes too many": ("transformer", edit_bytes(WEIGHTS, lambda data: data + b"more"), "found .* bytes, expected"),
    "gap": ("transformer", edit_header(shift_offsets(4)), "tensor .*: begins at byte .*, expected"),
    "overlap": ("transformer", edit_header(shift_offsets(-4)), "tensor .*: begins at byte .*, expected"),
    "tensor twice": ("transformer", edit_bytes(WEIGHTS, twice), "damaged JSON .key 'proj_out.bias' appears twice"),
    "no offsets": ("transformer", edit_header(lambda h: h[BIAS].pop("data_offsets")), "at tensor 'proj_out.bias'"),
    "text as offsets": ("transformer", edit_header(lambda h: h[BIAS].update(data_offsets="ab")), "at tensor 'proj_out"),
    "shape larger than bytes": (
        "transformer", edit_header(lambda h: h[BIAS].update(shape=[65])), r"'proj_out.bias' .* hold shape \(65,\)"
    ),
    # tensors
    "missing tensor": ("transformer", edit_tensors(lambda t: t.pop(BIAS)), r"'proj_out.bias': missing, .* \(64,\)"),
    "missing table": ("transformer", edit_tensors(lambda t: t.pop("pos_embed.pos_embed")), "'pos_embed.pos_embed': m"),
    "extra tensor": (
        "transformer", edit_tensors(lambda t: t.update({"mask_token": torch.ones(3)})),
        r"tensor 'mask_token': found shape \(3,\), expected no such tensor",
    ),
    "renamed tensor": (
        "vae",
        edit_tensors(
            lambda t: t.update({"decoder.in.bias": t.pop("decoder.conv_in.bias")}),
            "vae/diffusion_pytorch_model.safetensors",
        ),
        r"tensor 'decoder.conv_in.bias': missing, expected shape \(16,\)",
    ),
    "swapped shape": (
        "transformer", TRANSPOSED, r"tensor 'context_embedder.weight': found shape \(96, 48\), expected \(48, 96\)"
    ),
    "another table": (
        "transformer", edit_json(CONFIG, pos_embed_max_size=20),
        r"tensor 'pos_embed.pos_embed': found shape \(1, 576, 48\), expected \(1, 400, 48\)",
    ),
    "another vocabulary": (
        "text_encoder", edit_json("text_encoder/config.json", vocab_size=515),
        r"token_embedding.weight': found shape \(514, 24\), expected \(515, 24\)",
    ),
    "NaN": ("transformer", edit_tensors(set_first(float("nan"))), f"'{QUERY}' .*: found 1 values that are NaN"),
    "infinity": ("transformer", edit_tensors(set_first(float("inf"))), f"'{QUERY}' .*: found 1 values that are"),
    "NaN in bfloat16": (
        "transformer", edit_tensors(set_first(float("nan"), torch.bfloat16)), f"'{QUERY}' .*: found 1 values that"
    ),
    "infinity in float16": (
        "transformer", edit_tensors(set_first(float("-inf"), torch.float16)), f"'{QUERY}' .*: found 1 values that"
    ),
    "float64": ("transformer", edit_tensors(cast(torch.float64)), f"'{QUERY}' .*: found dtype F64, expected"),
    "int8": ("transformer", edit_tensors(cast(torch.int8)), f"'{QUERY}' .*: found dtype I8, expected"),
    "fp8": ("transformer", edit_tensors(cast(torch.float8_e4m3fn)), f"'{QUERY}' .*: found dtype F8_E4M3, exp"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_broken_source(case: str, call: Caller, pipeline: Path, tmp_path: Path, converted_pipeline: Path) -> None:
    """Into a new folder, whose parents are new too, and into one that holds a whole conversion."""
    component, damage, message = CASES[case]
    damage(pipeline)
    call.fails(["--src", pipeline, "--dst", tmp_path / "a" / "b", "--components", component], message)
    converted = Path(shutil.copytree(converted_pipeline, tmp_path / "converted"))
    call.fails(["--src", pipeline, "--dst", converted, "--components", component], message)


def test_broken_single_file(call: Caller, pipeline: Path, tmp_path: Path) -> None:
    call.fails(["--src", pipeline / CONFIG, "--dst", tmp_path / "dst"], "config.json: found JSON; expected safetensors")
    call.fails(
        ["--src", pipeline / "vae/diffusion_pytorch_model.safetensors", "--dst", tmp_path / "dst"],
        "x_embedder.proj.weight': missing, expected one",
    )
    call.fails(
        ["--src", pipeline / WEIGHTS, "--dst", tmp_path / "dst"],
        f"found diffusers' names .'{QUERY}'.; give the folder that also holds config.json",
    )
    arguments = ["--src", pipeline / WEIGHTS, "--dst", tmp_path / "dst", "--components", "transformer,vae"]
    call.fails(arguments, "components: found transformer, vae; of a single file: transformer")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_permissions(call: Caller, pipeline: Path, tmp_path: Path) -> None:
    (pipeline / WEIGHTS).chmod(0)
    with pytest.raises(SystemExit) as stop:
        call.tool.main(["--src", str(pipeline), "--dst", str(tmp_path / "dst"), "--components", "transformer"])
    (line,) = messages(call.capfd.readouterr().err)
    assert (stop.value.code, line) == (2, f"error: {pipeline / WEIGHTS}: Permission denied")
    (tmp_path / "locked").mkdir(mode=0o500)
    dst = tmp_path / "locked" / "dst"
    call.fails(["--src", pipeline, "--dst", dst, "--components", "vae"], f"{dst}: Permission denied")
