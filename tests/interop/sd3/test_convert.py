"""Conversion against torch's own state dicts, what is left alone and what is converted again, and the way back."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
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
from diffusers import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from fopd_jax.interop.files.converted import (
    COMPONENTS,
    CUSTOM,
    TABLE_FILE,
    TOKENIZERS,
    Manifest,
    abstract_params,
    load_params,
    load_table,
    preset_of,
    read_manifest,
    save_params,
    write_manifest,
)
from fopd_jax.interop.files.tables import aligned_empty, from_tensors
from fopd_jax.interop.sd3 import convert as module
from fopd_jax.interop.sd3.convert import convert, write_transformer
from fopd_jax.interop.sd3.diffusers import config_from_diffusers, transformer_component

ROOT = Path(__file__).parents[2]
CLASSES: dict[str, Any] = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
STEMS = dict.fromkeys(CLASSES, "model") | dict.fromkeys(("transformer", "vae"), "diffusion_pytorch_model")
TABLE = "pos_embed.pos_embed"
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


# ---- helpers


def silent(title: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    return contextlib.nullcontext(lambda count: None)


def run(src: Path, dst: Path, dtype: str = "float32", components: list[str] | None = None) -> list[str]:
    return convert(src, dst, dtype=dtype, components=components, progress=silent)


def state_dict(pipeline: Path, name: str, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """A network's tensors as torch has them."""
    tensors = CLASSES[name].from_pretrained(pipeline / name).state_dict()
    return {tensor: to_numpy(value.to(dtype)) for tensor, value in tensors.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def load(folder: Path, name: str, dtype: Any = np.float32) -> Any:
    return load_params(folder, name, abstract_params(read_manifest(folder).component(name), dtype))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, hidden ones too, with its time and content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def pipeline(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "pipeline"))


@pytest.fixture
def converted(converted_pipeline: Path, tmp_path: Path) -> Path:
    """A copy to be changed, alone in its folder."""
    return Path(shutil.copytree(converted_pipeline, tmp_path / "there" / "converted"))


def change(pipeline: Path, name: str, tensor: str, value: float) -> None:
    """Set the first value of a tensor."""
    path = pipeline / name / f"{STEMS[name]}.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[tensor].view(-1)[0] = value
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


# ---- what comes out


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
    there = {path: len(data) for path, (_, data) in snapshot(converted_pipeline).items() if path != "manifest.json"}
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


# ---- what is left alone, what is converted again


def test_unchanged_is_left_alone(tiny_pipeline: Path, converted: Path) -> None:
    before = snapshot(converted.parent)
    assert run(tiny_pipeline, converted) == []
    assert snapshot(converted.parent) == before


def test_only_what_changed_is_converted_again(pipeline: Path, converted: Path) -> None:
    before = snapshot(converted)
    change(pipeline, "transformer", "proj_out.bias", 5.0)
    assert run(pipeline, converted) == ["transformer"]
    np.testing.assert_array_equal(load(converted, "transformer")["proj_out"]["bias"][0], 5.0)
    after = snapshot(converted)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {path.split("/")[0] for path in changed} == {"transformer", TABLE_FILE, "manifest.json"}
    assert run(pipeline, converted, components=["transformer"]) == []
    assert os.listdir(converted.parent) == ["converted"]


def test_changed_tokenizer_converts_its_encoder_again(pipeline: Path, converted: Path) -> None:
    (pipeline / "tokenizer_2" / "merges.txt").write_text("#version: 0.2\n")
    assert run(pipeline, converted, components=["text_encoder", "text_encoder_2"]) == ["text_encoder_2"]
    assert (converted / "tokenizer_2" / "merges.txt").is_file()


