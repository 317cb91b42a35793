"""What a run tells and measures: rates without the first update, the time that is left, scores, and its last block."""

import re
from pathlib import Path
from typing import Any

import jax
import pytest

from fopd_jax.config.schema import Run
from fopd_jax.running import pace
from fopd_jax.running.display import Display, describe_end
from fopd_jax.running.goodput import Goodput
from fopd_jax.running.pace import Pace, memory
from tests.running.toy import Recorder, cadence, run


def test_the_first_update_of_a_process_is_left_out_of_every_rate():
    now = [0.0]
    clock = Pace(8, lambda: now[0])
    assert clock.take() == {}
    now[0] = 100.0  # compiled
    clock.seen(41)
    assert (clock.take(), clock.step_seconds) == ({}, None)
    for step in (42, 43):
        now[0] += 2.0
        clock.seen(step)
    assert clock.take() == {"time/step_seconds": 2.0, "time/samples_per_second": 4.0}
    assert clock.take() == {}
    now[0] += 5.0
    clock.seen(44)
    assert clock.take()["time/step_seconds"] == 5.0  # of the updates since
    assert clock.step_seconds == 3.0  # of all


def test_memory_is_the_fullest_devices_or_the_hosts(monkeypatch: pytest.MonkeyPatch):
    class Device:
        def __init__(self, used: int) -> None:
            self.used = used

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_in_use": self.used << 30, "peak_bytes_in_use": 2 * self.used << 30}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(1), Device(3)])
    assert memory() == {"memory/in_use_gib": 3.0, "memory/peak_gib": 6.0}
    monkeypatch.setattr(Device, "memory_stats", lambda self: None)
    monkeypatch.setattr(pace, "_RSS_UNIT", 1024)
    (found,) = memory().items()
    assert found[0] == "memory/host_peak_gib"
    assert 0.05 < found[1] < 100


def _told(capsys: pytest.CaptureFixture[str], seconds: float, evaluation: float, **run: Any) -> list[str]:
    """Lines of six updates from the second on; the first takes 50 s more, the evaluation after the fourth so long."""
    now = [0.0]
    goodput = Goodput(clock=lambda: now[0])
    with goodput.measure("step"):
        display = Display(Run(steps=8, log_every=2, **run), 2, 4, goodput)
        now[0] += 50
        for step in range(3, 9):
            now[0] += seconds
            display.step(step, {"loss": float(step)})
            if step == 4:
                display._evaluation = evaluation
                with goodput.measure("eval"):
                    now[0] += evaluation
        display.close()
    return capsys.readouterr().err.splitlines()


def test_the_time_that_is_left_counts_updates_and_evaluations(capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    for limit in ("SOONEST_S", "LATEST_S"):  # a line each, however slow the machine is
        monkeypatch.setattr(f"fopd_jax.console.{limit}", -1.0)
    assert _told(capsys, 10.0, 0.0, eval_every=0) == [
        "step 3/8 loss 3",
        "step 4/8 loss 3.5 samples/s 0.4 ETA 00:40",
        "step 5/8 loss 4.5 samples/s 0.4 ETA 00:30",
        "step 6/8 loss 5.5 samples/s 0.4 ETA 00:20",
        "step 7/8 loss 6.5 samples/s 0.4 ETA 00:10",
        "step 8/8 loss 7.5 samples/s 0.4 ETA 00:00",
    ]
    assert [line.partition("ETA ")[2] for line in _told(capsys, 10.0, 60.0, eval_every=3)] == [
        "", "00:40", "02:30", "01:20", "01:10", "00:00",
    ]  # fmt: skip


def test_a_run_tells_compilation_scores_and_where_it_takes_up(capsys: pytest.CaptureFixture[str]):
    state = run(Recorder(), cadence(2, 1, 2, 2))
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"compiling the update\ncompiled the update in \d+\.\d s; with tracing and the first batch \d+\.\d s\n"
        r"step 2: evaluating\nstep 2: score -?\d\.\d{4} \(\d+\.\d s\)\n",
        out,
    )
    assert re.fullmatch(r"step 1/2 loss \S+\nstep 2/2 loss \S+ samples/s \S+ ETA 00:00\n", err)
    recorder = Recorder(saved=state)
    run(recorder, cadence(4, 1, 4, 0))
    out, err = capsys.readouterr()
    assert out.startswith("resumed at step 2 of 4\ncompiling the update\n")
    assert [line.split()[1] for line in err.splitlines()] == ["3/4", "4/4"]
    assert ["time/step_seconds" in values for _, values in recorder.clocked] == [False, True]
    assert all("memory/host_peak_gib" in values for _, values in recorder.clocked)
    run(Recorder(saved=state), cadence(2, 1, 2, 0))
    assert capsys.readouterr() == ("resumed at step 2 of 2: nothing is left to train\n", "")


def test_the_last_block_tells_scores_files_and_what_comes_next():
    outputs = {"student.safetensors": "the student", "samples.png": "pictures"}
    assert describe_end(Path("runs/a"), "done: 4 updates", "text 0.5", outputs, ["draw"]).splitlines() == [
        "done: 4 updates", "text 0.5", "in runs/a:", "  student.safetensors  the student",
        "  samples.png          pictures", "next:", "  draw",
    ]  # fmt: skip
    assert describe_end(Path("a"), "done", "", {"b": "c"}, []).splitlines() == ["done", "in a:", "  b  c"]
