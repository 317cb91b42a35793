"""The way back, against diffusers' own reading."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from fopd_jax.interop.files.converted import load_table
from fopd_jax.interop.sd3.convert import write_transformer
from tests.folders import load
from tests.interop.sd3.conversion import STEMS, TABLE, run, silent


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
