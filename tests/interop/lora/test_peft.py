"""Published LoRA layouts against PEFT and diffusers themselves: names, scales, both directions."""

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.utils import logging as diffusers_logging
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from fopd_jax.adapters.lora import Adapter
from fopd_jax.interop.lora.modules import places
from fopd_jax.interop.lora.peft import read_lora, write_diffusers, write_peft
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS
from tests.interop.lora.peft_oracle import (
    ATTENTION,
    CONFIG,
    EVERYTHING,
    WRITERS,
    base,
    check_equal,
    our_velocity,
    pipeline,
    random_adapter,
    relative,
    save_peft,
    torch_velocity,
)


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    """diffusers' logged warnings, while Python's are errors."""
    diffusers_logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        yield caplog.records
    diffusers_logging.disable_propagation()


PATTERNS = {
    "r": 4, "lora_alpha": 8, "target_modules": EVERYTHING,
    "rank_pattern": {"attn.to_q": 2, "^transformer_blocks.1.ff.net.2": 6, r".*\.3\.attn\.to_v": 1},
    "alpha_pattern": {"attn.to_q": 12, "attn2.to_k": 1},
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "everything": {"target_modules": EVERYTHING},
    "regular expression": {"target_modules": r".*\.(1|4)\.attn\.(to_q|to_out\.0)"},
    "some layers": {
        "target_modules": ["attn.to_q", "ff.net.2"],
        "layers_to_transform": [1, 2, 4],
        "layers_pattern": "transformer_blocks",
    },
    "rank-stabilised": {"use_rslora": True, "init_lora_weights": "gaussian", "r": 3},
    "patterns": PATTERNS,
    "rank-stabilised patterns": PATTERNS | {"use_rslora": True},
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapted_network_is_pefts(case: str, tmp_path: Path) -> None:
    model = save_peft(tmp_path, **ADAPTERS[case])
    expected = torch_velocity(model)
    assert relative(expected, torch_velocity(base())) > 0.02
    adapter = read_lora(tmp_path, CONFIG)
    assert relative(our_velocity(adapter, pad=case != "attention"), expected) <= 2e-4


@pytest.mark.parametrize("case", ["attention", "everything", "rank-stabilised"])
def test_pefts_tensors_come_back(case: str, tmp_path: Path) -> None:
    save_peft(tmp_path / "peft", **ADAPTERS[case])
    adapter = read_lora(tmp_path / "peft", CONFIG)
    write_peft(tmp_path / "ours", adapter, CONFIG)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    check_equal(read_lora(tmp_path / "ours", CONFIG), adapter)


@pytest.mark.parametrize("scale", [2.0, 2 / 3, 1.9, 0.1 / 3, 8 / np.sqrt(3), -0.5])
@pytest.mark.parametrize("name", WRITERS)
def test_round_trip(name: str, scale: float, tmp_path: Path) -> None:
    adapter = random_adapter(scale)
    WRITERS[name](tmp_path / name, adapter, CONFIG)
    found = read_lora(tmp_path / name, CONFIG)
    if scale in (1.9, 8 / np.sqrt(3)):  # 1.9 is no alpha/3 or alpha/√3 in float64; ComfyUI has no alpha/√R
        assert found.scale == pytest.approx(scale, rel=3e-16, abs=0)
        scale = found.scale
    check_equal(found, Adapter(adapter.weights, scale))
    assert relative(our_velocity(found), our_velocity(adapter)) < 1e-6


@pytest.mark.parametrize("targets", [("attn",), ("mlp", "attn2")])
@pytest.mark.parametrize("name", WRITERS)
def test_equal_adapters_give_equal_bytes(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    contents = []
    for run in ("one", "two"):
        path = tmp_path / run / name
        WRITERS[name](path, jax.tree.map(jnp.asarray, random_adapter(targets=targets)), CONFIG)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        assert [file.stat().st_mode & 0o777 for file in files] == [0o644] * len(files)
        contents.append({file.name: file.read_bytes() for file in files})
        assert [each.name for each in path.parent.iterdir()] == [name]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("scale", [2.0, 8 / np.sqrt(3)])
@pytest.mark.parametrize("targets", [("attn",), tuple(TARGETS)])
def test_peft_loads_our_folder(
    targets: tuple[str, ...], scale: float, tmp_path: Path, complaints: list[logging.LogRecord]
) -> None:
    adapter = random_adapter(scale, targets)
    write_peft(tmp_path / "peft", adapter, CONFIG, base_model="stabilityai/stable-diffusion-3.5-medium")
    model = PeftModel.from_pretrained(copy.deepcopy(base()), str(tmp_path / "peft"))
    assert model.peft_config["default"].base_model_name_or_path == "stabilityai/stable-diffusion-3.5-medium"
    result = model.load_adapter(str(tmp_path / "peft"), "again")
    assert not [key for key in result.missing_keys if ".again." in key]
    assert not result.unexpected_keys
    assert not complaints
    assert relative(our_velocity(adapter), torch_velocity(model)) <= 2e-4


@pytest.mark.parametrize(("scale", "file"), [(2.0, ""), (2 / 3, "renamed.safetensors"), (8 / np.sqrt(3), "")])
def test_diffusers_loads_our_file(scale: float, file: str, tmp_path: Path, complaints: list[logging.LogRecord]) -> None:
    adapter = random_adapter(scale)
    write_diffusers(tmp_path / file, adapter, CONFIG)
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path), weight_name=file or None)
    expected = torch_velocity(pipe.transformer)
    ignored = "No LoRA keys associated to"  # of the text encoders, of which we have none
    assert not [record for record in complaints if ignored not in record.getMessage()]
    assert relative(our_velocity(adapter), expected) <= 2e-4


