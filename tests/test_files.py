"""Files appear whole or not at all, under every failure, with several writers, and with the permissions of new ones."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from fopd_jax.files import (
    check_apart,
    check_finite,
    check_writable,
    local_file,
    local_path,
    replacing,
    replacing_folder,
    set_aside,
    write_json,
    write_png,
    write_private,
    write_tensors,
    write_text,
)

RED = Image.new("RGB", (4, 4), "red")
WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "one\n"),
    "json": lambda path: write_json(path, {"a": 1}),
    "png": lambda path: write_png(path, RED),
    "tensors": lambda path: write_tensors(path, {"a": np.ones(3)}),
    "labelled": lambda path: write_tensors(path, {"a": np.ones(3)}, {"b": "c"}),
}
FAILURES: dict[str, tuple[type[Exception], Callable[[Path], None]]] = {
    "json": (TypeError, lambda path: write_json(path, {"a": object()})),
    "png": (OSError, lambda path: write_png(path, Image.new("F", (4, 4)))),  # a mode that PNG does not have
    "text": (UnicodeEncodeError, lambda path: write_text(path, "\ud800")),
}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_nothing_else_stays_and_a_second_write_is_the_same(write: Callable[[Path], None], tmp_path: Path):
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_text("what was there before")
    for target in (path, path, other):
        write(target)
    assert _names(tmp_path) == ["file", "other"]
    assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_permissions_are_those_of_a_new_file(write: Callable[[Path], None], umask: int, tmp_path: Path):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
        with replacing_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize(("kind", "write"), FAILURES.values(), ids=FAILURES)
def test_what_cannot_be_written_leaves_the_file_before(
    kind: type[Exception], write: Callable[[Path], None], tmp_path: Path
):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(kind):
        write(path)
    assert path.read_text() == "before"
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing(error: type[BaseException], tmp_path: Path):
    def fill(made: Path) -> None:
        made.write_text("half")
        raise error

    def fill_folder(made: Path) -> None:
        (made / "inside").mkdir()
        fill(made / "inside" / "file")

    (tmp_path / "file").write_text("before")
    with pytest.raises(error), replacing(tmp_path / "file") as made:
        fill(made)
    with pytest.raises(error), replacing_folder(tmp_path / "folder") as made:
        fill_folder(made)
    assert _names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_writers_at_once_never_share_a_name_and_one_of_them_wins(tmp_path: Path):
    path, texts = tmp_path / "file", [f"{i}\n" * 50_000 for i in range(8)]
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last to finish
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda text: write_text(path, text), texts * 4))
    assert path.read_text() in texts
    assert _names(tmp_path) == ["file"]


def test_a_reader_sees_the_file_before_until_the_block_ends(tmp_path: Path):
    path = tmp_path / "file"
    write_text(path, "before")
    with replacing(path) as made:
        made.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"


def test_a_private_file_is_its_owners_from_the_start(tmp_path: Path):
    with replacing(tmp_path / "file", private=True) as made:
        assert made.stat().st_mode & 0o777 == 0o600
    write_private(tmp_path / "file", "secret")
    assert (tmp_path / "file").read_text() == "secret"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_folder_appears_with_all_it_holds_and_replaces_an_empty_one_alone(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with replacing_folder(tmp_path / name) as made:
            (made / "file").write_text("whole")
            assert not (tmp_path / name / "file").exists()
        assert (tmp_path / name / "file").read_text() == "whole"
    with pytest.raises(OSError, match="not empty"), replacing_folder(tmp_path / "new") as made:
        (made / "file").write_text("other")
    assert (tmp_path / "new" / "file").read_text() == "whole"
    assert _names(tmp_path) == ["empty", "new"]


def test_a_missing_folder_and_a_folder_in_the_way_are_errors(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "missing" / "file", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_text(tmp_path / "folder", "text")
    assert _names(tmp_path) == ["folder"]


def test_json_is_sorted(tmp_path: Path):
    write_json(tmp_path / "x.json", {"b": 1, "a": [1, 2]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": [1, 2], "b": 1}
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("}\n")


def test_text_is_utf8_without_translation(tmp_path: Path):
    write_text(tmp_path / "x.txt", "ÄΩ東京 ± –\n")
    assert (tmp_path / "x.txt").read_bytes() == "ÄΩ東京 ± –\n".encode()


def test_a_picture_carries_its_metadata_in_any_script(tmp_path: Path):
    metadata = {"prompt": 'sign "ÄΩ東京" – two\nlines', "seed": "3", "settings": '{"steps": 40}'}
    for name, expected in (("0.png", metadata), ("1.png", {})):
        write_png(tmp_path / name, RED, expected)
        with Image.open(tmp_path / name) as written:
            written.load()
            assert (written.format, written.text) == ("PNG", expected)
            np.testing.assert_array_equal(np.asarray(written), np.asarray(RED))


def test_tensors_keep_dtype_shape_and_bits(tmp_path: Path):
    special = np.array([0.0, -0.0, 1e-45, np.inf, np.nan], np.float32)
    tensors = {
        "scalar": np.asarray(2.5),
        "bfloat16": special.astype(ml_dtypes.bfloat16),
        "special": special,
        "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"z": "1", "a": "ÄΩ"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == tensor.tobytes()
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert file.metadata() == {"z": "1", "a": "ÄΩ"}


def test_metadata_in_any_order_give_equal_bytes(tmp_path: Path):
    names = [str(i) for i in range(40)]
    for file, order in (("one", names), ("two", names[::-1])):
        write_tensors(tmp_path / file, {"a": np.ones(3)}, {name: name for name in order})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, events = tmp_path / "file", []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.fstat(handle).st_size) or sync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: events.append("named") or replace(*names))
    for durable in (True, False):
        with replacing(path, durable=durable) as made:
            made.write_text("four")
    assert events == [4, "named", "named"]


def test_numbers_that_are_not_finite_are_named():
    check_finite("student", {"w": np.ones(3, np.float32), "n": np.arange(2)})
    with pytest.raises(FloatingPointError, match="student: w: 2 of 3 numbers are not finite"):
        check_finite("student", {"w": np.array([1.0, np.nan, np.inf])})


def test_a_folder_is_tried_without_a_trace(tmp_path: Path):
    assert check_writable(tmp_path / "a" / "b", "workdir") == tmp_path
    assert check_writable(tmp_path, "workdir") == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "a/b"])
def test_what_cannot_be_written_is_named(below: str, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=rf"^workdir: {file} is no folder$"):
        check_writable(file / below, "workdir")
    with pytest.raises(ValueError, match=r"^workdir: /proc cannot be written \(.+\)$"):
        check_writable(Path("/proc") / below, "workdir")
    with pytest.raises(ValueError, match=r"^workdir: .* cannot be written \(File name too long\)$"):
        check_writable(tmp_path / ("a" * 300), "workdir")


def test_a_link_to_nothing_is_no_folder(tmp_path: Path):
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("gone", "loop", "gone/below", "loop/below"):
        with pytest.raises(ValueError, match=r"^workdir: .* is a link to nothing$"):
            check_writable(tmp_path / name, "workdir")


@pytest.mark.parametrize("name", ["", "gs://bucket/x", "https://host/x", "~/x", "$HOME/x"])
def test_a_path_that_does_not_mean_what_it_says_is_refused(name: str):
    with pytest.raises(ValueError, match=r"^--workdir: found .*, expected a path on this machine"):
        local_path("--workdir", name)
    assert local_path("--workdir", "a ~b/$c") == Path("a ~b/$c")


@pytest.mark.parametrize("name", [" ", "a ", "\ta", "a\nb", "a\udcff", "\x1b[31ma"])
def test_a_path_that_nobody_can_read_as_it_is_is_refused(name: str):
    with pytest.raises(ValueError, match=r"^--workdir: found .*, expected no control characters, and no blanks"):
        local_path("--workdir", name)


def test_links_that_go_round_are_no_traceback(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    check_apart(tmp_path / "loop", tmp_path / "new")
    with pytest.raises(ValueError, match="is the source itself"):
        check_apart(tmp_path / "loop", tmp_path / "loop")


def test_a_file_to_be_written_is_checked_before_there_is_anything_to_write(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    assert local_file("json", str(tmp_path / "file")) == tmp_path / "file"
    assert local_file("json", str(tmp_path / "new")) == tmp_path / "new"
    for name, problem in {
        "folder": "is a folder, expected the name of a file", "link": "is no file", "pipe": "is no file",
        "file/new": "is no folder", "none/new": "is no folder",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"^json: {tmp_path}.* {problem}"):
            local_file("json", str(tmp_path / name))
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file", "link", "pipe"}


def test_what_is_damaged_is_set_aside_under_a_name_of_its_own(tmp_path: Path):
    for content in ("one", "two"):
        (tmp_path / "run.json").write_text(content)
        set_aside(tmp_path / "run.json")
    assert [(tmp_path / f"run.json.damaged{n}").read_text() for n in ("", "2")] == ["one", "two"]
    (tmp_path / "run.json").symlink_to("nothing")
    assert set_aside(tmp_path / "run.json").name == "run.json.damaged3"
