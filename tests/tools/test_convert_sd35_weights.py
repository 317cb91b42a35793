"""The command line: what it says when all is well; one clear line and nothing left behind for all that can be wrong."""

import dataclasses
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from fopd_jax.interop.files.converted import read_manifest
from fopd_jax.interop.sd3 import convert as converter

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_sd35_weights.py"
CONFIG, WEIGHTS = "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FIRST, SECOND = (f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
QUERY, BIAS = "transformer_blocks.0.attn.to_q.weight", "proj_out.bias"
TABLE = "transformer.pos_embed.safetensors"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_sd35_weights", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pipeline(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "source" / "pipeline"))


@pytest.fixture
def converted(converted_pipeline: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(converted_pipeline, tmp_path / "converted"))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes] | None]:
    """Everything below a folder, hidden or not: files with their time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def messages(text: str) -> list[str]:
    """Lines of standard error, progress bars aside."""
    return [line for line in re.split(r"[\r\n]+", text) if line.strip() and "B/s]" not in line]


@dataclasses.dataclass
class Caller:
    """Runs the command line in this process and expects one line; `tmp_path` must be as it was before."""

    tool: ModuleType
    capfd: pytest.CaptureFixture[str]
    folder: Path

    def fails(self, arguments: Sequence[str | Path], message: str) -> None:
        before = snapshot(self.folder)
        with pytest.raises(SystemExit) as stop:
            self.tool.main([str(argument) for argument in arguments])
        output, errors = self.capfd.readouterr()
        assert (stop.value.code, output) == (1, "")
        (line,) = messages(errors)
        assert re.search(f"^error: .*{message}", line), line
        assert "Traceback" not in line
        assert len(line) < 500
        assert snapshot(self.folder) == before

    def says(self, arguments: Sequence[str | Path], message: str) -> None:
        self.tool.main([str(argument) for argument in arguments])
        output, errors = self.capfd.readouterr()
        assert (output, messages(errors)) == (message + "\n", [])


@pytest.fixture
def call(tool: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Caller:
    return Caller(tool, capfd, tmp_path)


# ---- ways to break a source


def edit_json(file: str, **changes: Any) -> Callable[[Path], None]:
    """Set fields of a JSON file; None removes one."""

    def apply(src: Path) -> None:
        fields = json.loads((src / file).read_text()) | changes
        (src / file).write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Callable[[Path], None]:
    def apply(src: Path) -> None:
        tensors = safetensors.torch.load_file(src / file)
        change(tensors)
        safetensors.torch.save_file(tensors, src / file)

    return apply


def edit_header(change: Callable[[dict[str, Any]], Any], file: str = WEIGHTS) -> Callable[[Path], None]:
    """Change the header and leave the data."""

    def apply(src: Path) -> None:
        data = (src / file).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        change(header)
        encoded = json.dumps(header).encode()
        (src / file).write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[start:])

    return apply


def edit_bytes(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda src: void((src / file).write_bytes(change((src / file).read_bytes())))


def shard(then: Callable[[Path], None] = lambda src: None) -> Callable[[Path], None]:
    """Split the transformer into two shards, then do something to them."""

    def apply(src: Path) -> None:
        tensors = safetensors.torch.load_file(src / WEIGHTS)
        (src / WEIGHTS).unlink()
        names = sorted(tensors)
        files = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
        for file, part in files.items():
            safetensors.torch.save_file({name: tensors[name] for name in part}, src / file)
        weight_map = {name: Path(file).name for file, part in files.items() for name in part}
        (src / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        then(src)

    return apply


def edit_map(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(src: Path) -> None:
        index = json.loads((src / INDEX).read_text())
        change(index["weight_map"])
        (src / INDEX).write_text(json.dumps(index))

    return apply


def copy_into_second_shard(src: Path) -> None:
    """One tensor of the first shard stands in both."""
    first = safetensors.torch.load_file(src / FIRST)
    name = min(first)
    edit_tensors(lambda tensors: tensors.update({name: first[name]}), SECOND)(src)


def remove(name: str) -> Callable[[Path], None]:
    return lambda src: shutil.rmtree(src / name) if (src / name).is_dir() else (src / name).unlink()


def pickle_only(src: Path) -> None:
    torch.save({}, src / "transformer" / "diffusion_pytorch_model.bin")
    (src / WEIGHTS).unlink()


def empty_tokenizer(src: Path) -> None:
    shutil.rmtree(src / "tokenizer_2")
    (src / "tokenizer_2").mkdir()


def set_first(value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY] = tensors[QUERY].to(dtype)
        tensors[QUERY].view(-1)[0] = value

    return change


def cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({QUERY: tensors[QUERY].to(dtype)})


def twice(data: bytes) -> bytes:
    """The same name a second time in the header, which JSON readers pass over."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start].rstrip()
    assert header.endswith(b"}")
    fields = json.dumps({BIAS: json.loads(header)[BIAS]}).encode()
    header = header[:-1] + b"," + fields[1:]
    return len(header).to_bytes(8, "little") + header + data[start:]


