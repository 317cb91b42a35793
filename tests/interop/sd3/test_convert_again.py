"""What a conversion leaves alone, what it converts again, and what is left when it fails."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from fopd_jax.interop.files.converted import COMPONENTS, CUSTOM, TABLE_FILE, read_manifest
from fopd_jax.interop.sd3.convert import convert
from tests.folders import load, snapshot
from tests.interop.sd3.conversion import STEMS, run

ROOT = Path(__file__).parents[3]


def change(pipeline: Path, name: str, tensor: str, value: float) -> None:
    """Set the first value of a tensor."""
    path = pipeline / name / f"{STEMS[name]}.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[tensor].view(-1)[0] = value
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


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
