"""The tool from the outside: every kind of source, what is refused in one line, and that no pickled code runs."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fopd_jax.interop.files.safetensors import load_tree
from fopd_jax.interop.files.tensor_files import hash_file
from fopd_jax.interop.scorers.weights import load_weights
from tests.interop.scorers.clip_oracle import MERGES, TEXT, make_model, write_folder, write_words
from tests.interop.scorers.open_clip_oracle import make_open_clip
from tests.interop.scorers.test_clip import OPEN_TEXT, wide
from tests.shared_data import shared

TOOL = Path(__file__).parents[2] / "tools" / "convert_reward_weights.py"


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/convert_reward_weights.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("clip") / "source", make_model())


@pytest.fixture(scope="module")
def open_state() -> dict[str, torch.Tensor]:
    return make_open_clip(wide(128), OPEN_TEXT).state_dict()


def run(tool: ModuleType, *arguments: object) -> str:
    """The one line that the tool exits with."""
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as said:
        tool.main([str(each) for each in arguments])
    assert caught.value.code == 2
    (line,) = said.getvalue().splitlines()
    return line


def convert(tool: ModuleType, src: Path, dst: Path, *others: str) -> tuple[dict[str, Any], Any]:
    tool.main(["--src", str(src), "--dst", str(dst), *others])
    return load_weights(dst, "clip", "")


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_transformers_folder_however_it_is_stored(tool: ModuleType, folder: Path, tmp_path: Path) -> None:
    """One file, shards, or PyTorch's own; with tokenizer.json or the two older files."""
    shape, params = convert(tool, folder, tmp_path / "a.safetensors")
    assert shape["merges"] == list(MERGES)
    assert shape["text"]["vocab_size"] == TEXT.vocab_size
    source = load_tree(tmp_path / "a.safetensors")[1]["source"]
    assert source == {"model.safetensors": hash_file(folder / "model.safetensors")}
    make_model().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(make_model().state_dict(), pickled / "pytorch_model.bin")
    for i, other in enumerate((tmp_path / "shards", pickled)):
        found, tree = convert(tool, other, tmp_path / f"{i}.safetensors", "--tokenizer", str(folder))
        assert found == shape
        assert_equal(tree, params)


@pytest.mark.parametrize("wrapped", ["{}", '{"state_dict": {}}', '{"model": {}, "epoch": 1}', "safetensors"])
def test_open_clips_files(wrapped: str, tool: ModuleType, open_state: Any, tmp_path: Path) -> None:
    write_words(tmp_path / "words")
    src = tmp_path / ("a.safetensors" if wrapped == "safetensors" else "a.pt")
    if wrapped == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in open_state.items()}, src)
    else:
        prefix = "module." if "model" in wrapped else ""
        content = {f"{prefix}{name}": tensor for name, tensor in open_state.items()} | {"step": torch.tensor(3)}
        outer = json.loads(wrapped)
        torch.save({name: content if value == {} else value for name, value in outer.items()} or content, src)
    others = ("--activation", "gelu", "--tokenizer", str(tmp_path / "words" / "merges.txt"))
    shape, params = convert(tool, src, tmp_path / "b.safetensors", *others)
    assert shape["merges"] == list(MERGES)
    np.testing.assert_array_equal(params["vision"]["visual_projection"]["kernel"], open_state["visual.proj"].numpy())


def test_half_precision(tool: ModuleType, open_state: Any, tmp_path: Path) -> None:
    """Converted to float32, exactly."""
    for name, dtype in (("a.pt", torch.float16), ("b.pt", torch.bfloat16)):
        torch.save({"state_dict": {key: each.to(dtype) for key, each in open_state.items()}}, tmp_path / name)
        _, params = convert(tool, tmp_path / name, tmp_path / f"{name}.safetensors", "--activation", "gelu")
        expected = open_state["text_projection"].to(dtype).float().numpy()
        np.testing.assert_array_equal(params["text"]["text_projection"]["kernel"], expected)


