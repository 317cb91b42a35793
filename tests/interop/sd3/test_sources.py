"""Sources as others lay them out: fp16 variants, a transformer's folder alone, single files without a prefix."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fopd_jax.interop.files.tensor_files import open_tensor_file, open_tensor_files
from fopd_jax.interop.sd3.convert import open_sources

SHARED = Path(__file__).parents[4] / "shared/bug_inputs"


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
    source = open_sources(SHARED / name, None)[0]
    found = dict(part for each in source.tensors.stream() for part in source.split(*each))
    assert found.keys() == source.component.tensor_shapes().keys()


def test_shared_tokenizer_without_words() -> None:
    if not SHARED.is_dir():
        pytest.skip("no folder of bug inputs")
    open_sources(SHARED / "tiny", None)
    with pytest.raises(ValueError, match="tokenizer_3: not the tokenizer of its text encoder: found 19 of 38 tokens"):
        open_sources(SHARED / "t5_tokenizer_without_words", None)
