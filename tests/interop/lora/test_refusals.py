"""Adapters that are not read or not written: one line that says why, and nothing left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from fopd_jax import files
from fopd_jax.adapters.lora import Adapter
from fopd_jax.interop.lora.peft import read_lora, write_comfyui, write_diffusers, write_peft
from tests.interop.lora.peft_oracle import CONFIG, QUERY, WRITERS, random_adapter, refused


def test_folders_and_files_that_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such file or folder")
    refused(tmp_path, "found neither adapter_config.json nor pytorch_lora_weights.safetensors")
    settings, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    write_peft(tmp_path / "good", random_adapter(), CONFIG)
    settings.write_text("{}")
    refused(tmp_path, "found adapter_config.json, but no adapter_model.safetensors beside it")
    (tmp_path / "adapter_model.bin").touch()
    refused(tmp_path, "adapter_model.bin is a pickle, which is not read")
    tensors.write_bytes((tmp_path / "good/adapter_model.safetensors").read_bytes())
    for text, message in ((b"{", "damaged JSON"), (b"\xff", "damaged JSON"), (b"[]", "found JSON of type list")):
        settings.write_bytes(text)
        refused(tmp_path, message)
    settings.unlink()
    refused(tensors, "found PEFT's tensor names, but no adapter_config.json beside the file, which holds the scale")
    settings.write_bytes((tmp_path / "good/adapter_config.json").read_bytes())
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    refused(tmp_path, "found adapter_config.json and pytorch_lora_weights.safetensors, expected one of them")


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_truncated_tensors(size: int, tmp_path: Path) -> None:
    write_peft(tmp_path, random_adapter(), CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(tmp_path, "damaged or no safetensors file")


def broken(name: str, tensor: Any) -> Callable[[dict[str, np.ndarray]], None]:
    """A change of one tensor; None removes it."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = np.asarray(tensor)

    return change