def test_the_published_aesthetic_head(tool: ModuleType, tmp_path: Path) -> None:
    src, dst = shared("aesthetic_head/sac+logos+ava1-l14-linearMSE.pth"), tmp_path / "head.safetensors"
    tool.main(["--src", str(src), "--dst", str(dst)])
    shape, params = load_weights(dst, "aesthetic", "")
    assert shape == {"width": 768}
    assert params["kernel"].shape == (768,)


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_no_pickled_code_runs(how: str, tool: ModuleType, tmp_path: Path) -> None:
    src, told = tmp_path / "a.pt", tmp_path / "told"
    content = {"state_dict": {"visual.proj": torch.zeros(2)}, "payload": Payload(told)}
    if how == "torch":
        torch.save(content, src)
    else:
        src.write_bytes(pickle.dumps(content))
    message = run(tool, "--src", src, "--dst", tmp_path / "b.safetensors")
    assert f"src: {src}: PyTorch reads no tensors from it" in message
    assert not told.exists()
    assert not (tmp_path / "b.safetensors").exists()


def test_one_line_for_what_is_wrong(tool: ModuleType, folder: Path, tmp_path: Path) -> None:
    dst, there = tmp_path / "out.safetensors", tmp_path / "there.safetensors"
    there.write_text("kept")
    strange = tmp_path / "strange.safetensors"
    save_file({"a.weight": torch.zeros(2)}, strange)
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1")
    torch.save({"a": 1}, tmp_path / "none.pt")
    save_file({"visual_projection.weight": torch.full((2,), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("--src", tmp_path / "no", "--dst", dst), f"src: {tmp_path / 'no'}: no such file or folder"),
        (("--src", folder, "--dst", there), f"dst: {there} is there already; --force replaces it"),
        (("--src", folder, "--dst", tmp_path), "is there already; it is a folder"),
        (("--src", there, "--dst", there, "--force"), "is the source itself; choose another"),
        (("--src", strange, "--dst", dst), "found tensors (a.weight, …) of no network that is known, expected one of"),
        (("--src", strange, "--dst", dst, "--network", "clip"), "config.json: model_type: found nothing"),
        (("--src", tmp_path / "text.pt", "--dst", dst), "PyTorch reads no tensors from it"),
        (("--src", tmp_path / "none.pt", "--dst", dst), "found no tensors, expected a state dict"),
        (("--src", tmp_path / "nan.safetensors", "--dst", dst), "found 2 values that are NaN or infinite"),
        (("--src", tmp_path / "empty", "--dst", dst), "found neither model.safetensors nor"),
        (("--src", folder, "--dst", dst, "--tokenizer", tmp_path / "w.gz"), "tokenizer: "),
        (("--src", "gs://a/b", "--dst", dst), "src: found 'gs://a/b', expected a path on this machine"),
    ):
        assert message in run(tool, *arguments), arguments
    assert there.read_text() == "kept"
    assert not dst.exists()
    assert not list(tmp_path.glob(".*"))


def test_force_replaces(tool: ModuleType, folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "a.safetensors"
    dst.write_text("old")
    convert(tool, folder, dst, "--force")


def test_without_words_it_says_so(tool: ModuleType, open_state: Any, tmp_path: Path, capsys: Any) -> None:
    torch.save(open_state, tmp_path / "a.pt")
    shape, _ = convert(tool, tmp_path / "a.pt", tmp_path / "b.safetensors", "--activation", "gelu")
    assert "merges" not in shape
    assert capsys.readouterr().out.endswith("without words\n")


@pytest.mark.slow
def test_as_a_program(folder: Path, tmp_path: Path) -> None:
    arguments = ["--src", str(folder), "--dst", str(tmp_path / "a.safetensors")]
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == f"converted clip from {folder} to {tmp_path / 'a.safetensors'}\n"
