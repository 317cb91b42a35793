"""The update of every module, as diffusers and PEFT compute it from a file, or by the layout's own formula."""

import contextlib
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file, save_file

from fopd_jax.adapters.lora import Adapter
from fopd_jax.interop.lora.modules import modules_from_adapter
from fopd_jax.interop.lora.peft import read_lora, write_diffusers, write_peft, write_sd_scripts
from fopd_jax.interop.sd3.original import module_parts
from tests.interop.lora.peft_oracle import CONFIG, EVERYTHING, WRITERS, base, pipeline, random_adapter

Tensors = dict[str, np.ndarray]
LIMIT = 1e-5  # relative, float32
RANK = 3
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def ours(adapter: Adapter) -> Tensors:
    modules = modules_from_adapter(adapter, CONFIG)
    return {name: each.scale * each.b.astype(np.float64) @ each.a for name, each in modules.items()}


def of_layers(model: Any) -> Tensors:
    """PEFT's own update of every adapted layer of a torch network; of diffusers, too, which builds on PEFT."""
    layers = {name: layer for name, layer in model.named_modules() if getattr(layer, "lora_A", None)}
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(*layer.lora_A).detach().numpy()
        for name, layer in layers.items()
    }


def of_diffusers(path: Path) -> Tensors:
    """What its pipeline, which has no text encoders here, makes of a file; nothing where it refuses it."""
    pipe: Any = pipeline()
    pipe.load_lora_into_text_encoder = lambda *args, **kwargs: None
    with contextlib.suppress(ValueError):
        pipe.load_lora_weights(str(path))
    return of_layers(pipe.transformer)


