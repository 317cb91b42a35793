"""The tool from the outside: every direction, what each source needs to be told, and one line for what is wrong."""

import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter
from fopd_jax.interop.files.converted import Converted, Manifest, write_manifest
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from fopd_jax.interop.lora.cards import read_card
from fopd_jax.interop.lora.modules import places
from fopd_jax.interop.lora.peft import write_peft
from fopd_jax.interop.sd3.diffusers import config_from_diffusers
from fopd_jax.models.mmdit import PRESETS, MMDiTConfig
from tests.adapters.test_card import FULL

TOOL = Path(__file__).parents[2] / "tools" / "convert_adapter.py"
MINIATURE = {  # the transformer of PRESETS["miniature"], as diffusers describes it
    "_class_name": "SD3Transformer2DModel", "sample_size": 24, "patch_size": 4, "in_channels": 3, "out_channels": 3,
    "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 32,
    "caption_projection_dim": 128, "pooled_projection_dim": 24, "pos_embed_max_size": 6,
    "dual_attention_layers": [0, 1], "qk_norm": "rms_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/convert_adapter.py")


def make_adapter(config: MMDiTConfig = PRESETS["miniature"]) -> Adapter:
    random = np.random.default_rng(0)
    weights: dict[str, dict[str, dict[str, dict[str, np.ndarray]]]] = {}
    for place in places(config).values():
        stack, attention, layer = place.path
        leaves = {
            leaf: random.standard_normal(shape, dtype=np.float32) for leaf, shape in place.factor_shapes(2).items()
        }
        weights.setdefault(stack, {}).setdefault(attention, {})[layer] = leaves
    return Adapter(weights, 1.5)


def run(tool: ModuleType, *arguments: object) -> str:
    """The one line that the tool exits with."""
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as said:
        tool.main([str(each) for each in arguments])
    assert caught.value.code == 2
    (line,) = said.getvalue().splitlines()
    return line


@pytest.mark.parametrize("model", ["preset", "transformer", "."])
@pytest.mark.parametrize("layout", ["peft", "diffusers", "comfyui", "sd_scripts"])
def test_there_and_back(tool: ModuleType, layout: str, model: str, tmp_path: Path) -> None:
    ours, theirs, back = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", tmp_path / "back.safetensors"
    save_adapter(ours, make_adapter(), {"preset": "miniature"})
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    (tmp_path / "pipeline" / "transformer" / "config.json").write_text(json.dumps(MINIATURE))
    network = ["--preset", "miniature"] if model == "preset" else ["--model", str(tmp_path / "pipeline" / model)]
    tool.main(["--src", str(ours), "--dst", str(theirs), "--to", layout])
    tool.main(["--src", str(theirs), "--dst", str(back), "--to", "fopd_jax", *network])
    found, metadata = load_adapter(back)
    assert metadata["preset"] == "miniature"
    assert found.scale == 1.5
    jax.tree.map(np.testing.assert_array_equal, found.weights, make_adapter().weights)
    assert ours.read_bytes() == back.read_bytes()


@pytest.mark.parametrize("layout", ["peft", "diffusers", "comfyui", "sd_scripts", "fopd_jax"])
def test_what_an_adapter_says_of_itself_goes_with_it(tool: ModuleType, layout: str, tmp_path: Path) -> None:
    ours, theirs, back = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", tmp_path / "back.safetensors"
    save_adapter(ours, make_adapter(), {"preset": "miniature"}, FULL)
    tool.main(["--src", str(ours), "--dst", str(theirs), "--to", layout])
    assert read_card(theirs) == FULL
    tool.main(["--src", str(theirs), "--dst", str(back), "--to", "fopd_jax", "--preset", "miniature"])
    assert ours.read_bytes() == back.read_bytes()


