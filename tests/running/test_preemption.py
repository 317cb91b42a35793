"""Signals: noted from `listen` on, the first one counts, defaults come back."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import pytest

from fopd_jax.running import preemption
from fopd_jax.running.preemption import LAG, Interrupted, Preempted, Preemption


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_is_noted_and_a_second_one_changes_nothing(number: signal.Signals, status: int):
    before = signal.getsignal(number)
    with Preemption() as watch:
        assert signal.getsignal(number) is before  # not yet: nothing has been done that could be saved
        watch.listen()
        watch.listen()
        assert not watch.asked()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.asked()
        assert watch.number == number
        with pytest.raises(Interrupted):
            watch.interrupt()
    assert signal.getsignal(number) is before
    assert Preempted(number, 12, 0.5).status == status
    expected = f"{number.name}: stopped after step 12, saved in 0.5 s; the same command continues"
    assert str(Preempted(number, 12, 0.5)) == expected


class Store:
    """The runtime's key-value store, as much of it as is used."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        if key in self.values:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [item for item in self.values.items() if item[0].startswith(folder)]


@pytest.mark.parametrize("ahead", [0, 1])  # how far a process may be before the notifying one: less than the lag
@pytest.mark.parametrize("both", [False, True])
def test_all_processes_stop_at_the_same_question(monkeypatch: pytest.MonkeyPatch, ahead: int, both: bool):
    store: Any = Store()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.global_state, "client", store)
    one, other = Preemption(), Preemption()
    asked = {one: 0, other: 0}

    def ask(watch: Preemption) -> bool:
        asked[watch] += 1
        return watch.asked()

    assert not any(ask(one) for _ in range(5))
    assert not any(ask(other) for _ in range(5 + ahead))
    one.number = signal.SIGTERM
    if both:
        other.number = signal.SIGTERM
    stopped: set[Preemption] = set()
    for watch in (one, other) * (LAG + 1):
        if watch not in stopped and ask(watch):
            stopped.add(watch)
    assert stopped == {one, other}
    assert asked[one] == asked[other] == 6 + LAG
    assert other.number == signal.SIGTERM  # of which the exit status is made


SET_UP = """
import hashlib, os, signal, threading
from fopd_jax.running.preemption import Preemption, leave_at_once
leave_at_once()
with Preemption() as watch:
    watch.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.asked()
threading.Timer(0.2, os.kill, (os.getpid(), signal.{})).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # no handler of Python runs in here, as in a compiler
"""


@pytest.mark.parametrize(("name", "status"), [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143)])
def test_where_nothing_is_to_be_saved_a_signal_ends_the_process_with_one_line(name: str, status: int):
    ended = subprocess.run(
        [sys.executable, "-c", SET_UP.format(name)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr.splitlines()) == (
        status, [f"{name}: stopped; what was saved is intact, the same command continues"],
    )  # fmt: skip


# ---- what hangs


def test_what_hangs_is_left_some_time_after_a_signal_and_not_before(monkeypatch: pytest.MonkeyPatch):
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr(preemption, "_end", lambda *end: ended.append(end))
    watch = Preemption(1.0)
    with watch.bounded("the save at step 4"):
        time.sleep(1.5)
        assert not ended
        watch.number = signal.SIGHUP
        began = time.monotonic()
        while not ended:
            assert time.monotonic() - began < 30
            time.sleep(0.01)
    assert time.monotonic() - began > 0.8
    line = "SIGHUP: the save at step 4 has not ended within 1 s; left it, the same command continues from "
    assert ended[0] == (f"{line}the checkpoint before", 129)
    with watch.bounded("a save that ends"):
        time.sleep(0.2)
    count = len(ended)
    time.sleep(1.2)
    assert len(ended) == count


def test_what_failed_elsewhere_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch):
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr(preemption, "_end", lambda *end: ended.append(end))
    monkeypatch.setattr(preemption, "FAILURE_S", 0.2)
    monkeypatch.setattr(preemption, "HEAD_START_S", 0.1)
    with preemption.left_where_it_hangs("the evaluation at step 3", lambda: ""):
        time.sleep(0.6)
    assert not ended
    with preemption.left_where_it_hangs("the evaluation at step 3", lambda: "process 1: no such file"):
        time.sleep(0.6)
    line = "error: the evaluation at step 3 has failed on process 1: no such file; left it here, "
    assert ended[0] == (f"{line}the same command continues", 1)
