"""The original single-file layout against diffusers' own conversion of it, at tiny and at published shapes."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from fopd_jax.interop.files.converted import abstract_params, load_params, load_table, read_manifest
from fopd_jax.interop.files.tables import from_tensors
from fopd_jax.interop.sd3.convert import convert
from fopd_jax.interop.sd3.diffusers import config_from_diffusers, transformer_component
from fopd_jax.interop.sd3.original import PREFIX, infer_config, origins
from fopd_jax.models.mmdit import PRESETS

Tensors = dict[str, torch.Tensor]
FIELDS: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 64,
    "num_attention_heads": 2, "joint_attention_dim": 20, "caption_projection_dim": 128, "pooled_projection_dim": 12,
    "pos_embed_max_size": 6, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "sd35_medium": {},
    "sd35_large": {"dual_attention_layers": ()},
    "sd3_medium": {"dual_attention_layers": (), "qk_norm": None},
    "eleven blocks": {"num_layers": 11, "dual_attention_layers": tuple(range(10))},  # two digits
}
OTHERS = {  # what published files hold besides, in dtypes that are not read
    "first_stage_model.decoder.conv_in.weight": torch.ones(2, 2),
    "text_encoders.clip_l.logit_scale": torch.tensor(1.0),
    "text_encoders.t5xxl.transformer.shared.weight": torch.ones(2, dtype=torch.float8_e4m3fn),
}


def state_dict(case: str) -> Tensors:
    """diffusers' tensors of a network, all of them random."""
    torch.manual_seed(0)
    shapes = SD3Transformer2DModel(**FIELDS | CASES[case]).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in shapes.items()}