def test_what_a_file_does_not_say_can_be_said_for_it(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A foreign folder becomes a teacher that OPD knows how to ask."""
    theirs, said, base = tmp_path / "theirs", tmp_path / "said.safetensors", tmp_path / "base.safetensors"
    write_peft(theirs, make_adapter(), PRESETS["miniature"])
    tool.main(["--src", str(theirs), "--describe"])
    nothing = f"{theirs}: says nothing of itself; a config has to say its guidance (tasks.NAME.guidance)\n"
    assert capsys.readouterr().out == nothing
    base.write_bytes(b"weights")
    to = ["--src", theirs, "--dst", said, "--to", "fopd_jax", "--preset", "miniature"]
    tool.main([*map(str, to), "--guidance=4.5", f"--base={base}"])
    digest = hashlib.sha256(b"weights").hexdigest()
    assert read_card(said) == AdapterCard(guidance=4.5, preset="miniature", base=digest)
    capsys.readouterr()
    tool.main(["--src", str(said), "--describe"])
    assert capsys.readouterr().out == f"guidance  4.5\npreset    miniature\nbase      {digest}\n"
    corrected = tmp_path / "corrected.safetensors"
    tool.main(["--src", str(said), "--dst", str(corrected), "--to", "fopd_jax", "--guidance=1"])
    assert read_card(corrected) == AdapterCard(guidance=1.0, preset="miniature", base=digest)
    assert run(tool, *to, "--guidance=nan") == "error: --guidance: found nan, expected a number from 0 to 100"
    assert run(tool, *to, f"--base={tmp_path}").startswith(f"error: {tmp_path}: no manifest.json")
    assert run(tool, "--src", theirs).startswith("error: expected --dst and --to, or --describe")
    assert run(tool, "--src", tmp_path / "x", "--describe") == f"error: {tmp_path / 'x'}: no such file or folder"


def test_all_of_a_card_is_described(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(tmp_path / "ours", make_adapter(), {"preset": "miniature"}, FULL)
    tool.main(["--src", str(tmp_path / "ours"), "--describe"])
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in rows] == list(FULL.fields())
    shown = {"rewards": "ocr 1, pickscore 0.5", "guidance": "1", "resolution": "512, 768", "scored_at": "380"}
    assert dict(rows).items() >= shown.items()


def test_networks_that_are_not_known(tool: ModuleType, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs"
    save_adapter(ours, make_adapter(), {"preset": "miniature"})
    message = run(tool, "--src", ours, "--dst", theirs, "--to", "peft", "--preset", "sd35_medium")
    assert message == f"error: {ours}: its preset 'miniature' is another network than sd35_medium"
    tool.main(["--src", str(ours), "--dst", str(theirs), "--to", "peft", "--preset", "miniature"])
    message = run(tool, "--src", theirs, "--dst", tmp_path / "x", "--to", "comfyui")
    assert message == f"error: {theirs}: does not tell its network; give --preset or --model"
    save_adapter(ours, make_adapter(), {"preset": "gigantic"})
    assert f"{ours}: found preset 'gigantic', expected one of" in run(
        tool, "--src", ours, "--dst", theirs, "--to", "peft"
    )


def test_models_that_are_not_understood(tool: ModuleType, tmp_path: Path) -> None:
    arguments = ["--src", tmp_path / "theirs", "--dst", tmp_path / "x", "--to", "fopd_jax", "--model", tmp_path]
    assert "found neither manifest.json nor transformer/config.json nor config.json" in run(tool, *arguments)
    file = tmp_path / "config.json"
    for text, message in (("{", "Expecting property name"), ("[]", "found JSON of type list, expected an object")):
        file.write_text(text)
        assert run(tool, *arguments).startswith(f"error: {file}: {message}")
    file.write_text(json.dumps(MINIATURE | {"_class_name": "UNet2DConditionModel"}))
    assert run(tool, *arguments).startswith(
        f"error: {file}: transformer config _class_name: found UNet2DConditionModel"
    )


@pytest.fixture(scope="module")
def tiny(load_script: Callable[[str], ModuleType]) -> dict[str, Any]:
    """The transformer of `tools/random_pipeline.py --size tiny`, as diffusers describes it; it is no preset."""
    return json.loads(json.dumps(load_script("tools/random_pipeline.py").SIZES["tiny"]["transformer"]))


@pytest.mark.parametrize("model", ["converted", "pipeline"])
@pytest.mark.parametrize("layout", ["peft", "diffusers", "comfyui", "sd_scripts", "fopd_jax"])
def test_a_student_of_the_tiny_pipeline(
    tool: ModuleType, tiny: dict[str, Any], layout: str, model: str, tmp_path: Path
) -> None:
    """In every layout and back, its network told by what it was trained on: a converted folder, or its source."""
    names = ("ours.safetensors", "theirs.safetensors", "back.safetensors", model)
    ours, theirs, back, folder = (tmp_path / name for name in names)
    save_adapter(ours, make_adapter(config_from_diffusers(tiny)), {"preset": "custom"})
    (folder / "transformer").mkdir(parents=True)
    if model == "converted":
        manifest = Manifest("custom", {"transformer": Converted(tiny, "bfloat16", 1, 1, {}, {})})
        write_manifest(folder, manifest)
    else:
        (folder / "transformer" / "config.json").write_text(json.dumps(tiny))
    for src, dst, to in ((ours, theirs, layout), (theirs, back, "fopd_jax")):
        tool.main([f"--src={src}", f"--dst={dst}", f"--to={to}", f"--model={folder}"])
    assert back.read_bytes() == ours.read_bytes()
    said = run(tool, "--src", ours, "--dst", theirs, "--to", layout)
    assert said == f"error: {ours}: is for a network that is no preset; give --model, the folder of its base"
    said = run(tool, "--src", ours, "--dst", theirs, "--to", layout, "--preset", "miniature")
    assert said == f"error: {ours}: its preset 'custom' is another network than miniature"


def test_a_network_that_is_another_than_the_files(tool: ModuleType, tiny: dict[str, Any], tmp_path: Path) -> None:
    save_adapter(tmp_path / "ours.safetensors", make_adapter(config_from_diffusers(tiny)), {"preset": "custom"})
    for change, message in (
        ({"num_layers": 5}, r"adapter leaf 'blocks/attn/\w+/a': found \(1, 48, 2\), expected \(2, 48, 2\)"),
        ({"dual_attention_layers": []}, r"adapter leaf 'blocks/attn/\w+/a': found \(1, 48, 2\), expected \(3, 48, 2\)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(tiny | change))
        arguments = ["--model", tmp_path, "--dst", tmp_path / "a.safetensors", "--to", "comfyui"]
        said = run(tool, "--src", tmp_path / "ours.safetensors", *arguments)
        assert re.match(rf"error: {tmp_path / 'ours.safetensors'}: {message}", said), said
    manifest = Manifest("custom", {"vae": Converted({}, "bfloat16", 1, 1, {}, {})})
    (tmp_path / "vae").mkdir()
    write_manifest(tmp_path / "vae", manifest)
    said = run(tool, "--src", tmp_path / "ours.safetensors", "--model", tmp_path / "vae", *arguments[2:])
    assert said == f"error: {tmp_path / 'vae'}: holds no transformer, only vae"


def test_files_that_are_refused(tool: ModuleType, tmp_path: Path) -> None:
    arguments = ["--dst", tmp_path / "out", "--preset", "miniature"]
    absent = run(tool, "--src", tmp_path / "absent", "--to", "peft", *arguments)
    assert absent.startswith(f"error: {tmp_path / 'absent'}: no such file or folder; docs/weights-and-prompts.md says")
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    damaged = run(tool, "--src", tmp_path / "damaged.safetensors", "--to", "peft", *arguments)
    assert damaged.startswith(f"error: {tmp_path / 'damaged.safetensors'}: damaged or no safetensors file")
    save_adapter(tmp_path / "ours.safetensors", make_adapter(), {"preset": "miniature"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    taken = run(tool, "--src", tmp_path / "ours.safetensors", "--to", "peft", *arguments)
    assert taken == f"error: {tmp_path / 'out'}: exists already, expected a new or an empty folder"
    beneath = ["--dst", tmp_path / "out" / "precious" / "file.safetensors"]
    assert "precious" in run(tool, "--src", tmp_path / "ours.safetensors", "--to", "comfyui", *beneath)


def test_exit_status(tmp_path: Path) -> None:
    for arguments, status in ((["--to", "peft"], 2), (["--to", "somewhere"], 2)):
        command = [sys.executable, str(TOOL), "--src", "absent", "--dst", str(tmp_path / "x"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=TOOL.parents[1])
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        assert "error: " in done.stderr.splitlines()[-1]
        assert not list(tmp_path.iterdir())


def test_the_source_is_never_the_destination(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, link = tmp_path / "ours.safetensors", tmp_path / "link.safetensors"
    save_adapter(ours, make_adapter(), {"preset": "miniature"})
    link.symlink_to(ours)
    held = tmp_path / "held"
    tool.main(["--src", str(ours), "--dst", str(held), "--to", "diffusers"])
    file = held / "pytorch_lora_weights.safetensors"
    monkeypatch.chdir(held)
    before = ours.read_bytes(), file.read_bytes()
    for src, dst in (
        (ours, ours), (ours, link), (link, ours), (ours, "../ours.safetensors"), ("../held", held), (file, held),
        (held, file), (file, "../held/pytorch_lora_weights.safetensors"),
    ):  # fmt: skip
        said = run(tool, "--src", src, "--dst", dst, "--to", "diffusers", "--preset", "miniature")
        assert said == f"error: dst: {dst} is the source itself; choose another"
    assert (ours.read_bytes(), file.read_bytes()) == before
    tool.main(["--src", str(ours), "--dst", str(tmp_path), "--to", "diffusers"])  # beside it is another file


@pytest.mark.parametrize("field", ["src", "dst", "model"])
@pytest.mark.parametrize("scheme", ["gs", "s3", "hf"])
def test_paths_with_a_scheme_are_refused(tool: ModuleType, scheme: str, field: str, tmp_path: Path) -> None:
    there = f"{scheme}://bucket/x"
    paths = {"src": tmp_path / "a", "dst": tmp_path / "b", "model": tmp_path / "c"} | {field: there}
    said = run(tool, *(each for name, path in paths.items() for each in (f"--{name}", path)), "--to", "peft")
    assert said == f"error: {field}: found {there!r}, expected a path on this machine, written out"
    assert not list(tmp_path.iterdir())
