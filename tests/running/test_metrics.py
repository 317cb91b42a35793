"""Metrics on disk: one JSON line a step, TensorBoard beside it, and what resuming drops."""

import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from fopd_jax.running import metrics
from fopd_jax.running.metrics import MetricWriter
from tests.quick import environment


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _write(folder: Path, resume: int, steps: range) -> None:
    writer = MetricWriter(folder, resume)
    for step in steps:
        writer.write_scalars(step, {"train/loss": 1 / step})
    writer.close()


def _events(folder: Path) -> Iterator[Event]:
    """Every record of TensorBoard's event files: length, its checksum, the event, its checksum."""
    for path in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def test_a_line_holds_its_step_and_all_values(tmp_path: Path):
    writer = MetricWriter(tmp_path, 0)
    writer.write_scalars(3, {"train/loss": 0.1, "eval/text": 0.25})
    assert _lines(tmp_path) == [{"step": 3, "train/loss": 0.1, "eval/text": 0.25}]  # before closing
    writer.close()


def test_what_depends_on_the_clock_is_in_a_file_of_its_own(tmp_path: Path):
    """`metrics.jsonl` is the same, byte by byte, however often a run is interrupted."""
    writer = MetricWriter(tmp_path, 0)
    writer.write_scalars(3, {"train/loss": 0.5}, {"time/step_seconds": 2.0})
    writer.write_scalars(4, {}, {"goodput/step": 0.75})
    writer.close()
    MetricWriter(tmp_path, 3).close()  # resumed: what is repeated is measured anew
    assert _lines(tmp_path) == [{"step": 3, "train/loss": 0.5}]
    assert json.loads((tmp_path / "performance.jsonl").read_text()) == {"step": 3, "time/step_seconds": 2.0}


def test_resuming_drops_lines_of_updates_that_were_lost(tmp_path: Path):
    _write(tmp_path, 0, range(1, 8))
    _write(tmp_path, 4, range(5, 7))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_without_checkpoint_starts_its_metrics_over(tmp_path: Path):
    _write(tmp_path, 0, range(1, 4))
    _write(tmp_path, 0, range(1, 2))
    assert [line["step"] for line in _lines(tmp_path)] == [1]


@pytest.mark.parametrize("rest", ['{"step": 4, "train/lo', '{"st', "4", "", '{"loss": 1.0}', "[4]", "\0\0\0"])
def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path: Path, rest: str):
    _write(tmp_path, 0, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    _write(tmp_path, 9, range(10, 11))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3, 10]


@pytest.mark.parametrize("wrong", [b'{"step": "2"}', b'{"step": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"step": [2]}'])
def test_lines_that_are_damaged_are_counted_and_kept_elsewhere(
    tmp_path: Path, wrong: bytes, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "metrics.jsonl"
    _write(tmp_path, 0, range(1, 4))
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(damaged := first + b"\n" + wrong + b"\n" + third + b"\n")
    _write(tmp_path, 3, range(4, 5))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 3, 4]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert f"{path}: damaged (1 of 3 lines, the first is line 2)" in capsys.readouterr().err
    path.write_bytes(damaged)
    assert metrics.logged(tmp_path, 3, "train/") == {"loss": 1 / 3}


def test_a_record_that_is_gone_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _write(tmp_path, 0, range(1, 4))
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    _write(tmp_path, 3, range(4, 5))
    assert f"{tmp_path}/metrics.jsonl: holds nothing of the 3 updates before" in capsys.readouterr().err


def test_a_whole_line_without_its_newline_is_kept_apart_from_the_next(tmp_path: Path):
    _write(tmp_path, 0, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    _write(tmp_path, 2, range(3, 4))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_no_temporary_file_stays(tmp_path: Path):
    _write(tmp_path, 0, range(1, 3))
    _write(tmp_path, 1, range(2, 3))
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "performance.jsonl", "tensorboard"}


def test_tensorboard_reads_scalars_images_and_texts(tmp_path: Path):
    writer = MetricWriter(tmp_path, 0)
    writer.write_scalars(2, {"train/loss": 0.5}, {"time/step_seconds": 2.0})
    writer.write_images(2, {"samples": np.zeros((4, 5, 3), np.uint8)})
    writer.write_texts(2, {"final/table": "      text\nbase  0.5\n"})
    writer.close()
    values = {value.tag: value for event in _events(tmp_path) if event.step == 2 for value in event.summary.value}
    assert values["train/loss"].simple_value == 0.5
    assert values["time/step_seconds"].simple_value == 2.0
    (table,) = values["final/table/text_summary"].tensor.string_val
    assert table == b"```\n      text\nbase  0.5\n```"
    assert (values["samples"].image.height, values["samples"].image.width) == (4, 5)


def test_tensorboard_is_told_from_where_a_resumed_run_repeats(tmp_path: Path):
    _write(tmp_path, 0, range(1, 6))
    _write(tmp_path, 3, range(4, 5))
    starts = [event.step for event in _events(tmp_path) if event.session_log.status == event.session_log.START]
    assert starts[-1] == 4  # TensorBoard hides what it saw of step 4 and later before


def test_only_process_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "is_main", lambda: False)
    writer = MetricWriter(tmp_path / "run", 0)
    writer.write_scalars(1, {"train/loss": 1.0})
    writer.write_images(1, {"samples": np.zeros((2, 2, 3), np.uint8)})
    writer.close()
    assert not (tmp_path / "run").exists()


FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("suffix", ["metrics.jsonl", "tensorboard"])
def test_what_cannot_be_written_waits_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: int, suffix: str
):
    opens = Path.open

    def fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        if suffix in str(path.relative_to(tmp_path)):
            raise OSError(fault, os.strerror(fault), str(path))
        return opens(path, *args, **kwargs)

    writer = MetricWriter(tmp_path, 0)
    for _ in range(2):  # it works in between, and the count begins anew
        monkeypatch.setattr(Path, "open", fail)
        for step in (1, 2):
            writer.write_scalars(step, {"train/loss": 0.5})
            told = capsys.readouterr().err
            assert told.startswith(f"warning: step {step}: no metrics written: ")
            assert os.strerror(fault) in told
            assert told.count("\n") == 1
        assert not writer.trouble
        monkeypatch.setattr(Path, "open", opens)
        writer.write_images(3, {"samples": np.zeros((2, 2, 3), np.uint8)})
    monkeypatch.setattr(Path, "open", fail)
    for step in (4, 5, 6):
        writer.write_scalars(step, {"train/loss": 0.5})
    assert "3 in a row" in writer.trouble
    monkeypatch.setattr(Path, "open", opens)
    writer.close()
    assert not writer.trouble
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 1, 2, 4, 5, 6]
    assert [event.step for event in _events(tmp_path)] == [0, 1, 1, 2, 3, 1, 2, 3, 4, 5, 6]


def test_a_folder_that_vanished_is_told_and_lines_that_are_lost_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    folder.mkdir()
    writer = MetricWriter(folder, 0)
    folder.rename(tmp_path / "away")
    writer.write_scalars(1, {"train/loss": 0.5})
    writer.close()
    assert "metrics.jsonl: the last 1 lines could not be written" in capsys.readouterr().err
    assert not folder.exists()


def test_a_program_starts_without_pytorch():
    """tensorboardX imports it where it is installed, which takes seconds."""
    code = "import sys, fopd_jax.main; print(sorted({'torch', 'tensorboardX'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['tensorboardX']"