def shift_offsets(amount: int) -> Callable[[dict[str, Any]], None]:
    """Move every tensor but the first by some bytes: a gap, or an overlap."""

    def change(header: dict[str, Any]) -> None:
        for entry in (each for key, each in header.items() if key != "__metadata__"):
            if entry["data_offsets"][0] > 0:
                entry["data_offsets"] = [offset + amount for offset in entry["data_offsets"]]

    return change


def void(value: Any) -> None:
    """For lambdas that are called for what they do."""


TRANSPOSED = edit_tensors(lambda t: t.update({"context_embedder.weight": t["context_embedder.weight"].T.contiguous()}))
CASES: dict[str, tuple[str, Callable[[Path], Any], str]] = {  # kind → component, what is done, what is said
    # the pipeline
    "no source": ("transformer", lambda src: shutil.rmtree(src), "src: .*pipeline does not exist"),
    "no pipeline": ("transformer", remove("model_index.json"), "model_index.json: no such file"),
    "index is no JSON": ("vae", edit_bytes("model_index.json", lambda data: data[:-3]), "index.json: damaged JSON"),
    "index is no object": ("vae", edit_bytes("model_index.json", lambda data: b"[]"), "found list, expected a JSON"),
    "unknown pipeline": ("vae", edit_json("model_index.json", _class_name="FluxPipeline"), "found _class_name 'Flux"),
    "component not in pipeline": (
        "vae", edit_json("model_index.json", vae=[None, None]), "components: found 'vae', but model_index.json has only"
    ),
    "unknown component": ("unet", lambda src: None, "components: found 'unet', expected some of transformer, vae"),
    "missing folder": ("vae", remove("vae"), "vae/config.json: no such file"),
    "missing tokenizer": ("text_encoder_3", remove("tokenizer_3"), "tokenizer_3: missing or empty, expected"),
    "empty tokenizer": ("text_encoder_2", empty_tokenizer, "tokenizer_2: missing or empty, expected"),
    # the configuration
    "no configuration": ("transformer", remove(CONFIG), "transformer/config.json: no such file"),
    "truncated configuration": ("transformer", edit_bytes(CONFIG, lambda data: data[:100]), "json: damaged JSON"),
    "binary configuration": ("transformer", edit_bytes(CONFIG, lambda data: b"\xff" + data), "json: damaged JSON"),
    "field twice": (
        "transformer", edit_bytes(CONFIG, lambda data: data.replace(b"{", b'{"num_layers": 3,', 1)),
        "transformer/config.json: damaged JSON .key 'num_layers' appears twice",
    ),
    "unknown network": (
        "transformer", edit_json(CONFIG, _class_name="UNet2DConditionModel"),
        "config.json: transformer config _class_name: found UNet2DConditionModel, expected 'SD3Transformer2DModel'",
    ),
    "missing field": ("transformer", edit_json(CONFIG, patch_size=None), "patch_size: found nothing, expected"),
    "text for a number": ("transformer", edit_json(CONFIG, num_layers="4"), "num_layers: found '4', expected"),
    "no layers": ("transformer", edit_json(CONFIG, num_layers=0), "num_layers: found 0, expected a positive"),
    "number for a list": (
        "transformer", edit_json(CONFIG, dual_attention_layers=2), "dual_attention_layers: found 2, expected a list"
    ),
    "unknown activation": (
        "text_encoder", edit_json("text_encoder/config.json", hidden_act="swish"),
        "text_encoder/config.json: text encoder config hidden_act: found 'swish', expected",
    ),
    "unknown feed-forward": (
        "text_encoder_3", edit_json("text_encoder_3/config.json", feed_forward_proj="relu"),
        "text_encoder_3/config.json: .*feed_forward_proj: found 'relu', expected 'gated-gelu'",
    ),
    "other autoencoder": (
        "vae", edit_json("vae/config.json", use_quant_conv=True),
        "vae/config.json: autoencoder config use_quant_conv: found True, expected False",
    ),
    "more layers than tensors": (
        "transformer", edit_json(CONFIG, num_layers=5),
        "transformer: tensor 'transformer_blocks.3.attn.to_add_out.bias': missing, expected shape .48,.",
    ),
    # which files
    "no weights": ("transformer", remove(WEIGHTS), "found neither diffusion_pytorch_model.safetensors nor"),
    "pickle only": ("transformer", pickle_only, "found diffusion_pytorch_model.bin, a pickle, which is not read"),
    "single and sharded": (
        "transformer", lambda src: void((src / INDEX).write_text("{}")), "found both .*, expected one of them"
    ),
    "missing shard": ("transformer", shard(remove(SECOND)), "00002-of-00002.safetensors: missing, but .* lists it"),
    "no map": ("transformer", shard(edit_json(INDEX, weight_map=[])), "index.json: found no weight_map"),
    "map of lists": (
        "transformer", shard(edit_map(lambda names: names.update({QUERY: [1]}))), "index.json: found no weight_map"
    ),
    "truncated index": ("transformer", shard(edit_bytes(INDEX, lambda data: data[:99])), "index.json: damaged JSON"),
    "shard lacks a tensor": (
        "transformer", shard(edit_tensors(lambda tensors: tensors.pop(min(tensors)), FIRST)),
        "tensor 'context_embedder.bias': missing from .*-00001-of-00002.safetensors, where .* puts it",
    ),
    "tensor in two shards": (
        "transformer", shard(copy_into_second_shard),
        "tensor 'context_embedder.bias': found in .*-00002-of-00002.safetensors, expected in .*-00001-of-00002",
    ),
    "shard truncated": ("transformer", shard(edit_bytes(FIRST, lambda data: data[:-8])), "-00001-.*: file truncated"),
    # damaged files
    "truncated file": ("transformer", edit_bytes(WEIGHTS, lambda data: data[:-4]), "tensor .*: file truncated"),
    "nearly empty file": ("transformer", edit_bytes(WEIGHTS, lambda data: data[:5]), "truncated or no safetensors"),
    "header longer than file": (
        "transformer", edit_bytes(WEIGHTS, lambda data: b"\xff" * 4 + data[4:]), "truncated or no safetensors file"
    ),
    "bytes too many": ("transformer", edit_bytes(WEIGHTS, lambda data: data + b"more"), "found .* bytes, expected"),
    "gap": ("transformer", edit_header(shift_offsets(4)), "tensor .*: begins at byte .*, expected"),
    "overlap": ("transformer", edit_header(shift_offsets(-4)), "tensor .*: begins at byte .*, expected"),
    "tensor twice": ("transformer", edit_bytes(WEIGHTS, twice), "damaged JSON .key 'proj_out.bias' appears twice"),
    "no offsets": ("transformer", edit_header(lambda h: h[BIAS].pop("data_offsets")), "at tensor 'proj_out.bias'"),
    "text as offsets": ("transformer", edit_header(lambda h: h[BIAS].update(data_offsets="ab")), "at tensor 'proj_out"),
    "shape larger than bytes": (
        "transformer", edit_header(lambda h: h[BIAS].update(shape=[65])), r"'proj_out.bias' .* hold shape \(65,\)"
    ),
    # tensors
    "missing tensor": ("transformer", edit_tensors(lambda t: t.pop(BIAS)), r"'proj_out.bias': missing, .* \(64,\)"),
    "missing table": ("transformer", edit_tensors(lambda t: t.pop("pos_embed.pos_embed")), "'pos_embed.pos_embed': m"),
    "extra tensor": (
        "transformer", edit_tensors(lambda t: t.update({"mask_token": torch.ones(3)})),
        r"tensor 'mask_token': found shape \(3,\), expected no such tensor",
    ),
    "renamed tensor": (
        "vae",
        edit_tensors(
            lambda t: t.update({"decoder.in.bias": t.pop("decoder.conv_in.bias")}),
            "vae/diffusion_pytorch_model.safetensors",
        ),
        r"tensor 'decoder.conv_in.bias': missing, expected shape \(16,\)",
    ),
    "swapped shape": (
        "transformer", TRANSPOSED, r"tensor 'context_embedder.weight': found shape \(96, 48\), expected \(48, 96\)"
    ),
    "another table": (
        "transformer", edit_json(CONFIG, pos_embed_max_size=20),
        r"tensor 'pos_embed.pos_embed': found shape \(1, 576, 48\), expected \(1, 400, 48\)",
    ),
    "another vocabulary": (
        "text_encoder", edit_json("text_encoder/config.json", vocab_size=515),
        r"token_embedding.weight': found shape \(514, 24\), expected \(515, 24\)",
    ),
    "NaN": ("transformer", edit_tensors(set_first(float("nan"))), f"'{QUERY}' .*: found 1 values that are NaN"),
    "infinity": ("transformer", edit_tensors(set_first(float("inf"))), f"'{QUERY}' .*: found 1 values that are"),
    "NaN in bfloat16": (
        "transformer", edit_tensors(set_first(float("nan"), torch.bfloat16)), f"'{QUERY}' .*: found 1 values that"
    ),
    "infinity in float16": (
        "transformer", edit_tensors(set_first(float("-inf"), torch.float16)), f"'{QUERY}' .*: found 1 values that"
    ),
    "float64": ("transformer", edit_tensors(cast(torch.float64)), f"'{QUERY}' .*: found dtype F64, expected"),
    "int8": ("transformer", edit_tensors(cast(torch.int8)), f"'{QUERY}' .*: found dtype I8, expected"),
    "fp8": ("transformer", edit_tensors(cast(torch.float8_e4m3fn)), f"'{QUERY}' .*: found dtype F8_E4M3, exp"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_broken_source(case: str, call: Caller, pipeline: Path, tmp_path: Path, converted_pipeline: Path) -> None:
    """Into a new folder, whose parents are new too, and into one that holds a whole conversion."""
    component, damage, message = CASES[case]
    damage(pipeline)
    call.fails(["--src", pipeline, "--dst", tmp_path / "a" / "b", "--components", component], message)
    converted = Path(shutil.copytree(converted_pipeline, tmp_path / "converted"))
    call.fails(["--src", pipeline, "--dst", converted, "--components", component], message)


def test_broken_single_file(call: Caller, pipeline: Path, tmp_path: Path) -> None:
    call.fails(["--src", pipeline / CONFIG, "--dst", tmp_path / "dst"], "config.json: truncated or no safetensors file")
    call.fails(
        ["--src", pipeline / WEIGHTS, "--dst", tmp_path / "dst"], "x_embedder.proj.weight': missing, expected one"
    )
    arguments = ["--src", pipeline / WEIGHTS, "--dst", tmp_path / "dst", "--components", "transformer,vae"]
    call.fails(arguments, "components: found transformer, vae; of a single file: transformer")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_permissions(call: Caller, pipeline: Path, tmp_path: Path) -> None:
    (pipeline / WEIGHTS).chmod(0)
    with pytest.raises(SystemExit) as stop:
        call.tool.main(["--src", str(pipeline), "--dst", str(tmp_path / "dst"), "--components", "transformer"])
    (line,) = messages(call.capfd.readouterr().err)
    assert (stop.value.code, line) == (1, f"error: {pipeline / WEIGHTS}: Permission denied")
    (tmp_path / "locked").mkdir(mode=0o500)
    dst = tmp_path / "locked" / "dst"
    call.fails(["--src", pipeline, "--dst", dst, "--components", "vae"], f"{dst}: Permission denied")


# ---- destinations


def test_destination_that_cannot_be(call: Caller, pipeline: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    for dst, message in {
        file: "dst: .*file is a file, expected a folder",
        file / "below" / "it": "file/below/it: Not a directory",
        tmp_path / "foreign": "dst: .*foreign is neither empty nor a converted folder; choose another",
        pipeline: "dst: .*pipeline is neither empty nor a converted folder; choose another",
        pipeline / "vae": "dst: .*vae is neither empty nor a converted folder; choose another",
        pipeline.parent: "dst: .*source is neither empty nor a converted folder; choose another",
        Path("/proc/nope"): "/proc/nope: No such file or directory",  # the same for root
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        call.fails(["--src", pipeline, "--dst", dst, "--components", "text_encoder"], message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "manifest.json: damaged JSON"),
        ("[1]", "manifest.json: found list, expected a JSON object"),
        ('{"format": "fopd_jax/converted/9"}', "manifest.json: found format 'fopd_jax/converted/9', expected"),
        ('{"format": "fopd_jax/converted/1", "preset": "x"}', "manifest.json: damaged .*; convert into a new folder"),
    ],
)
def test_damaged_manifest(content: str, message: str, call: Caller, pipeline: Path, converted: Path) -> None:
    (converted / "manifest.json").write_text(content)
    call.fails(["--src", pipeline, "--dst", converted, "--components", "text_encoder"], message)
    call.fails(["--reverse", "--src", converted, "--dst", converted.parent / "back"], message)


@pytest.mark.parametrize("there", [False, True])
def test_too_little_space(
    there: bool, call: Caller, pipeline: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    dst = converted if there else tmp_path / "dst"
    arguments = ["--src", pipeline, "--dst", dst, "--dtype", "bfloat16", "--components", "transformer"]
    call.fails(arguments, r"dst: no space left in .*, 0.00 GiB needed, 0.00 GiB free")
    call.fails(["--reverse", "--src", converted, "--dst", tmp_path / "back"], "dst: no space left in")


@pytest.mark.parametrize("there", [False, True])
def test_space_that_runs_out(
    there: bool, call: Caller, pipeline: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the second component is written."""
    save = converter.save_params

    def save_some(folder: Path, name: str, params: Any) -> None:
        save(folder, name, params)
        if name == "text_encoder_2":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / name / "d" / "0"))

    monkeypatch.setattr(converter, "save_params", save_some)
    dst = converted if there else tmp_path / "dst"
    arguments = ["--src", pipeline, "--dst", dst, "--components", "text_encoder,text_encoder_2", "--dtype", "bfloat16"]
    call.fails(arguments, f"{dst}: no space left$")


# ---- the way back


def test_way_back_that_cannot_be(call: Caller, pipeline: Path, converted: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    call.fails(["--reverse", "--src", pipeline, "--dst", back], "pipeline: no manifest.json; expected a folder that")
    call.fails(["--reverse", "--src", tmp_path / "no", "--dst", back], "no: no manifest.json; expected a folder that")
    call.fails(["--reverse", "--src", converted, "--dst", converted], "dst: .*converted exists; choose another")
    call.fails(["--reverse", "--src", converted, "--dst", pipeline], "dst: .*pipeline exists; choose another")
    call.fails(["--reverse", "--src", converted, "--dst", pipeline / CONFIG / "x"], "config.json/x: Not a directory")
    path = converted / TABLE
    path.write_bytes(path.read_bytes()[:-1])
    call.fails(["--reverse", "--src", converted, "--dst", back], f"{TABLE}: found .* bytes; convert transformer again")
    path.unlink()
    call.fails(["--reverse", "--src", converted, "--dst", back], f"{TABLE}: found nothing, expected .* bytes")


def test_way_back_without_transformer(call: Caller, pipeline: Path, tmp_path: Path) -> None:
    arguments = ["--src", pipeline, "--dst", tmp_path / "dst", "--components", "text_encoder"]
    call.says(arguments, f"converted text_encoder into {tmp_path / 'dst'}")
    arguments = ["--reverse", "--src", tmp_path / "dst", "--dst", tmp_path / "back"]
    call.fails(arguments, "src: .*dst holds no transformer, only text_encoder")


def test_checkpoint_that_is_damaged_at_its_full_length(call: Caller, converted: Path, tmp_path: Path) -> None:
    for path in (converted / "transformer").rglob("manifest.ocdbt"):
        path.write_bytes(bytes(path.stat().st_size))
    arguments = ["--reverse", "--src", converted, "--dst", tmp_path / "back"]
    call.fails(arguments, "transformer: damaged, or of another shape .*; convert transformer again")


# ---- all is well


def test_there_and_back(call: Caller, pipeline: Path, tmp_path: Path) -> None:
    dst, back = tmp_path / "dst", tmp_path / "back"
    components = ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
    call.says(["--src", pipeline, "--dst", dst], f"converted {', '.join(components)} into {dst}")
    assert {each.dtype for each in read_manifest(dst).components.values()} == {"bfloat16", "float32"}
    before = snapshot(dst)
    call.says(["--src", pipeline, "--dst", dst], f"{dst}: already converted, unchanged")
    assert snapshot(dst) == before
    call.says(["--reverse", "--src", dst, "--dst", back], f"wrote the transformer of {dst} to {back}")
    written = safetensors.numpy.load_file(back / "diffusion_pytorch_model.safetensors")
    tensors = safetensors.numpy.load_file(pipeline / WEIGHTS)
    assert written.keys() == tensors.keys()
    np.testing.assert_array_equal(written[QUERY], tensors[QUERY].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("arguments", [[], ["--src", "x"], ["--src", "x", "--dst", "y", "--dtype", "float16"]])
def test_usage(arguments: list[str], tool: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capfd.readouterr().err


def test_interrupt(call: Caller, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converter, "save_params", interrupt)
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as stop:
        call.tool.main(["--src", str(pipeline), "--dst", str(tmp_path / "dst"), "--components", "text_encoder"])
    assert stop.value.code == 130
    dst = tmp_path / "dst"
    assert messages(call.capfd.readouterr().err) == [f"error: interrupted; nothing half-written is left in {dst}"]
    assert snapshot(tmp_path) == before


# ---- as a real program


def start(before: str, arguments: Sequence[str | Path]) -> subprocess.Popen[str]:
    """The tool in a process of its own, which first runs a few lines of Python."""
    program = f"import runpy\n{before}\nrunpy.run_path({str(TOOL)!r}, run_name='__main__')"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_program_on_a_broken_source(pipeline: Path, tmp_path: Path) -> None:
    edit_bytes(WEIGHTS, lambda data: data[:-4])(pipeline)
    before = snapshot(tmp_path)
    process = start("", ["--src", pipeline, "--dst", tmp_path / "dst", "--components", "transformer"])
    output, errors = process.communicate()
    assert (process.returncode, output) == (1, "")
    assert re.fullmatch(r"error: .*tensor '.*' in .*: file truncated, \d+ bytes, expected at least \d+\n", errors)
    assert snapshot(tmp_path) == before


def test_program_that_may_not_write_large_files(pipeline: Path, tmp_path: Path) -> None:
    """A real failure of the system, inside the library that writes: its own tracebacks are kept from the user."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    before = snapshot(tmp_path)
    process = start(limit, ["--src", pipeline, "--dst", tmp_path / "dst", "--components", "transformer,text_encoder"])
    output, errors = process.communicate()
    assert (process.returncode, output) == (1, "")
    assert messages(errors) == [f"error: {tmp_path / 'dst'}: File too large"]
    assert snapshot(tmp_path) == before


def test_program_that_is_terminated(pipeline: Path, tmp_path: Path) -> None:
    """A scheduler's stop, while the library writes."""
    hang = """
import time
from fopd_jax.interop.sd3 import convert
def save_and_hang(folder, name, params):
    (folder / name).mkdir()
    print("writing", flush=True)
    time.sleep(600)
convert.save_params = save_and_hang
"""
    before = snapshot(tmp_path)
    process = start(hang, ["--src", pipeline, "--dst", tmp_path / "a" / "dst", "--components", "text_encoder"])
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert messages(errors) == [f"error: interrupted; nothing half-written is left in {tmp_path / 'a' / 'dst'}"]
    assert snapshot(tmp_path) == before
