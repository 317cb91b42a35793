"""Conversion against torch's own state dicts: parameters, tokenizers, manifest."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from fopd_jax.interop.files.converted import COMPONENTS, CUSTOM, TOKENIZERS, load_table, preset_of, read_manifest
from fopd_jax.interop.files.tables import from_tensors
from fopd_jax.interop.sd3 import convert as module
from fopd_jax.interop.sd3.convert import convert, write_transformer
from fopd_jax.interop.sd3.diffusers import config_from_diffusers, transformer_component
from tests.folders import load, snapshot
from tests.interop.sd3.conversion import CLASSES, STEMS, TABLE, run, to_numpy

MEDIUM = {  # as published
    "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.31.0.dev0", "attention_head_dim": 64,
    "caption_projection_dim": 1536, "dual_attention_layers": list(range(13)), "in_channels": 16,
    "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "sample_size": 128,
}  # fmt: skip
LARGE = MEDIUM | {
    "caption_projection_dim": 2432, "dual_attention_layers": [], "num_attention_heads": 38, "num_layers": 38,
    "pos_embed_max_size": 192,
}  # fmt: skip
SD3 = {k: v for k, v in MEDIUM.items() if k not in ("qk_norm", "dual_attention_layers")} | {"pos_embed_max_size": 192}


def state_dict(pipeline: Path, name: str, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """A network's tensors as torch has them."""
    tensors = CLASSES[name].from_pretrained(pipeline / name).state_dict()
    return {tensor: to_numpy(value.to(dtype)) for tensor, value in tensors.items()}


@pytest.mark.parametrize("name", COMPONENTS)
def test_parameters_are_torchs(name: str, tiny_pipeline: Path, converted_pipeline: Path) -> None:
    component = read_manifest(converted_pipeline).component(name)
    expected = from_tensors(component, state_dict(tiny_pipeline, name))
    jax.tree.map(np.testing.assert_array_equal, load(converted_pipeline, name), expected)


def test_tokenizers_are_copied(tiny_pipeline: Path, converted_pipeline: Path) -> None:
    for folder in TOKENIZERS.values():
        names = sorted(path.name for path in (tiny_pipeline / folder).iterdir())
        assert sorted(path.name for path in (converted_pipeline / folder).iterdir()) == names
        for name in names:
            assert (converted_pipeline / folder / name).read_bytes() == (tiny_pipeline / folder / name).read_bytes()


@pytest.mark.parametrize("name", ["transformer", "text_encoder_3"])
def test_shards_equal_a_single_file(name: str, tiny_pipeline: Path, pipeline: Path, converted_pipeline: Path) -> None:
    (pipeline / name / f"{STEMS[name]}.safetensors").unlink()
    CLASSES[name].from_pretrained(tiny_pipeline / name).save_pretrained(pipeline / name, max_shard_size="200KB")
    shards = sorted(path.name for path in (pipeline / name).glob("*.safetensors"))
    assert len(shards) > 3
    dst = pipeline.parent / "converted"
    assert run(pipeline, dst, components=[name]) == [name]
    jax.tree.map(np.testing.assert_array_equal, load(dst, name), load(converted_pipeline, name))
    sources = read_manifest(dst).components[name].source
    assert {f"{name}/{shard}" for shard in shards} <= sources.keys()


@pytest.mark.parametrize("source", [torch.float32, torch.float16])
def test_bfloat16_rounds_as_torch_does(source: torch.dtype, pipeline: Path, tmp_path: Path) -> None:
    """To nearest, ties to even; the position table keeps its dtype."""
    for name in ("transformer", "text_encoder_2"):
        path = pipeline / name / f"{STEMS[name]}.safetensors"
        tensors = safetensors.torch.load_file(path)
        ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-10, -1 - 2**-8])
        for tensor in tensors.values():
            tensor.view(-1)[: len(ties)] = ties
        safetensors.torch.save_file({k: v.to(source) for k, v in tensors.items()}, path, {"format": "pt"})
    run(pipeline, tmp_path / "dst", "bfloat16", ["transformer", "text_encoder_2"])
    for name in ("transformer", "text_encoder_2"):
        tensors = safetensors.torch.load_file(pipeline / name / f"{STEMS[name]}.safetensors")
        rounded = {tensor: to_numpy(value.to(torch.bfloat16)) for tensor, value in tensors.items()}
        expected = from_tensors(read_manifest(tmp_path / "dst").component(name), rounded)
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "dst", name, jnp.bfloat16), expected)
    table = safetensors.torch.load_file(pipeline / "transformer" / f"{STEMS['transformer']}.safetensors")[TABLE]
    found = load_table(tmp_path / "dst")
    assert found.dtype == table.numpy().dtype
    np.testing.assert_array_equal(found, table.numpy())


