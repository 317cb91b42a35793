"""A run goes on with the files it began with: other content under the same name is refused by field and file."""

import json
import os
from pathlib import Path

import pytest

from fopd_jax.config.parse import resolve
from fopd_jax.config.schema import OPD, Anchor, FlowMatching, Model, Pairs, RewardConfig, RoutedTask
from fopd_jax.files import write_json
from fopd_jax.interop.files import converted
from fopd_jax.running import inputs
from fopd_jax.stages.files import input_files


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A base, a PEFT folder, prompts and captioned images."""
    folder = tmp_path / "files"
    for name in ("teacher", "images"):
        (folder / name).mkdir(parents=True)
    (folder / "base.safetensors").write_bytes(b"base")
    (folder / "teacher" / "adapter_model.safetensors").write_bytes(b"factors")
    (folder / "teacher" / "adapter_config.json").write_text('{"lora_alpha": 1}')
    (folder / "prompts.txt").write_text("a cat\n")
    (folder / "images" / "cat.png").write_bytes(b"pixels")
    (folder / "images" / "cat.txt").write_text("a cat")
    return {
        "model.path": folder / "base.safetensors", "tasks.x.teacher": folder / "teacher",
        "tasks.x.prompts": folder / "prompts.txt", "tasks.x.images": folder / "images",
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, files: dict[str, Path]) -> Path:
    """A workdir that began with them."""
    (tmp_path / "run").mkdir()
    inputs.keep(tmp_path / "run", inputs.check(tmp_path / "run", files))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("model.path", ""), ("tasks.x.teacher", "adapter_model.safetensors"), ("tasks.x.prompts", ""),
        ("tasks.x.teacher", "adapter_config.json"), ("tasks.x.images", "cat.txt"), ("tasks.x.images", "cat.png"),
        ("tasks.x.images", "dog.png"),
    ],
)  # fmt: skip
def test_other_content_is_refused_by_field_and_file(run: Path, files: dict[str, Path], field: str, name: str):
    before = (run / "inputs.json").read_bytes()
    (files[field] / name).write_bytes(b"other")
    with pytest.raises(ValueError, match="holds other content than the run in") as error:
        inputs.check(run, files)
    message, there = str(error.value), json.loads(before)[field]["sha256"][:12]
    assert message.startswith(f"{field}: {files[field]} holds ")
    assert f"expected {there}…" in message
    assert message.endswith("put back what was there, or choose another --workdir")
    assert "\n" not in message
    assert message.count("holds other content") == 1
    assert (run / "inputs.json").read_bytes() == before
    # Until anything is saved, files may be corrected; what is noted then is what counts.
    inputs.keep(run, inputs.check(run, files, begun=False))
    inputs.check(run, files)


@pytest.mark.parametrize("noted", [5, None, [], {"path": "x"}, {"path": "x", "sha256": 5, "stat": ""}])
def test_a_damaged_note_is_refused_by_field(run: Path, files: dict[str, Path], noted: object):
    write_json(run / "inputs.json", {"model.path": noted})
    with pytest.raises(ValueError, match=r"inputs\.json: model\.path: found .*, expected texts path, sha256 and stat"):
        inputs.check(run, files)
    (run / "inputs.json").write_text("{")
    with pytest.raises(ValueError, match=r"inputs\.json: damaged JSON .*; put back what was there, or remove it to go"):
        inputs.check(run, files)


def test_what_stands_in_the_place_of_the_notes_is_no_leave_to_go_on(run: Path, files: dict[str, Path]):
    (run / "inputs.json").unlink()
    os.mkfifo(run / "inputs.json")
    with pytest.raises(OSError, match="a pipe, a socket or a device"):
        inputs.check(run, files)
    (run / "inputs.json").unlink()
    (run / "inputs.json").symlink_to("nothing")
    with pytest.raises(ValueError, match=r"inputs\.json: no such file"):
        inputs.check(run, files)


def test_every_field_that_changed_is_named(run: Path, files: dict[str, Path]):
    for field in ("model.path", "tasks.x.prompts"):
        files[field].write_bytes(b"other")
    with pytest.raises(ValueError, match=r"^model\.path: .*; tasks\.x\.prompts: "):
        inputs.check(run, files)


def test_the_same_content_is_the_same_wherever_it_is_and_whatever_its_time(run: Path, files: dict[str, Path]):
    files["model.path"].rename(files["model.path"].with_name("moved.safetensors"))
    files["model.path"] = files["model.path"].with_name("moved.safetensors")
    os.utime(files["tasks.x.prompts"], (1, 1))
    (files["tasks.x.teacher"] / "README.md").write_text("what it is")
    inputs.check(run, files)
    files["model.path"].unlink()  # whoever reads it says so
    assert "model.path" not in inputs.check(run, files)


def test_what_has_not_changed_is_not_read_again(run: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    monkeypatch.setattr(inputs, "hash_file", lambda path: read.append(path) or "0" * 64)
    inputs.check(run, files)
    assert read == []
    os.utime(files["model.path"], (1, 1))
    with pytest.raises(ValueError, match=r"^model\.path: "):
        inputs.check(run, files)
    assert read == [files["model.path"]]


def test_two_fields_of_one_file_read_it_once(tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    monkeypatch.setattr(inputs, "hash_file", lambda path: read.append(path) or "0" * 64)
    base = files["model.path"]
    found = inputs.check(tmp_path, {"model.path": base, "anchor.adapter": base})
    assert (read, found["model.path"]) == ([base], found["anchor.adapter"])


def test_of_a_converted_folder_the_sources_hashes_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inputs, "hash_file", lambda path: pytest.fail(f"read {path}"))
    folder, parts = tmp_path / "base", {"vae": converted.Converted({}, "float32", 1, 1, {"vae/a": "12ab"}, {"x": 9})}
    folder.mkdir()
    converted.write_manifest(folder, converted.Manifest("sd35_medium", parts))
    inputs.keep(tmp_path, inputs.check(tmp_path, {"model.path": folder}))
    again = {"vae": converted.Converted({}, "float32", 1, 1, {"vae/a": "12ab"}, {"y": 8})}  # files as orbax names them
    converted.write_manifest(folder, converted.Manifest("sd35_medium", again))
    inputs.check(tmp_path, {"model.path": folder})
    other = {"vae": converted.Converted({}, "float32", 1, 1, {"vae/a": "34cd"}, {"x": 9})}
    converted.write_manifest(folder, converted.Manifest("sd35_medium", other))
    with pytest.raises(ValueError, match=r"^model\.path: .*base holds other content"):
        inputs.check(tmp_path, {"model.path": folder})


def test_a_workdir_of_an_earlier_version_takes_what_it_finds(tmp_path: Path, files: dict[str, Path]):
    inputs.keep(tmp_path, inputs.check(tmp_path, files))
    assert json.loads((tmp_path / "inputs.json").read_text()).keys() == files.keys()


def test_process_0_alone_looks_and_writes(run: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    waited: list[str] = []
    files["model.path"].write_bytes(b"other")
    monkeypatch.setattr(inputs, "is_main", lambda: False)
    monkeypatch.setattr(inputs, "barrier", waited.append)
    inputs.keep(run, inputs.check(run, files))
    assert waited == ["the input files are checked"]


# ---- which files


def test_the_files_of_a_run_are_those_its_fields_name(tmp_path: Path):
    task = RoutedTask("teachers/x", "data/x.txt", "data/test.txt")
    config = OPD("x", model=Model(path="weights/sd35m"), tasks={"x": task}, anchor=Anchor(adapter="teachers/anchor"))
    assert {field: str(path) for field, path in input_files(resolve(config)).items()} == {
        "model.path": "weights/sd35m", "tasks.x.teacher": "teachers/x", "anchor.adapter": "teachers/anchor",
        "tasks.x.prompts": "data/x.txt", "tasks.x.test": "data/test.txt",
    }  # fmt: skip
    config.model = Model("miniature", f"{tmp_path}/base.safetensors")  # its prompts are its own, and their tasks'
    assert input_files(resolve(config)).keys() >= {"tasks.x.prompts", "tasks.x.test"}
    config.tasks = {"text": task}
    config.anchor.adapter = "packaged:teacher_quality.safetensors"
    found = input_files(resolve(config))
    assert found.keys() == {"model.path", "tasks.text.teacher", "anchor.adapter"}
    assert found["anchor.adapter"].is_file()
    config.model.path = str(tmp_path)  # no conversion wrote it: it may hold anything
    assert "model.path" not in input_files(resolve(config))
    write_json(tmp_path / "manifest.json", {})
    assert "model.path" in input_files(resolve(config))
    pairs = FlowMatching("x", tasks={"x": Pairs(images="data/x", test="data/test.txt")})
    assert {*input_files(resolve(pairs))} == {"tasks.x.images", "tasks.x.test"}


def test_the_files_of_rewards_are_among_them(tmp_path: Path):
    rewards = {
        "pickscore": RewardConfig(weights="p"), "looks": RewardConfig("aesthetic", "l", options={"head": "h"}),
        "geneval": RewardConfig(weights="g", options={"clip": "c", "colours": "clip"}), "ocr": RewardConfig(),
        "deqa": RewardConfig(options={"template": f"{tmp_path}/asked.txt"}), "mine": RewardConfig("a:b"),
    }  # fmt: skip
    files = input_files(resolve(OPD("x", rewards=rewards)))
    assert {field: str(path) for field, path in files.items()} == {
        "rewards.pickscore.weights": "p", "rewards.looks.weights": "l", "rewards.looks.options.head": "h",
        "rewards.geneval.weights": "g", "rewards.geneval.options.clip": "c",
        "rewards.deqa.options.template": f"{tmp_path}/asked.txt",
    }  # fmt: skip
    (tmp_path / "asked.txt").write_text("How good is it?")
    inputs.keep(tmp_path, inputs.check(tmp_path, files))  # of files that are elsewhere, such as a server's, none
    (tmp_path / "asked.txt").write_text("How bad is it?")
    with pytest.raises(ValueError, match=r"^rewards\.deqa\.options\.template: .*asked\.txt holds other content"):
        inputs.check(tmp_path, files)


def test_a_source_counts_by_the_file_that_it_reads(tmp_path: Path):
    """A generated set has none; rows of a file by a column are the file's; a built set changes with its shards."""
    built = tmp_path / "sets"
    built.mkdir()
    (built / "dataset_info.json").write_text("{}")
    (built / "prompt_sets-train.array_record-00000-of-00001").write_bytes(b"a")
    tasks = {"x": RoutedTask("t", "a.jsonl#task=x", "ocr:test"), "y": RoutedTask("t", str(built), "b.txt")}
    files = {
        field: path for field, path in input_files(resolve(OPD("x", tasks=tasks))).items() if "teacher" not in field
    }
    assert files == {"tasks.x.prompts": Path("a.jsonl"), "tasks.y.prompts": built, "tasks.y.test": Path("b.txt")}
    (tmp_path / "run").mkdir()
    inputs.keep(tmp_path / "run", inputs.check(tmp_path / "run", files))
    (built / "prompt_sets-train.array_record-00000-of-00001").write_bytes(b"b")
    with pytest.raises(ValueError, match=rf"^tasks\.y\.prompts: {built} holds other content"):
        inputs.check(tmp_path / "run", files)