def to_original(theirs: Tensors, depth: int) -> Tensors:
    """The original layout, written down from the published files independently of the table under test."""
    names = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    modules = {
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    for here, block, (q, k, v), out, (norm_q, norm_k) in (
        ("attn", "x_block.attn", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k")),
        ("attn2", "x_block.attn2", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k")),
        ("attn", "context_block.attn", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out",
         ("norm_added_q", "norm_added_k")),
    ):  # fmt: skip
        modules |= {f"{here}.{out}": f"{block}.proj", f"{here}.{norm_q}": f"{block}.ln_q"}
        modules |= {f"{here}.{norm_k}": f"{block}.ln_k"}
        modules |= {f"{here}.{part}": f"{block}.qkv.{i}" for i, part in enumerate((q, k, v))}
    names |= {f"transformer_blocks.{i}.{a}": f"joint_blocks.{i}.{b}" for i in range(depth) for a, b in modules.items()}
    return _fuse({_rename(name, names): tensor for name, tensor in theirs.items()}, depth)


def _rename(name: str, names: dict[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    return names[name] if name in names else f"{names[module]}.{leaf}"


def _fuse(renamed: Tensors, depth: int) -> Tensors:
    """Rows of q, k and v in one tensor; (scale, shift) → (shift, scale) where the original has no gate."""
    fused: Tensors = {}
    for name, tensor in renamed.items():
        if match := re.fullmatch(r"(.*\.qkv)\.(\d)\.(\w+)", name):
            parts = [renamed[f"{match[1]}.{i}.{match[3]}"] for i in range(3)]
            fused[f"{match[1]}.{match[3]}"] = torch.cat(parts)
        elif name.startswith(("final_layer.adaLN", f"joint_blocks.{depth - 1}.context_block.adaLN")):
            scale, shift = tensor.chunk(2)
            fused[name] = torch.cat([shift, scale])
        else:
            fused[name] = tensor
    return {f"model.diffusion_model.{name}": tensor for name, tensor in fused.items()}


def write(path: Path, tensors: Tensors) -> Path:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def silent(title: str, total: int) -> Any:
    return contextlib.nullcontext(lambda count: None)


def numpy(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def depth_of(case: str) -> int:
    return (FIELDS | CASES[case])["num_layers"]


@pytest.mark.parametrize("case", CASES)
def test_test_and_diffusers_agree_on_the_layout(case: str) -> None:
    """The oracle of what follows; `torch.equal` on every tensor."""
    theirs = state_dict(case)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(to_original(theirs, depth_of(case)))
    assert converted.keys() == theirs.keys()
    assert all(torch.equal(converted[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("case", "others"), [*((case, {}) for case in CASES), ("sd35_medium", OTHERS)])
def test_conversion(case: str, others: Tensors, tmp_path: Path) -> None:
    """Of the transformer alone, and of one with the other networks beside it."""
    theirs = state_dict(case)
    src = write(tmp_path / "sd3.safetensors", to_original(theirs, depth_of(case)) | others)
    assert convert(src, tmp_path / "dst", dtype="float32", progress=silent) == ["transformer"]
    manifest = read_manifest(tmp_path / "dst")
    assert manifest.transformer == config_from_diffusers(FIELDS | CASES[case])
    component = manifest.component("transformer")
    params = load_params(tmp_path / "dst", "transformer", abstract_params(component, np.float32))
    jax.tree.map(np.testing.assert_array_equal, params, from_tensors(component, numpy(theirs)))
    np.testing.assert_array_equal(load_table(tmp_path / "dst"), theirs["pos_embed.pos_embed"].numpy())
    assert list(manifest.components["transformer"].source) == ["sd3.safetensors"]
    assert convert(src, tmp_path / "dst", dtype="float32", progress=silent) == []


@pytest.mark.parametrize("preset", ["sd35_medium", "sd35_large", "sd3_medium"])
def test_published_shapes(preset: str) -> None:
    """Names and shapes at true size: every tensor of diffusers' is made of exactly one place in the original file."""
    shapes = transformer_component(PRESETS[preset]).tensor_shapes()
    found = origins(shapes)
    assert sorted(part for origin, _ in found.values() for part in origin.parts) == sorted(shapes)
    assert sum(np.prod(shape) for _, shape in found.values()) == sum(np.prod(shape) for shape in shapes.values())
    config = infer_config({name: shape for name, (_, shape) in found.items()})
    assert config_from_diffusers(json.loads(json.dumps(config))) == PRESETS[preset]
    width = PRESETS[preset].width
    assert found[f"{PREFIX}joint_blocks.0.x_block.attn.qkv.weight"][1] == (3 * width, width)


def test_diffusers_can_use_the_inferred_configuration() -> None:
    original = to_original(state_dict("sd35_medium"), 3)
    fields = infer_config({name: tuple(tensor.shape) for name, tensor in original.items()})
    found = SD3Transformer2DModel.from_config(fields).state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in state_dict("sd35_medium").items()
    }


QKV, FIRST = f"{PREFIX}joint_blocks.1.x_block.attn.qkv.weight", f"{PREFIX}x_embedder.proj.weight"
BROKEN: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no first block": ({QKV.replace("1", "0"): None}, "joint_blocks.0.x_block.attn.qkv.weight': missing, expected one"),
    "missing": ({QKV: None}, r"joint_blocks.1.x_block.attn.qkv.weight': missing, expected shape \(384, 128\)"),
    "misshapen": ({QKV: torch.ones(128, 384)}, r"qkv.weight': found shape \(128, 384\), expected \(384, 128\)"),
    "extra": ({f"{PREFIX}more": torch.ones(2)}, r"more': found shape \(2,\), expected no such tensor"),
    "of another network": ({"lora.down": torch.ones(2)}, r"'lora.down': found shape \(2,\), expected no such tensor"),
    "a gap in the blocks": ({f"{PREFIX}joint_blocks.7.x_block.mlp.fc1.bias": torch.ones(2)}, "blocks.2.*missing"),
    "telling tensor is missing": ({FIRST: None}, r"x_embedder.proj.weight': missing, expected one of shape \(width"),
    "telling tensor of another rank": ({FIRST: torch.ones(3)}, r"x_embedder.*found shape \(3,\), expected \(width"),
    "telling tensor of no size": ({FIRST: torch.ones(128, 4, 0, 0)}, r"found shape \(128, 4, 0, 0\), expected \(wid"),
    "another head size": ({FIRST: torch.ones(100, 4, 2, 2)}, "caption_projection_dim: found 100, expected 64"),
    "wrong dtype": ({QKV: torch.ones(384, 128, dtype=torch.float64)}, "qkv.weight' in .*: found dtype F64, expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(case: str, tmp_path: Path) -> None:
    changes, message = BROKEN[case]
    tensors = to_original(state_dict("sd35_medium"), 3) | changes
    src = write(tmp_path / "sd3.safetensors", {name: each for name, each in tensors.items() if each is not None})
    with pytest.raises(ValueError, match=f"sd3.safetensors.*{message}"):
        convert(src, tmp_path / "dst", dtype="float32", progress=silent)
    assert list(tmp_path.iterdir()) == [src]