def test_autoencoder_stays_float32(tiny_pipeline: Path, converted_pipeline: Path, tmp_path: Path) -> None:
    run(tiny_pipeline, tmp_path / "dst", "bfloat16", ["vae", "text_encoder"])
    found = read_manifest(tmp_path / "dst").components
    assert {name: each.dtype for name, each in found.items()} == {"vae": "float32", "text_encoder": "bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "dst", "vae"), load(converted_pipeline, "vae"))


def test_manifest(tiny_pipeline: Path, converted_pipeline: Path) -> None:
    manifest = read_manifest(converted_pipeline)
    assert manifest.preset == CUSTOM
    assert manifest.components.keys() == COMPONENTS.keys()
    for name, found in manifest.components.items():
        assert found.config == json.loads((tiny_pipeline / name / "config.json").read_text())
        assert found.dtype == "float32"
        tensors = safetensors.numpy.load_file(tiny_pipeline / name / f"{STEMS[name]}.safetensors")
        assert found.tensors == len(tensors)
        assert found.parameters == sum(tensor.size for key, tensor in tensors.items() if key != TABLE)
        folders = [tiny_pipeline / folder for folder in (name, TOKENIZERS.get(name)) if folder]
        files = [path for folder in folders for path in folder.iterdir()]
        hashes = {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        assert found.source == hashes
    listed = {path: size for each in manifest.components.values() for path, size in each.files.items()}
    there = {path: len(found[1]) for path, found in snapshot(converted_pipeline).items() if found is not None}
    del there["manifest.json"]
    assert listed == there


def test_files_are_readable_by_others(converted_pipeline: Path) -> None:
    """A cluster's jobs run as other users."""
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in converted_pipeline.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("fields", "preset"),
    [(MEDIUM, "sd35_medium"), (LARGE, "sd35_large"), (SD3, "sd3_medium")],
    ids=lambda each: str(each)[:9],
)
def test_published_configuration(fields: dict[str, Any], preset: str) -> None:
    """The preset's name from `config.json`; every name and shape as torch has them, whose table is cut to save time."""
    config = config_from_diffusers(fields)
    assert preset_of(config) == preset
    assert preset_of(dataclasses.replace(config, table_size=8)) == CUSTOM
    arguments = {k: v for k, v in fields.items() if not k.startswith("_")} | {"pos_embed_max_size": 8}
    with torch.device("meta"):
        tensors = SD3Transformer2DModel(**arguments).state_dict()
    found = transformer_component(config).tensor_shapes()
    assert found.pop(TABLE) == (1, fields["pos_embed_max_size"] ** 2, config.width)
    assert found == {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != TABLE}


def test_display_covers_every_byte(tiny_pipeline: Path, tmp_path: Path) -> None:
    shown: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def display(title: str, total: int) -> Iterator[Callable[[int], None]]:
        shown[title] = [total, 0]

        def count(size: int) -> None:
            shown[title][1] += size

        yield count

    convert(tiny_pipeline, tmp_path / "dst", dtype="bfloat16", components=["transformer"], progress=display)
    write_transformer(tmp_path / "dst", tmp_path / "back", progress=display)
    assert shown.keys() == {"hash transformer", "read transformer", "write transformer"}
    assert all(total == counted for total, counted in shown.values())
    assert module.OUTPUT_DTYPES.keys() == {"bfloat16", "float32"}