def test_layers_that_peft_leaves_out_are_zero(tmp_path: Path, complaints: list[logging.LogRecord]) -> None:
    """Also: an adapter of one stack only is written with whole names, since "attn.to_q" would match others."""
    save_peft(tmp_path / "peft", target_modules=r"transformer_blocks\.1\.attn\.to_q")
    adapter = read_lora(tmp_path / "peft", CONFIG)
    assert list(adapter.weights) == ["dual_blocks"]
    leaves = adapter.weights["dual_blocks"]["attn"]["to_q"]
    assert leaves["a"].shape == (2, 16, 4)
    assert leaves["b"].shape == (2, 4, 16)
    assert not leaves["a"][0].any()
    assert not leaves["b"][0].any()
    assert leaves["b"][1].all()
    write_peft(tmp_path / "ours", adapter, CONFIG)
    fields = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert fields["target_modules"] == [f"transformer_blocks.{i}.attn.to_q" for i in (0, 1)]
    model = PeftModel.from_pretrained(copy.deepcopy(base()), str(tmp_path / "ours"))
    assert not complaints
    assert relative(our_velocity(adapter), torch_velocity(model)) <= 2e-4


def test_ranks_and_scales_are_folded_exactly(tmp_path: Path) -> None:
    """Ratios of scales that are powers of two change b's exponents only; padding is zero."""
    save_peft(
        tmp_path, r=4, lora_alpha=8, target_modules=["attn.to_q", "attn.to_k", "attn.to_v"],
        rank_pattern={"attn.to_q": 2}, alpha_pattern={"attn.to_k": 1},
    )  # fmt: skip
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    adapter = read_lora(tmp_path, CONFIG)
    assert adapter.scale == 4.0  # 8/2, 1/4 and 8/4 occur equally often
    layer = adapter.weights["last_block"]["attn"]
    for name, factor in (("to_q", 1), ("to_k", 1 / 16), ("to_v", 0.5)):
        a, b = (tensors[f"base_model.model.transformer_blocks.4.attn.{name}.lora_{x}.weight"] for x in "AB")
        np.testing.assert_array_equal(layer[name]["a"][:, : len(a)], a.T)
        np.testing.assert_array_equal(layer[name]["b"][: len(a)], factor * b.T)
    assert not layer["to_q"]["a"][:, 2:].any()
    assert not layer["to_q"]["b"][2:].any()


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_read_as_float32(dtype: Any, tmp_path: Path) -> None:
    save_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    leaf = read_lora(tmp_path, CONFIG).weights["last_block"]["attn"]["to_q"]["a"]
    assert leaf.dtype == np.float32
    name = "base_model.model.transformer_blocks.4.attn.to_q.lora_A.weight"
    np.testing.assert_array_equal(leaf, tensors[name].astype(np.float32).T)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("model.transformer", "model._orig_mod.transformer"),
        lambda name: name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."),
    ],
)
def test_names_with_insertions(rename: Callable[[str], str], tmp_path: Path) -> None:
    save_peft(tmp_path)
    expected = read_lora(tmp_path, CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    check_equal(read_lora(tmp_path, CONFIG), expected)


def test_published_counts() -> None:
    """The method's adapter: 191 modules of 18.8 M parameters."""
    config = PRESETS["sd35_medium"]
    chosen = [place for name, place in places(config).items() if name.split(".", 2)[2] in ATTENTION]
    assert len(chosen) == 191
    assert sum(32 * sum(place.shape[-2:]) for place in chosen) == pytest.approx(18.8e6, rel=2e-3)
