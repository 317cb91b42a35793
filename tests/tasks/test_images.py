"""Folders of captioned images: both forms of captions, and every folder that is none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fopd_jax.config.schema import Pairs
from fopd_jax.tasks.images import read_captions, read_image_tasks


def _files(folder: Path, **texts: str) -> Path:
    """`a_png="…"` is the file a.png; images are never opened here."""
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def _lines(folder: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


def test_captions_lie_beside_their_images(tmp_path: Path):
    _files(tmp_path, b_png="", b_txt="a bee\nin May\n", a_JPG="", a_txt=" an ant ", notes_md="no image")
    assert read_captions(str(tmp_path), "tasks.a.images") == {
        tmp_path / "a.JPG": "an ant",
        tmp_path / "b.png": "a bee in May",
    }


def test_captions_stand_in_imagefolders_lines(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    _files(tmp_path, b_webp="", a_png="", b_txt="not read")
    (tmp_path / "deep" / "c.png").touch()
    _lines(
        tmp_path,
        {"file_name": "deep/c.png", "text": "a cat"},
        {"file_name": "b.webp", "caption": "a bee", "width": 3},
        {"file_name": "a.png", "text": "an ant"},
    )
    found = read_captions(str(tmp_path), "tasks.a.images")
    assert [(path.name, caption) for path, caption in found.items()] == [
        ("a.png", "an ant"), ("b.webp", "a bee"), ("c.png", "a cat"),
    ]  # fmt: skip


def test_a_task_is_captions_files_and_held_out_prompts(tmp_path: Path):
    _files(tmp_path, a_png="", a_txt="an ant", test_prompts="a bee\na cat\n")
    task = read_image_tasks({"style": Pairs(images=str(tmp_path), test=f"{tmp_path}/test.prompts")})["style"]
    assert (task.train, task.test, task.images, task.scored) == (
        ("an ant",), ("a bee", "a cat"), (tmp_path / "a.png",), (),
    )  # fmt: skip


ONE = {"file_name": "a.png", "text": "an ant"}
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: None, "holds no images"),
    "no captions": (lambda folder: _files(folder, a_png="", a_txt="x", b_png="", c_png=""), "b.png has no caption"),
    "empty caption": (lambda folder: _files(folder, a_png="", a_txt=" \n"), "a.txt: found '"),
    "one stem": (lambda folder: _files(folder, a_png="", a_jpg="", a_txt="x"), "a.jpg and a.png are both captioned"),
    "no line": (lambda folder: _lines(_files(folder, a_png="", b_png=""), ONE), "b.png has no caption"),
    "two lines": (lambda folder: _lines(_files(folder, a_png=""), ONE, ONE), "line 2: a.png has a line already"),
    "no image": (lambda folder: _lines(folder, ONE), "line 1: .*a.png: no such file"),
    "no JSON": (lambda folder: _lines(_files(folder, a_png=""), ONE, "{"), "line 2: no JSON"),
    "no object": (lambda folder: _lines(_files(folder, a_png=""), "[1]"), "line 1: found '\\[1\\]'"),
    "no name": (lambda folder: _lines(folder, {"text": "x"}), "line 1: found file_name None"),
    "no picture": (lambda folder: _lines(folder, {"file_name": "a.gif"}), "line 1: found file_name 'a.gif'"),
    "null": (lambda folder: _lines(_files(folder, a_png=""), {"file_name": "a.png"}), "line 1: found None, expected a"),
    "not text": (lambda folder: (_files(folder, a_png="") / "a.txt").write_bytes(b"\xff\xfe\xff"), "a.txt: cannot be"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_folder_of_captioned_images_is_named(name: str, tmp_path: Path):
    make, message = BAD[name]
    make(tmp_path)
    with pytest.raises(ValueError, match=f"^tasks.style.images: .*{message}") as error:
        read_captions(str(tmp_path), "tasks.style.images")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_folder_that_is_not_there_is_named(folder: str):
    with pytest.raises(ValueError, match=f"^tasks.style.images: found '{folder}', expected a folder"):
        read_captions(folder, "tasks.style.images")
