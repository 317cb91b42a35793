"""The command line: what it says when all is well; one clear line and nothing left behind for destinations, damaged
conversions and stops. What can be wrong with a source stands in `test_convert_sd35_sources.py`."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fopd_jax.interop.files.converted import read_manifest
from fopd_jax.interop.sd3 import convert as converter
from tests.folders import snapshot
from tests.tools.caller import Caller, messages
from tests.tools.damage import CONFIG, QUERY, WEIGHTS, edit_bytes

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_sd35_weights.py"
TABLE = "transformer.pos_embed.safetensors"


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


@pytest.mark.parametrize("more", [[], ["--reverse"]])
def test_paths_with_a_scheme_are_refused(more: list[str], call: Caller, tmp_path: Path) -> None:
    for src, dst, field in (("hf://a/b", "x", "src"), ("s3://a/b", "x", "src"), (str(tmp_path), "gs://a/b", "dst")):
        call.fails([*more, "--src", src, "--dst", dst], f"{field}: found '..://a/b', expected a path on this machine")


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
    call.fails(arguments, f"{dst}: No space left on device$", status=1)


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
def test_usage(arguments: list[str], call: Caller) -> None:
    with pytest.raises(SystemExit) as stop:
        call.tool.main(arguments)
    assert stop.value.code == 2
    error = call.capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.endswith("(--help lists what there is)\n")
    assert error.count("\n") == 1


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
    assert (process.returncode, output) == (2, "")
    assert re.fullmatch(r"error: .*tensor '.*' in .*: file truncated, \d+ bytes, expected at least \d+\n", errors)
    assert snapshot(tmp_path) == before


def test_program_that_may_not_write_large_files(pipeline: Path, tmp_path: Path) -> None:
    """A real failure of the system, inside the library that writes: its own tracebacks are kept from the user."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
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
