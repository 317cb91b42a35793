"""The page that says where weights and prompts come from: it makes what the config reads, and messages lead to it."""

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.config.load import load_config
from fopd_jax.config.schema import Model, Run
from fopd_jax.exits import CONVERTER, GUIDE
from fopd_jax.interop.files.converted import Converted, Manifest, write_manifest
from fopd_jax.interop.sd3.convert import _tokenizer_files, byte_bar, convert
from fopd_jax.stages.pipeline import load_policy, make_pipeline
from fopd_jax.tasks.images import read_captions
from fopd_jax.tasks.prompts import read_prompts
from fopd_jax.tasks.sources import read_set
from tests.configs import load, pipeline

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / GUIDE).read_text()


def test_the_page_makes_what_the_config_reads():
    config = load("sd35m_opd")
    assert f"--dst {config.model.path}" in PAGE
    for name, task in config.tasks.items():
        assert f"--local-dir {task.teacher}\n" in PAGE
        folder = str(Path(task.prompts).parent)
        assert re.search(rf"mkdir .*\b{folder}\b", PAGE)
        assert folder == f"data/{name}" == str(Path(task.test).parent)


def test_the_pages_lines_lay_the_prompts_where_the_config_reads_them(tmp_path: Path):
    lines = re.search(r"^mkdir .*?^done$", PAGE, re.DOTALL | re.MULTILINE)
    assert lines
    for split in ("train", "test"):
        record = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": f"{split}: two cats"}
        for name, text in (
            (f"geneval/{split}_metadata.jsonl", "\n".join([json.dumps(record)] * 2)),
            (f"ocr/{split}.txt", f'{split}: a sign "open"'),
            (f"pickscore_sfw/{split}.txt", f"{split}: a dog"),
        ):
            write_text(tmp_path / "flow_grpo/dataset" / name, text)
    subprocess.run(["bash", "-euc", lines[0]], cwd=tmp_path, check=True)
    found = {
        f"{name}.{split}": read_set(str(tmp_path / source), "prompts", split)
        for name, task in load("sd35m_opd").tasks.items()
        for split, source in (("train", task.prompts), ("test", task.test))
    }
    assert found["geneval.train"].texts == ("train: two cats",) * 2
    assert found["geneval.test"].metadata[1]["include"] == [{"class": "cat", "count": 2}]
    assert found["ocr.test"].texts == ('test: a sign "open"',)
    assert found["pickscore.train"].texts == ("train: a dog",)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def load_nothing(source: str, preset: str = "miniature") -> Any:
    found = pipeline(load())
    return load_policy(source, dataclasses.replace(found, preset=preset))


def convert_from(folder: Path, *files: str) -> Any:
    """A conversion of a pipeline's folder of which only some files are there."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "x"]}))
    return convert(folder, folder.with_name("dst"), dtype="float32", progress=byte_bar)


def without(folder: Path, *names: str) -> Any:
    """What a run makes of a converted folder that lacks components."""
    config = {"sample_size": 16, "patch_size": 2, "in_channels": 16, "num_layers": 1, "attention_head_dim": 16}
    config |= {"num_attention_heads": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8, "pos_embed_max_size": 8}
    config |= {"caption_projection_dim": 16, "out_channels": 16, "dual_attention_layers": [], "qk_norm": "rms_norm"}
    there = {name: Converted(config, "float32", 1, 1, {}, {}) for name in ("transformer", *names)}
    write_manifest(folder, Manifest("custom", there))
    return make_pipeline(Model(path=str(folder), preset="custom"), Run(), dict)


CONVERTS, GUIDES = r"tools/convert_sd35_weights\.py", re.escape(GUIDE)
ABSENT: dict[str, tuple[Callable[[Path], Any], str]] = {  # what is not there → who asks for it, what is said
    "base": (
        lambda folder: make_pipeline(Model(path="weights/none"), Run(), dict),
        rf"model\.path: weights/none: no such .*; {CONVERTS} makes one; {GUIDES} says where to get it",
    ),
    "base, not converted": (
        lambda folder: make_pipeline(Model(path=str(folder)), Run(), dict),
        rf"no manifest\.json; expected a folder that {CONVERTS} wrote",
    ),
    "autoencoder": (
        lambda folder: without(folder, "text_encoder", "text_encoder_2"), rf"holds no vae; {CONVERTS} adds it"
    ),
    "text encoder": (
        lambda folder: without(folder, "vae", "text_encoder"), rf"holds no text_encoder_2; {CONVERTS} adds it"
    ),
    "base of the miniature": (
        lambda folder: make_pipeline(Model(preset="miniature", path="none.safetensors"), Run(), dict),
        r"none\.safetensors: no such file or folder; configs/miniature_pretrain\.py makes one",
    ),
    "teacher of the miniature": (
        lambda folder: load_nothing("teachers/none"),
        r"teachers/none: no such file or folder; configs/miniature_teacher\.py makes one; a student's stands in",
    ),
    "teacher": (
        lambda folder: load_nothing("teachers/none", "sd35_medium"),
        rf"teachers/none: no such file or folder; {GUIDES} says where to get it; a student's stands in its run's",
    ),
    "prompts": (
        lambda folder: read_prompts(Path("none.txt"), "tasks.a.prompts"),
        rf"tasks\.a\.prompts: cannot read 'none\.txt' .*, see {GUIDES}",
    ),
    "images": (
        lambda folder: read_captions("none", "tasks.a.images"),
        r"tasks\.a\.images: found 'none', expected a folder of images .*, as configs/sd35m_sft\.py says",
    ),
    "published weights": (
        lambda folder: convert_from(folder / "none"), rf"src: .*none does not exist; {GUIDES} says where to get weights"
    ),
    "published pipeline": (
        lambda folder: convert_from(folder, "vae/x"), rf"model_index\.json: no such file; .* folder \(see {GUIDES}\)"
    ),
    "tokenizer": (
        lambda folder: _tokenizer_files(folder / "tokenizer"),
        rf"tokenizer: missing or empty, expected a tokenizer's files; {GUIDES} says where",
    ),
    "config": (lambda folder: load_config("none.py"), r"config: none\.py: no such file; configs/ of a clone holds"),
}  # fmt: skip


@pytest.mark.parametrize("what", ABSENT)
def test_what_is_not_there_is_named_with_what_makes_it(what: str, tmp_path: Path):
    ask, message = ABSENT[what]
    with pytest.raises(ValueError, match=message):
        ask(tmp_path)


def test_what_messages_name_is_there():
    """Programs, configs and pages that any message of this project names."""
    named = {
        name
        for folder in ("fopd_jax", "tools")
        for file in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\b(?:tools|configs|docs|benchmarks)/\w[\w-]*\.(?:py|md)\b", file.read_text())
    }
    assert {CONVERTER, GUIDE, "configs/sd35m_sft.py"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