ONE = np.zeros(1, np.float32)
A, B = (f"{QUERY}.lora_{factor}.weight" for factor in "AB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken(B, None), f"module '{QUERY[17:]}': found '{A}', but no lora_B beside it"),
        (broken(A, None), f"module '{QUERY[17:]}': found '{B}', but no lora_A beside it"),
        (broken(A, np.zeros((3, 15), "f")), f"tensor '{A}': found shape (3, 15), expected (3, 16)"),
        (broken(B, np.zeros((16, 4), "f")), f"tensor '{B}': found shape (16, 4), expected (16, 3)"),
        (broken(A, np.zeros((3, 16, 1), "f")), f"tensor '{A}': found shape (3, 16, 1), expected (R, 16)"),
        (broken(A, np.zeros((0, 16), "f")), f"tensor '{A}': found shape (0, 16), expected (R, 16)"),
        (broken(A, np.full((3, 16), np.inf, "f")), f"tensor '{A}': found a number that is not finite"),
        (broken(B, np.full((16, 3), np.nan, "f")), f"tensor '{B}': found a number that is not finite"),
        (broken(A, np.zeros((3, 16))), f"tensor '{A}': found dtype F64, expected one of F32, F16, BF16"),
        (broken(A, np.zeros((3, 16), "i")), f"tensor '{A}': found dtype I32, expected one of F32, F16, BF16"),
        (broken(f"{QUERY}.lora_magnitude_vector", ONE), "lora_magnitude_vector': DoRA rescales the base weights"),
        (broken(f"{QUERY}.lora_B.bias", ONE), "lora_B.bias': biases of the update (lora_bias) are not supported"),
        (broken(f"{QUERY}.weight", ONE), f"tensor '{QUERY}.weight': no LoRA factor, expected <module>.lora_A.weight"),
        (broken(f"{QUERY}.lora_A.x.weight", ONE), f"'{A}' and '{QUERY}.lora_A.x.weight': both are a of module"),
        (broken(f"{QUERY}.lora_A._orig_mod.weight", ONE), f"'{QUERY}.lora_A._orig_mod.weight' and '{A}': both are a"),
        (broken(f"{QUERY[:-1]}k2.lora_A.x.weight", ONE), "found two adapters, expected one"),
        (broken(A.replace("base_model.model.", "transformer.").replace("q", "z"), ONE), "found two layouts"),
        (broken(f"{QUERY}.alpha", ONE + 1), "found the scale in adapter_config.json and in alpha tensors"),
        (broken(f"{QUERY}.alpha", ONE), f"tensor '{QUERY}.alpha': found 0 or a number that is not finite"),
        (broken(f"{QUERY}.alpha", np.ones(2, "f")), f"tensor '{QUERY}.alpha': found shape (2,), expected a scalar"),
        (broken(A.replace("blocks.0", "blocks.5"), ONE), "no such module in a network of 5 blocks, 2 of them dual"),
        (broken(A.replace("blocks.0.attn", "blocks.2.attn2"), ONE), "blocks.2.attn2.to_q': no such module"),
        (broken(A.replace("attn.to_q", "norm1.linear"), ONE), "norm1.linear': found an adapter, but a bank can only"),
        (broken("base_model.model.proj_out.lora_A.weight", ONE), "module 'proj_out': found an adapter, but a bank"),
    ],
)
def test_tensors_that_are_refused(
    change: Callable[[dict[str, np.ndarray]], None], message: str, tmp_path: Path
) -> None:
    write_peft(tmp_path, random_adapter(), CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refused(path, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "not of a text encoder"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "not of a text encoder"),
        ("transformer.transformer_blocks.0.attn.to_q.dora_scale", "DoRA rescales the base weights"),
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "LoKr is not supported"),
        ("lycoris_transformer_blocks_0_attn_to_q.hada_w1_a", "LoHa is not supported"),
        ("transformer.transformer_blocks.0.attn.to_q.oft_blocks", "OFT is not supported"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.diff_b", "differences of biases are not supported"),
        ("diffusion_model.x_embedder.proj.diff", "no LoRA factor, expected <module>.lora_A.weight"),
        ("clip_l", "not of a text encoder"),
    ],
)
def test_other_layouts_are_refused(name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: ONE}, path)
    refused(path, f"tensor '{name}': ")
    refused(path, message)


@pytest.mark.parametrize("prefix", ["unet.", "module.", "transformer.module.", "model.", "lora_prior_unet_"])
def test_prefixes_that_are_not_known(prefix: str, tmp_path: Path) -> None:
    path, module = tmp_path / "other.safetensors", f"{prefix}transformer_blocks.0.attn.to_q"
    save_file(
        {f"{module}.lora_A.weight": np.ones((2, 16), "f"), f"{module}.lora_B.weight": np.ones((16, 2), "f")}, path
    )
    refused(path, f"module '{module.removeprefix('transformer.')}': no such module in a network of 5 blocks")


def test_eight_bits_and_convolutions_are_refused(tmp_path: Path) -> None:
    path, places = tmp_path / "other.safetensors", ("transformer_blocks.0.attn.to_q", "pos_embed.proj")
    for place, shape, dtype, message in (
        (places[0], (2, 16), torch.float8_e4m3fn, "found dtype F8_E4M3, expected one of F32, F16, BF16"),
        (places[0], (2, 16, 1, 1), torch.float32, "found shape (2, 16, 1, 1), expected (R, 16)"),
        (places[1], (2, 3, 2, 2), torch.float32, "module 'pos_embed.proj': found an adapter, but a bank can only"),
    ):
        factors = {"A": torch.zeros(shape, dtype=dtype), "B": torch.zeros((16, 2, 1, 1)[: len(shape)], dtype=dtype)}
        save_torch({f"transformer.{place}.lora_{factor}.weight": tensor for factor, tensor in factors.items()}, path)
        refused(path, message)