def check(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert np.linalg.norm(delta) > 1, name
        assert np.linalg.norm(found[name] - delta) <= LIMIT * np.linalg.norm(delta), name


def plain() -> Tensors:
    """diffusers' names of today, scale 1."""
    tensors = {}
    for name, module in modules_from_adapter(random_adapter(1.0), CONFIG).items():
        tensors |= {f"transformer.{name}.lora_A.weight": module.a, f"transformer.{name}.lora_B.weight": module.b}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def renamed(change: Callable[[str], str]) -> Tensors:
    return {change(name): tensor for name, tensor in plain().items()}


def down_up(name: str) -> str:
    return name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


def first_layout(name: str, processor: str = "") -> str:
    """As diffusers wrote attention processors before PEFT: only these four have names of their own."""
    name = re.sub(r"\.(to_[qkv]|to_out)(?:\.0)?\.lora\.", rf"{processor}.\1_lora.", down_up(name))
    assert "_lora." in name or ".lora." in name
    return name


def settings(prefix: str, **fields: Any) -> dict[str, Any]:
    """`LoraConfig` as diffusers stores it."""
    config = LoraConfig(**{"r": RANK, "lora_alpha": 7, "target_modules": EVERYTHING, **fields}).to_dict()
    return {prefix + key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def smaller(tensors: Tensors) -> Tensors:
    """Rank 2 of every second attention's."""
    cut = {"A": lambda tensor: tensor[:2].copy(), "B": lambda tensor: tensor[:, :2].copy()}
    return {name: cut[name[-8]](tensor) if ".attn2." in name else tensor for name, tensor in tensors.items()}


def with_text(change: Callable[[str], str] = lambda name: name) -> Tensors:
    factors = {f"{TEXT}.lora_A.weight": np.ones((2, 4), "f"), f"{TEXT}.lora_B.weight": np.ones((4, 2), "f")}
    return {change(name): tensor for name, tensor in factors.items()}


PATTERNS = {"alpha_pattern": {"attn2.to_k": 5}, "rank_pattern": {r"attn2\..*": 2}, "use_rslora": True}
READ: dict[str, Callable[[], tuple[Tensors, dict[str, Any] | None]]] = {
    "plain": lambda: (plain(), None),
    "bfloat16": lambda: ({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in plain().items()}, None),
    "ranks that differ": lambda: (smaller(plain()), None),
    "down and up": lambda: (renamed(down_up), None),
    "first layout": lambda: (renamed(first_layout), None),
    "first layout, processors": lambda: (renamed(lambda name: first_layout(name, ".processor")), None),
    "settings": lambda: (plain(), settings("transformer.")),
    "settings with patterns": lambda: (smaller(plain()), settings("transformer.", **PATTERNS)),
    "text encoders": lambda: (plain() | with_text(), None),
    "text encoders, settings": lambda: (
        plain() | with_text(), settings("transformer.") | settings("text_encoder.", r=2, lora_alpha=64)
    ),
    "ComfyUI's text encoders": lambda: (plain() | with_text(lambda name: name.replace("text_encoder", "clip_l")), None),
}  # fmt: skip


@pytest.mark.parametrize("layout", READ)
def test_what_diffusers_reads(layout: str, tmp_path: Path) -> None:
    tensors, fields = READ[layout]()
    path, metadata = tmp_path / "lora.safetensors", {"format": "pt"}
    save_file(tensors, path, metadata if fields is None else metadata | {"lora_adapter_metadata": json.dumps(fields)})
    check(ours(read_lora(path, CONFIG)), of_diffusers(path))


def underscored(prefix: str, name: str) -> str:
    module, _, role = name.removeprefix("transformer.").partition(".lora_")
    return f"{prefix}{module.replace('.', '_')}.lora_{role.replace('A', 'down').replace('B', 'up')}"


def alphas(*values: Any) -> Tensors:
    """One for each module, in turn."""
    modules = modules_from_adapter(random_adapter(1.0), CONFIG)
    return {f"transformer.{name}.alpha": np.asarray(values[i % len(values)]) for i, name in enumerate(modules)}


UNREAD: dict[str, tuple[Callable[[], Tensors], dict[str, str], float]] = {  # tensors, header, scale
    "PEFT's names, alpha in the header": (
        lambda: renamed(lambda name: name.replace("transformer.", "base_model.model.", 1)), {"lora_alpha": "6"}, 2.0
    ),
    "nested prefixes": (lambda: renamed(lambda name: f"transformer.base_model.model.{name[12:]}"), {}, 1.0),
    "OneTrainer": (lambda: renamed(lambda name: underscored("lora_transformer_", name)), {}, 1.0),
    "LyCORIS": (lambda: renamed(lambda name: underscored("lycoris_", name)), {}, 1.0),
    "no prefix": (lambda: renamed(lambda name: name.removeprefix("transformer.")), {}, 1.0),
    "alpha tensors": (lambda: plain() | alphas(np.float32(6)), {}, 2.0),
    "whole alphas": (lambda: plain() | alphas(np.int64(6)), {}, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("layout", UNREAD)
def test_what_diffusers_does_not_read(layout: str, tmp_path: Path) -> None:
    """It leaves these out, or refuses them; ours is scale·b·a."""
    make, header, scale = UNREAD[layout]
    path = tmp_path / "lora.safetensors"
    save_file(make(), path, header)
    assert not of_diffusers(path)
    expected = {name: scale * delta for name, delta in ours(random_adapter(1.0)).items()}
    check(ours(read_lora(path, CONFIG)), expected)


def test_the_headers_alpha_is_not_diffusers(tmp_path: Path) -> None:
    """diffusers passes over it, and is wrong by alpha/R."""
    path = tmp_path / "lora.safetensors"
    save_file(plain(), path, {"format": "pt", "ss_network_alpha": "6", "ss_network_dim": "3"})
    check(ours(read_lora(path, CONFIG)), {name: 2 * delta for name, delta in of_diffusers(path).items()})


def fused_updates(tensors: Tensors, prefix: str) -> Tensors:
    """alpha/R·up·down of an original network's module, its rows shared out among what it holds: ComfyUI's formula."""
    left, found = dict(tensors), {}
    for name, parts in module_parts(CONFIG.depth).items():
        place = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        if f"{place}.lora_down.weight" in left:
            down, up = left.pop(f"{place}.lora_down.weight"), left.pop(f"{place}.lora_up.weight")
            whole = left.pop(f"{place}.alpha").item() / len(down) * (up.astype(np.float64) @ down)
            found |= dict(zip(parts, np.split(whole, len(parts)), strict=True))
    assert not left
    return found


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_fused_layouts(prefix: str, tmp_path: Path) -> None:
    """As trainers write them, q, k and v sharing one down; diffusers reads nothing of it, with or without alphas."""
    random, tensors, width = np.random.default_rng(0), {}, CONFIG.width
    for name, parts in module_parts(CONFIG.depth).items():
        if name.endswith(("attn.qkv", "attn.proj")) and parts[0] in modules_from_adapter(random_adapter(), CONFIG):
            place = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
            tensors[f"{place}.lora_down.weight"] = random.normal(size=(4, width)).astype(np.float32)
            tensors[f"{place}.lora_up.weight"] = random.normal(size=(len(parts) * width, 4)).astype(np.float32)
            tensors[f"{place}.alpha"] = np.asarray(random.uniform(1, 9), np.float32)
    path = tmp_path / "fused.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}, path)
    assert not of_diffusers(path)
    save_file(tensors, path)
    assert not of_diffusers(path)
    check(ours(read_lora(path, CONFIG)), fused_updates(tensors, prefix))


@pytest.mark.parametrize("layout", [*WRITERS, "sd_scripts.safetensors"])
def test_what_is_written(layout: str, tmp_path: Path) -> None:
    """Others compute our updates from what we write, and so do we. (ComfyUI's file: `test_layouts`.)"""
    adapter, path = random_adapter(2 / 3), tmp_path / layout
    if layout == "peft":
        write_peft(path, adapter, CONFIG)
        check(of_layers(PeftModel.from_pretrained(copy.deepcopy(base()), str(path))), ours(adapter))
    elif layout.startswith("diffusers"):
        write_diffusers(path, adapter, CONFIG)
        check(of_diffusers(path), ours(adapter))
    elif layout.startswith("sd_scripts"):
        write_sd_scripts(path, adapter, CONFIG)
        check(fused_updates(load_file(path), "lora_unet_"), ours(adapter))
    else:
        WRITERS[layout](path, adapter, CONFIG)
    check(ours(read_lora(path, CONFIG)), ours(adapter))
