"""Layouts of files that others publish: each gives the adapter that diffusers' plain names give."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fopd_jax.adapters.lora import Adapter
from fopd_jax.interop.lora.peft import read_lora, write_comfyui, write_diffusers, write_sd_scripts
from fopd_jax.interop.sd3.diffusers import config_from_diffusers
from fopd_jax.interop.sd3.original import module_parts
from tests.interop.lora.peft_oracle import CONFIG, check_equal, random_adapter


@pytest.mark.parametrize("scale", [2.0, 2 / 3])
def test_sd_scripts_round_trip_is_exact(scale: float, tmp_path: Path) -> None:
    adapter, path = random_adapter(scale), tmp_path / "sd_scripts.safetensors"
    write_sd_scripts(path, adapter, CONFIG)
    assert all(name.startswith("lora_unet_joint_blocks_") for name in load_file(path))
    check_equal(read_lora(path, CONFIG), adapter)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "model.diffusion_model."])
def test_fused_factors_are_split(prefix: str, tmp_path: Path) -> None:
    """One down and one stacked up for q, k and v, as sd-scripts trains them."""
    random, fused, plain = np.random.default_rng(0), {}, {}
    for name, parts in module_parts(1).items():
        if not name.endswith(("x_block.attn.qkv", "context_block.attn.qkv", "x_block.attn.proj")):
            continue
        a = random.normal(size=(6, CONFIG.width)).astype(np.float32)
        ups = [random.normal(size=(CONFIG.width, 6)).astype(np.float32) for _ in parts]
        place = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
        fused |= {f"{place}.lora_down.weight": a, f"{place}.lora_up.weight": np.concatenate(ups)}
        fused[f"{place}.alpha"] = np.asarray(3, np.float32)
        for part, up in zip(parts, ups, strict=True):
            plain |= {f"transformer.{part}.lora_A.weight": a, f"transformer.{part}.lora_B.weight": up}
    save_file(fused, tmp_path / "fused.safetensors")
    save_file(plain, tmp_path / "plain.safetensors", metadata={"lora_alpha": "3"})
    read = read_lora(tmp_path / "fused.safetensors", CONFIG)
    assert read.scale == 0.5
    check_equal(read, read_lora(tmp_path / "plain.safetensors", CONFIG))


def test_modulation_is_refused_by_name(tmp_path: Path) -> None:
    place, path = "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1", tmp_path / "modulation.safetensors"
    factors = {"down": np.ones((2, CONFIG.width), np.float32), "up": np.ones((6 * CONFIG.width, 2), np.float32)}
    save_file({f"{place}.lora_{role}.weight": factor for role, factor in factors.items()}, path)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.norm1\.linear.*a bank can only route"):
        read_lora(path, CONFIG)


def plain_tensors(adapter: Adapter, folder: Path) -> dict[str, np.ndarray]:
    write_comfyui(folder / "plain.safetensors", adapter, CONFIG)
    return {k: v for k, v in load_file(folder / "plain.safetensors").items() if not k.endswith(".alpha")}


@pytest.mark.parametrize("field", ["lora_alpha", "ss_network_alpha"])
def test_alpha_of_the_header(field: str, tmp_path: Path) -> None:
    adapter = random_adapter(2.0)
    tensors, rank = plain_tensors(adapter, tmp_path), jax.tree.leaves(adapter.weights)[0].shape[-1]
    save_file(tensors, tmp_path / "header.safetensors", metadata={field: str(2.0 * rank)})
    check_equal(read_lora(tmp_path / "header.safetensors", CONFIG), adapter)
    save_file(tensors, tmp_path / "wrong.safetensors", metadata={field: "much"})
    with pytest.raises(ValueError, match=f"metadata {field}: found 'much', expected a number"):
        read_lora(tmp_path / "wrong.safetensors", CONFIG)


def test_an_alpha_of_the_header_for_another_rank(tmp_path: Path) -> None:
    """As of a file whose ranks were reduced; with alphas of its own the header does not matter."""
    adapter, path = random_adapter(2.0), tmp_path / "reduced.safetensors"
    header = {"ss_network_alpha": "6", "ss_network_dim": "64"}
    save_file(plain_tensors(adapter, tmp_path), path, metadata=header)
    with pytest.raises(ValueError, match="metadata ss_network_dim: found 64, but the factors are of rank 3; expected"):
        read_lora(path, CONFIG)
    save_file(load_file(tmp_path / "plain.safetensors"), path, metadata=header)
    check_equal(read_lora(path, CONFIG), adapter)


@pytest.mark.parametrize("style", ["down and up", "nested", "text encoders"])
def test_names(style: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter, path = random_adapter(1.0), tmp_path / "named.safetensors"
    tensors = plain_tensors(adapter, tmp_path)
    if style == "down and up":
        tensors = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in tensors.items()}
    elif style == "nested":
        tensors = {k.replace("transformer.", "transformer.base_model.model.", 1): v for k, v in tensors.items()}
    else:
        tensors |= {"text_encoder.layers.0.q_proj.lora_A.weight": np.ones((2, 4), np.float32)}
    save_file(tensors, path)
    with caplog.at_level(logging.WARNING):
        check_equal(read_lora(path, CONFIG), adapter)
    assert ("left out 1 tensors of text encoders" in caplog.text) == (style == "text encoders")


@pytest.mark.parametrize("name", ["lora_kohya", "lora_down_up"])
def test_shared_inputs(name: str) -> None:
    folder = Path(__file__).parents[4] / "shared/bug_inputs"
    if not folder.is_dir():
        pytest.skip("no folder of bug inputs")

    config = config_from_diffusers(json.loads((folder / "tiny/transformer/config.json").read_bytes()))
    read, plain = (read_lora(folder / f"{each}.safetensors", config) for each in (name, "lora_plain"))
    if name == "lora_down_up":
        check_equal(read, plain)


SETTINGS = {"peft_type": "LORA", "r": 6, "lora_alpha": 3, "use_rslora": False}


def fused_file(path: Path, prefix: str, **settings: object) -> None:
    """q, k and v of the first block in one module of rank 6, with settings in the header."""
    random, name = np.random.default_rng(0), "joint_blocks.0.x_block.attn.qkv"
    place = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
    factors = {"down": (6, CONFIG.width), "up": (3 * CONFIG.width, 6)}
    tensors = {f"{place}.lora_{k}.weight": random.normal(size=v).astype(np.float32) for k, v in factors.items()}
    fields = {prefix + field: value for field, value in (SETTINGS | settings).items()}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(fields)})


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", ""])
@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_patterns_of_names_that_are_split_are_refused(field: str, prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "fused.safetensors"
    fused_file(path, prefix)
    assert read_lora(path, CONFIG).scale == 0.5
    fused_file(path, prefix, **{field: {"joint_blocks.0.x_block.attn.qkv": 12}})
    with pytest.raises(ValueError, match=f"{field}: found patterns of names beside module 'joint_blocks.0.x_block"):
        read_lora(path, CONFIG)


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern", "use_rslora"])
def test_fields_that_a_header_is_not_read_for(field: str, tmp_path: Path) -> None:
    adapter, path = random_adapter(1.0), tmp_path / "header.safetensors"
    tensors = plain_tensors(adapter, tmp_path)
    save_file(tensors, path, metadata={field: "{}" if "pattern" in field else "False"})
    check_equal(read_lora(path, CONFIG), adapter)
    save_file(tensors, path, metadata={field: '{"to_q": 8}' if "pattern" in field else "True"})
    with pytest.raises(ValueError, match=f"metadata {field}: found .*, which is not read there; expected it in"):
        read_lora(path, CONFIG)


@pytest.mark.parametrize("beside", ["alpha tensors", "settings"])
def test_an_alpha_of_the_header_that_contradicts(beside: str, tmp_path: Path) -> None:
    adapter, path = random_adapter(2.0), tmp_path / "twice.safetensors"
    (write_comfyui if beside == "alpha tensors" else write_diffusers)(path, adapter, CONFIG)
    tensors, rank = load_file(path), jax.tree.leaves(adapter.weights)[0].shape[-1]
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata | {"ss_network_alpha": str(2 * rank)})
    check_equal(read_lora(path, CONFIG), adapter)
    save_file(tensors, path, metadata=metadata | {"ss_network_alpha": "1"})
    source = "module 'transformer_blocks.*'" if beside == "alpha tensors" else "lora_adapter_metadata"
    with pytest.raises(ValueError, match=rf"metadata: found alpha 1, but {source} has alpha {2 * rank}; expected them"):
        read_lora(path, CONFIG)