def test_metadata_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_diffusers(path, random_adapter(), CONFIG)
    tensors = load_file(path)
    for metadata, message in (
        ("{", "lora_adapter_metadata: damaged JSON"),
        ('{"r": 3, "lora_alpha": 6}', "lora_adapter_metadata: r: found None"),
        (
            '{"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.use_dora": true}',
            "metadata: use_dora: found",
        ),
        ('{"transformer.r": 2, "transformer.lora_alpha": 6}', "found rank 3, but its settings say r = 2"),
    ):
        save_file(tensors, path, metadata={"lora_adapter_metadata": metadata})
        refused(path, message)
    save_file({}, path)
    refused(path, "found no tensors, expected LoRA factors")
    write_peft(tmp_path / "folder", random_adapter(), CONFIG)
    save_file(tensors, tmp_path / "folder/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"found tensor names that begin with 'transformer\.'"):
        read_lora(tmp_path / "folder", CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["blocks"]["attn"]["to_q"].pop("a"), "'blocks/attn/to_q/a': found nothing"),
        (lambda tree: tree["blocks"]["attn"]["to_q"].pop("b"), "'blocks/attn/to_q/b': found nothing"),
        (lambda tree: tree.update(proj_out={"a": np.ones((16, 3), "f")}), "'proj_out/a': found (16, 3), expected noth"),
        (lambda tree: tree["blocks"]["attn"]["to_q"].update(c=ONE), "'blocks/attn/to_q/c': found (1,), expected noth"),
        (
            lambda tree: tree["blocks"]["attn"]["to_q"].update(a=np.ones((2, 16, 2), "f")),
            "'blocks/attn/to_q/a': found (2, 16, 2), expected (2, 16, 3)",
        ),
        (lambda tree: tree["last_block"]["ff"]["up"]["b"].fill(np.nan), "'last_block/ff/up/b': found a number that is"),
        (lambda tree: tree.clear(), "adapter: found no weights"),
    ],
)
@pytest.mark.parametrize("name", ["peft", "comfyui.safetensors"])
def test_adapters_that_are_not_written(name: str, change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    adapter = random_adapter()
    change(adapter.weights)
    with pytest.raises(ValueError) as caught:
        WRITERS[name](tmp_path / name, adapter, CONFIG)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_scales_and_paths_that_are_not_written(tmp_path: Path) -> None:
    for scale in (0.0, float("inf")):
        with pytest.raises(ValueError, match=f"adapter scale: found {scale}, expected a finite number other than 0"):
            write_peft(tmp_path / "peft", random_adapter(scale), CONFIG)
    empty = {"a": np.zeros((16, 0), np.float32), "b": np.zeros((0, 16), np.float32)}
    with pytest.raises(ValueError, match="adapter rank: found 0, expected at least 1"):
        write_peft(tmp_path / "peft", Adapter({"last_block": {"attn": {"to_q": empty}}}, 1.0), CONFIG)
    with pytest.raises(ValueError, match=r"expected a file name that ends in \.safetensors"):
        write_comfyui(tmp_path / "folder", random_adapter(), CONFIG)
    (tmp_path / "mine").mkdir()
    write_peft(tmp_path / "mine", random_adapter(), CONFIG)  # an empty folder is as good as none
    before = (tmp_path / "mine/adapter_config.json").read_bytes()
    with pytest.raises(ValueError, match="mine: exists already, expected a new or an empty folder"):
        write_peft(tmp_path / "mine", random_adapter(1.0), CONFIG)
    assert (tmp_path / "mine/adapter_config.json").read_bytes() == before


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_left_of_a_failure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    if name != "peft":  # files are replaced, so the old one must survive
        WRITERS[name](path, random_adapter(1.0), CONFIG)
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            WRITERS[name](path, random_adapter(), CONFIG)
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before
    WRITERS[name](path, random_adapter(), CONFIG)
    assert read_lora(path, CONFIG).scale == 2.0