def test_components_can_be_added(tiny_pipeline: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    assert run(tiny_pipeline, dst, components=["text_encoder_3"]) == ["text_encoder_3"]
    assert read_manifest(dst).preset == ""
    assert run(tiny_pipeline, dst, components=["text_encoder", "text_encoder_3"]) == ["text_encoder"]
    assert run(tiny_pipeline, dst, components=["transformer"]) == ["transformer"]
    manifest = read_manifest(dst)
    assert manifest.components.keys() == {"transformer", "text_encoder", "text_encoder_3"}
    assert manifest.preset == CUSTOM


def test_another_dtype_is_converted_again(tiny_pipeline: Path, converted: Path) -> None:
    names = ["vae", "text_encoder"]
    assert run(tiny_pipeline, converted, "bfloat16", names) == ["text_encoder"]  # the autoencoder is float32 anyway
    assert read_manifest(converted).components["text_encoder"].dtype == "bfloat16"
    assert run(tiny_pipeline, converted, "bfloat16", ["text_encoder"]) == []


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_component_is_converted_again(damage: str, tiny_pipeline: Path, converted: Path) -> None:
    path = converted / TABLE_FILE
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(
        ValueError, match=r"pos_embed.safetensors: found .*, expected .* bytes; convert transformer again"
    ):
        read_manifest(converted)
    assert run(tiny_pipeline, converted, components=["transformer", "text_encoder"]) == ["transformer"]
    assert read_manifest(converted).components.keys() == COMPONENTS.keys()


@pytest.mark.parametrize("there", [False, True])
def test_leftovers_of_a_killed_run_are_cleared(there: bool, tiny_pipeline: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    leftover = dst / ".partial" if there else tmp_path / ".dst.partial"
    (leftover / "vae" / "d").mkdir(parents=True)
    (leftover / "manifest.json").write_text("{}")
    (leftover / "vae" / "d" / "0").write_bytes(bytes(1000))
    assert run(tiny_pipeline, dst, components=["text_encoder"]) == ["text_encoder"]
    assert os.listdir(tmp_path) == ["dst"]
    assert sorted(os.listdir(dst)) == ["manifest.json", "text_encoder", "tokenizer"]


def test_destination_may_be_the_working_directory(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(tiny_pipeline, Path(), components=["text_encoder"]) == ["text_encoder"]
    assert run(tiny_pipeline, Path(), components=["text_encoder"]) == []
    assert sorted(os.listdir()) == ["manifest.json", "text_encoder", "tokenizer"]
    assert os.listdir(tmp_path) == ["here"]


@pytest.mark.parametrize("there", [False, True])
def test_destination_may_be_a_link(there: bool, tiny_pipeline: Path, tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "disk" / "target"
    if there:
        target.mkdir(parents=True)
    link.symlink_to(target)
    assert run(tiny_pipeline, link, components=["text_encoder"]) == ["text_encoder"]
    assert run(tiny_pipeline, link, components=["text_encoder"]) == []
    assert link.is_symlink()
    assert (sorted(os.listdir(tmp_path)), os.listdir(tmp_path / "disk")) == (["disk", "link"], ["target"])


# ---- failures


def test_failure_leaves_an_existing_destination_as_it_was(pipeline: Path, converted: Path) -> None:
    """Also when an earlier component was already converted anew."""
    change(pipeline, "transformer", "proj_out.bias", 5.0)
    change(pipeline, "text_encoder", "text_projection.weight", float("nan"))
    before = snapshot(converted.parent)
    with pytest.raises(ValueError, match=r"tensor 'text_projection.weight' in .*: found 1 values that are NaN"):
        run(pipeline, converted, components=["transformer", "text_encoder"])
    assert snapshot(converted.parent) == before


@pytest.mark.parametrize("moment", ["hash text_encoder", "read text_encoder_2", "write text_encoder_2"])
def test_interrupt_leaves_nothing(moment: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def interrupt(title: str, total: int) -> Iterator[Callable[[int], None]]:
        def count(size: int) -> None:
            if title == moment:
                raise KeyboardInterrupt

        yield count

    dst, components = tmp_path / "a" / "b" / "dst", ["text_encoder", "text_encoder_2"]
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_pipeline, dst, dtype="float32", components=components, progress=interrupt)
    assert os.listdir(tmp_path) == []


def test_crash_between_two_renames_leaves_no_claim(
    pipeline: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Components are replaced one by one; a manifest never names what is not there whole."""
    change(pipeline, "text_encoder", "text_projection.weight", 5.0)

    def crash(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, converted, components=["text_encoder"])
    monkeypatch.undo()
    assert read_manifest(converted).components.keys() == COMPONENTS.keys() - {"text_encoder"}
    assert run(pipeline, converted, components=["text_encoder"]) == ["text_encoder"]
    assert read_manifest(converted).components.keys() == COMPONENTS.keys()


def test_two_conversions_at_once(tiny_pipeline: Path, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def second(title: str, total: int) -> Iterator[Callable[[int], None]]:
        if title == "read text_encoder":
            with pytest.raises(ValueError, match=r"^dst: another conversion is at work in .*\.dst\.partial$"):
                run(tiny_pipeline, tmp_path / "dst", components=["text_encoder_2"])
        yield lambda count: None

    done = convert(tiny_pipeline, tmp_path / "dst", dtype="float32", components=["text_encoder"], progress=second)
    assert done == ["text_encoder"]
    assert os.listdir(tmp_path) == ["dst"]


KILLED = """
import contextlib, sys, time
from pathlib import Path
from fopd_jax.interop.sd3 import convert as module

save = module.save_params
def save_and_hang(folder, name, params):
    save(folder, name, params)
    print("saved", flush=True)
    time.sleep(600)

module.save_params = save_and_hang
silent = lambda title, total: contextlib.nullcontext(lambda count: None)
module.convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype="float32", components=["text_encoder"], progress=silent)
"""


def test_kill(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Nothing cleans up after SIGKILL but the next run."""
    command = [sys.executable, "-c", KILLED, str(tiny_pipeline), str(tmp_path / "dst")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"saved\n"
        process.kill()
    assert os.listdir(tmp_path) == [".dst.partial"]
    assert run(tiny_pipeline, tmp_path / "dst", components=["text_encoder"]) == ["text_encoder"]
    assert os.listdir(tmp_path) == ["dst"]
    assert read_manifest(tmp_path / "dst").components.keys() == {"text_encoder"}


# ---- the way back


def test_diffusers_reads_what_is_written_back(converted_pipeline: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    """Without missing or unexpected keys, under the same configuration, every tensor equal in every bit."""
    write_transformer(converted_pipeline, tmp_path / "new" / "transformer", progress=silent)
    folder = tmp_path / "new" / "transformer"
    model, report = SD3Transformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert (folder / "config.json").stat().st_mode & 0o044 == 0o044
    expected = SD3Transformer2DModel.from_pretrained(tiny_pipeline / "transformer")
    assert dict(model.config) | {"_name_or_path": ""} == dict(expected.config) | {"_name_or_path": ""}
    found, tensors = model.state_dict(), expected.state_dict()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name
    assert sorted(os.listdir(folder)) == ["config.json", f"{STEMS['transformer']}.safetensors"]
    assert os.listdir(tmp_path) == ["new"]


def test_way_back_and_forth_in_bfloat16(tiny_pipeline: Path, pipeline: Path, tmp_path: Path) -> None:
    """The rounded weights, and the table in its own dtype, come through unchanged."""
    first, second, path = tmp_path / "first", tmp_path / "second", pipeline / "transformer"
    run(tiny_pipeline, first, "bfloat16", ["transformer"])
    shutil.rmtree(path)
    write_transformer(first, path, progress=silent)
    written = safetensors.torch.load_file(path / f"{STEMS['transformer']}.safetensors")
    assert {name for name, tensor in written.items() if tensor.dtype != torch.bfloat16} == {TABLE}
    run(pipeline, second, "bfloat16", ["transformer"])
    for folder in (first, second):
        params = load(folder, "transformer", jnp.bfloat16)
        jax.tree.map(np.testing.assert_array_equal, params, load(first, "transformer", jnp.bfloat16))
        np.testing.assert_array_equal(load_table(folder), load_table(first))


def test_interrupted_way_back_leaves_nothing(converted_pipeline: Path, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def interrupt(title: str, total: int) -> Iterator[Callable[[int], None]]:
        def count(size: int) -> None:
            raise KeyboardInterrupt

        yield count

    with pytest.raises(KeyboardInterrupt):
        write_transformer(converted_pipeline, tmp_path / "a" / "b", progress=interrupt)
    assert os.listdir(tmp_path) == []


# ---- reading a converted folder


def test_table_crop_is_its_centre(converted_pipeline: Path) -> None:
    table = load_table(converted_pipeline)
    side = read_manifest(converted_pipeline).transformer.table_size
    crop = load_table(converted_pipeline, (side, 6, 3))
    np.testing.assert_array_equal(crop, table.reshape(side, side, -1)[9:15, 10:13])
    assert type(crop) is np.ndarray  # no mapped file behind it
    with pytest.raises(ValueError, match="holds 24x24 patches, but the input has 25x3"):
        load_table(converted_pipeline, (side, 25, 3))


def test_parameters_can_be_read_in_another_dtype(converted_pipeline: Path) -> None:
    found = load(converted_pipeline, "text_encoder", jnp.bfloat16)
    exact = load(converted_pipeline, "text_encoder")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), found, exact)


def test_parameters_of_another_shape_are_refused(converted_pipeline: Path) -> None:
    component = read_manifest(converted_pipeline).component("text_encoder")
    shapes = dict(component.shapes) | {"text_projection/kernel": (24, 25)}
    abstract = abstract_params(dataclasses.replace(component, shapes=shapes), np.float32)
    message = (
        r"another shape \(parameter 'text_projection/kernel': found shape \(24, 24\), expected \(24, 25\)\); convert"
    )
    with pytest.raises(ValueError, match=f"text_encoder: damaged, or of {message} text_encoder again"):
        load_params(converted_pipeline, "text_encoder", abstract)


@pytest.mark.slow
def test_array_of_more_than_a_gigabyte(tmp_path: Path) -> None:
    """T5-XXL's and SD3.5-Large's stacked layers are such arrays, which Orbax refuses unless told of their size."""
    params = {"kernel": aligned_empty((2, 300_000_000), jnp.bfloat16)}
    params["kernel"][:] = 1
    save_params(tmp_path, "large", params)
    found = load_params(tmp_path, "large", {"kernel": jax.ShapeDtypeStruct((2, 300_000_000), jnp.bfloat16)})
    assert (np.asarray(found["kernel"]) == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fopd_jax/converted/0"}, "found format 'fopd_jax/converted/0', expected 'fopd_jax/converted/1'"),
        ({"preset": None}, "damaged"),
        ({"components": []}, "damaged"),
        ({"components": {"unet": {}}}, "found component 'unet', expected some of transformer, vae"),
        ({"components": {"vae": {"dtype": "float32"}}}, "damaged at component 'vae'"),
        ({"components": {"vae": []}}, "damaged at component 'vae'"),
    ],
)
def test_damaged_manifest(change: dict[str, Any], message: str, converted: Path) -> None:
    path = converted / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"manifest.json: {message}"):
        read_manifest(converted)


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no manifest.json; expected a folder that tools/convert_sd35_weights.py wrote"
    ):
        read_manifest(tmp_path)
    write_manifest(tmp_path, Manifest("sd35_medium", {}))
    assert read_manifest(tmp_path) == Manifest("sd35_medium", {})


SHARDED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from fopd_jax.interop.files.converted import abstract_params, load_params, load_sharded, read_manifest
from fopd_jax.models.mmdit import MMDiT
from fopd_jax.parallel.mesh import MeshShape, make_mesh
from fopd_jax.parallel.sharding import parameter_shardings

folder, component = Path(sys.argv[1]), read_manifest(Path(sys.argv[1])).component("transformer")
c = component.config
inputs = jnp.zeros((1, 8, 8, c.channels)), jnp.zeros(1), jnp.zeros((1, 1, c.context_dim)), jnp.zeros((1, c.pooled_dim))
boxed = jax.eval_shape(MMDiT(c).init, jax.random.key(0), *inputs)["params"]
mesh = make_mesh(MeshShape(data=1, fsdp=4, tensor=2))
found = load_sharded(folder, "transformer", boxed, jnp.float32, mesh)
whole = load_params(folder, "transformer", abstract_params(component, np.float32))
jax.tree.map(np.testing.assert_array_equal, found, whole)
jax.tree.map(lambda a, b: np.testing.assert_(a.sharding == b), found, parameter_shardings(mesh, boxed))
assert {len(leaf.devices()) for leaf in jax.tree.leaves(whole)} == {1}
largest = found["blocks"]["ff"]["up"]["kernel"]
assert len(largest.addressable_shards) == 8 and largest.addressable_shards[0].data.size * 8 == largest.size
print("same")
"""


def test_shards_on_eight_devices(converted_pipeline: Path) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(converted_pipeline)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr


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
