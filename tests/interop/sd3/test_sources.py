"""Sources as others lay them out: variants, a transformer's folder, single files of any prefix; our own exports."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
from safetensors.numpy import save_file

from fopd_jax.interop.files.converted import read_manifest
from fopd_jax.interop.files.tensor_files import open_tensor_file, open_tensor_files
from fopd_jax.interop.sd3.convert import open_sources, write_transformer
from fopd_jax.interop.sd3.original import PREFIX
from tests.folders import load
from tests.interop.sd3.conversion import run, silent
from tests.interop.sd3.test_original import OTHERS, to_original, write

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SHARED = Path(__file__).parents[4] / "shared/bug_inputs"


def stream(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a source's transformer under diffusers' names; its other networks are looked at, too."""
    source = next(each for each in open_sources(path, None) if each.name == "transformer")
    found = dict(part for each in source.tensors.stream() for part in source.split(*each))
    assert found.keys() == source.component.tensor_shapes().keys()
    return found


def our_export(tiny: Path, converted: Path, folder: Path) -> Path:
    """What `--reverse` writes."""
    write_transformer(converted, folder / "back", progress=silent)
    return folder / "back"


def our_student(tiny: Path, converted: Path, folder: Path) -> Path:
    """A run's `student_diffusers`, and what else people put beside a network."""
    write_transformer(converted, folder / "student_diffusers" / "transformer", progress=silent)
    for name in ("README.md", ".gitattributes"):
        (folder / "student_diffusers" / name).touch()
    shutil.copytree(tiny / "scheduler", folder / "student_diffusers" / "scheduler")
    return folder / "student_diffusers"


def variant(name: str) -> Callable[[Path, Path, Path], Path]:
    """A pipeline all of whose networks come in a variant alone."""

    def make(tiny: Path, converted: Path, folder: Path) -> Path:
        shutil.copytree(tiny, folder / "pipeline")
        for path in list((folder / "pipeline").rglob("*.safetensors")):
            path.rename(path.with_suffix(f".{name}.safetensors"))
        return folder / "pipeline"

    return make


def single(prefix: str) -> Callable[[Path, Path, Path], Path]:
    """The original layout in one file, beside another network's."""

    def make(tiny: Path, converted: Path, folder: Path) -> Path:
        tensors = safetensors.torch.load_file(tiny / WEIGHTS)
        depth = json.loads((tiny / "transformer/config.json").read_bytes())["num_layers"]
        found = {name.replace(PREFIX, prefix): tensor for name, tensor in to_original(tensors, depth).items()}
        return write(folder / "single.safetensors", found | OTHERS)

    return make


SOURCES: dict[str, Callable[[Path, Path, Path], Path]] = {
    "our export": our_export, "our student": our_student, "fp16": variant("fp16"),
    "published prefix": single(PREFIX), "no prefix": single(""), "another prefix": single("diffusion_model."),
}  # fmt: skip


@pytest.mark.parametrize("layout", SOURCES)
def test_layouts(layout: str, tiny_pipeline: Path, converted_pipeline: Path, tmp_path: Path) -> None:
    """Each is the network that the pipeline's own folder holds, in every bit."""
    source = SOURCES[layout](tiny_pipeline, converted_pipeline, tmp_path)
    np.testing.assert_equal(stream(source), safetensors.numpy.load_file(tiny_pipeline / WEIGHTS))
    if layout in ("our student", "no prefix"):  # and as the program takes it, into a folder that has the other networks
        folder = Path(shutil.copytree(converted_pipeline, tmp_path / "converted"))
        expected = load(folder, "transformer")
        shutil.rmtree(folder / "transformer")
        assert run(source, folder) == ["transformer"]
        jax.tree.map(np.testing.assert_array_equal, load(folder, "transformer"), expected)
        assert read_manifest(folder).components.keys() == read_manifest(converted_pipeline).components.keys()


def test_variants_that_are_not_told_apart(tmp_path: Path) -> None:
    for name in ("model.fp16.safetensors", "model.fp8.safetensors"):
        save_file({"weight": np.ones(3, np.float16)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"found variants fp16, fp8 of model\.safetensors, expected one of them"):
        open_tensor_files(tmp_path, "model")
    save_file({"other": np.ones(3, np.float16)}, tmp_path / "model.safetensors")  # no variant goes first
    assert list(open_tensor_files(tmp_path, "model").entries) == ["other"]
    with pytest.raises(
        ValueError, match=r"neither weights\.safetensors nor .*found model\.fp16\.safetensors, which is"
    ):
        open_tensor_files(tmp_path, "weights")


@pytest.mark.parametrize("index", [None, "model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"])
def test_fp16_variant(index: str | None, tmp_path: Path) -> None:
    name = "model.fp16-00001-of-00001.safetensors" if index else "model.fp16.safetensors"
    save_file({"weight": np.ones(3, np.float16)}, tmp_path / name)
    if index:
        (tmp_path / index).write_text(json.dumps({"weight_map": {"weight": name}}))
    assert list(open_tensor_files(tmp_path, "model").entries) == ["weight"]


def test_streamed_arrays_may_be_kept(tmp_path: Path) -> None:
    tensors = {name: np.full(4, i, np.float32) for i, name in enumerate("abc")}
    save_file(tensors, tmp_path / "some.safetensors")
    np.testing.assert_equal(dict(open_tensor_file(tmp_path / "some.safetensors").stream()), tensors)


@pytest.mark.parametrize("name", ["fp16_variant", "transformer_only", "single_no_prefix.safetensors"])
def test_shared_sources(name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip("no folder of bug inputs")
    assert stream(SHARED / name)


def test_shared_tokenizer_without_words() -> None:
    if not SHARED.is_dir():
        pytest.skip("no folder of bug inputs")
    open_sources(SHARED / "tiny", None)
    with pytest.raises(ValueError, match="tokenizer_3: not the tokenizer of its text encoder: found 19 of 38 tokens"):
        open_sources(SHARED / "t5_tokenizer_without_words", None)
