"""diffusers', ComfyUI's and OneTrainer's layouts, against diffusers itself and ComfyUI's arithmetic."""

from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from fopd_jax.interop.lora.modules import modules_from_adapter, places
from fopd_jax.interop.lora.peft import read_lora, write_comfyui
from tests.interop.lora.peft_oracle import (
    ATTENTION,
    CONFIG,
    check_equal,
    our_velocity,
    pipeline,
    random_adapter,
    randomise,
    relative,
    torch_velocity,
)


@pytest.mark.parametrize("how", ["with metadata", "without metadata", "of the transformer alone"])
def test_files_that_diffusers_makes(how: str, tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=12, target_modules=ATTENTION, use_rslora=True))
    randomise(pipe.transformer)
    if how == "of the transformer alone":
        pipe.transformer.save_lora_adapter(str(tmp_path))
    else:
        layers = {name: tensor for name, tensor in pipe.transformer.state_dict().items() if "lora_" in name}
        metadata = pipe.transformer.peft_config["default"].to_dict() if how == "with metadata" else None
        pipe.save_lora_weights(
            str(tmp_path),
            {name.replace(".default", ""): tensor for name, tensor in layers.items()},
            transformer_lora_adapter_metadata=metadata,
        )
    adapter = read_lora(tmp_path, CONFIG)
    assert adapter.scale == (1 if how == "without metadata" else 6)
    fresh = pipeline()
    if how == "of the transformer alone":
        fresh.transformer.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
    else:
        fresh.load_lora_weights(str(tmp_path))
    assert relative(our_velocity(adapter), torch_velocity(fresh.transformer)) <= 2e-4


def comfyui_deltas(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ComfyUI's `LoRAAdapter.calculate_weight`, by its module names; the names that it leaves are refused."""
    left, deltas = dict(tensors), {}
    for module in places(CONFIG):
        for name in (f"transformer.{module}", f"base_model.model.{module}", f"lora_transformer_{module}"):
            name = name if name.startswith(("t", "b")) else name.replace(".", "_")
            for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                if f"{name}.{up}.weight" in tensors:
                    b, a = left.pop(f"{name}.{up}.weight"), left.pop(f"{name}.{down}.weight")
                    alpha = left.pop(f"{name}.alpha", np.float32(len(a))).item() / len(a)
                    deltas[module] = alpha * b.astype(np.float64) @ a
    assert not left
    return deltas


@pytest.mark.parametrize("scale", [2.0, 2 / 3, 0.1 / 3])
def test_comfyui_computes_our_updates(scale: float, tmp_path: Path) -> None:
    adapter, path = random_adapter(scale), tmp_path / "comfyui.safetensors"
    write_comfyui(path, adapter, CONFIG)
    deltas = comfyui_deltas(load_file(path))
    modules = modules_from_adapter(adapter, CONFIG)
    assert deltas.keys() == modules.keys() == places(CONFIG).keys()
    for name, module in modules.items():
        np.testing.assert_array_equal(deltas[name], scale * module.b.astype(np.float64) @ module.a, err_msg=name)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):  # why ComfyUI needs a file of its own
        pipeline().load_lora_weights(str(path))


def test_onetrainers_names(tmp_path: Path) -> None:
    adapter = random_adapter(2 / 3)
    write_comfyui(tmp_path / "ours.safetensors", adapter, CONFIG)
    renamed = {}
    for key, tensor in load_file(tmp_path / "ours.safetensors").items():
        module = next(name for name in places(CONFIG) if key.startswith(f"transformer.{name}."))
        role = key.removeprefix(f"transformer.{module}.").replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        renamed[f"lora_transformer_{module.replace('.', '_')}.{role}"] = tensor
    save_file(renamed, tmp_path / "theirs.safetensors")
    assert comfyui_deltas(renamed).keys() == places(CONFIG).keys()
    check_equal(read_lora(tmp_path / "theirs.safetensors", CONFIG), adapter)


def test_alpha_is_the_rank_where_comfyui_finds_none(tmp_path: Path) -> None:
    path = tmp_path / "mixed.safetensors"
    write_comfyui(path, random_adapter(2.0, ("attn2",)), CONFIG)
    tensors = load_file(path)
    del tensors["transformer.transformer_blocks.1.attn2.to_q.alpha"]
    save_file(tensors, path)
    found, expected = read_lora(path, CONFIG), random_adapter(2.0, ("attn2",))
    expected.weights["dual_blocks"]["attn2"]["to_q"]["b"][1] /= 2
    check_equal(found, expected)
