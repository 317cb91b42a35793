"""The pool of reading processes: what they do to themselves must not reach the run, and none may stay behind."""

import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from fopd_jax.rewards import recogniser
from fopd_jax.rewards.recogniser import ReadingError, Recogniser, WorkerEndedError

FAKE = """
import os, signal, sys, time
from fopd_jax.rewards.ocr_worker import serve

def read(image):
    what = image[0, 0, 0]
    if what == 1:
        raise ValueError("a bad\\npicture")
    if what == 2 or (what == 4 and not os.path.exists(sys.argv[1])):
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == 3:
        time.sleep(600)
    if what == 5:
        print("native trouble", file=sys.stderr, flush=True)
        os.abort()
    if what == 6:
        os.write(1, b"noise")
        print("more noise", flush=True)
    return [str(what), f"{image.shape}", str(os.getpid())]

serve(lambda: read)
"""
"""Does to itself what the first value of an image says: 1 raises, 2 dies, 3 hangs, 4 dies once, 5 aborts, 6 prints."""


def images(*firsts: int) -> np.ndarray:
    made = np.zeros((len(firsts), 20, 30, 3), np.uint8)
    made[:, 0, 0, 0] = firsts
    return made


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Recogniser]:
    made = Recogniser(2, 1.0, (sys.executable, "-c", FAKE, str(tmp_path / "died")))
    yield made
    made.close()


def pids(pool: Recogniser) -> list[int]:
    return [worker._process.pid for worker in pool._workers]


def gone(pid: int, within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def firsts(results: list) -> list:
    return [result if isinstance(result, Exception) else int(result[0]) for result in results]


def test_images_are_read_in_their_order_by_all_processes(pool: Recogniser):
    results = pool.read(images(*range(10, 40)))
    assert firsts(results) == list(range(10, 40))
    assert {lines[1] for lines in results} == {"(20, 30, 3)"}
    assert {int(lines[2]) for lines in results} == set(pids(pool))
    assert pool.read(images()) == []


def test_images_arrive_as_they_are():
    code = "import zlib\nfrom fopd_jax.rewards.ocr_worker import serve\n"
    code += "serve(lambda: lambda image: [f'{image.shape} {zlib.crc32(image.tobytes())}'])"
    sent = np.random.default_rng(0).integers(0, 256, (1, 37, 53, 3), np.uint8)
    pool = Recogniser(1, 10.0, (sys.executable, "-c", code))
    for batch in (sent, sent[:, ::-1, :, ::-1], sent[:, :1, :1]):  # views, too
        assert pool.read(batch) == [[f"{batch.shape[1:]} {zlib.crc32(batch.tobytes())}"]]
    pool.close()


def test_what_reading_raises_is_that_images_failure(pool: Recogniser):
    before = pids(pool)
    results = pool.read(images(1, 10, 1, 11))
    assert [firsts(results)[i] for i in (1, 3)] == [10, 11]
    for i in (0, 2):
        assert isinstance(results[i], ReadingError)
        assert str(results[i]) == "ValueError: a bad picture"
    assert pids(pool) == before


def test_a_process_that_dies_costs_one_image(pool: Recogniser):
    results = pool.read(images(10, 2, 11, 12, 2, 13))
    assert [firsts(results)[i] for i in (0, 2, 3, 5)] == [10, 11, 12, 13]
    for i in (1, 4):
        assert isinstance(results[i], WorkerEndedError)
        assert "was ended by SIGKILL" in str(results[i])
    assert firsts(pool.read(images(20, 21, 22))) == [20, 21, 22]


def test_an_image_whose_process_dies_once_is_read(pool: Recogniser):
    assert firsts(pool.read(images(4, 10))) == [4, 10]


def test_the_last_words_of_a_process_are_told(pool: Recogniser):
    (result,) = pool.read(images(5))
    assert str(result) == "the process that was reading was ended by SIGABRT: native trouble"


def test_an_image_that_hangs_times_out_and_its_process_is_replaced(pool: Recogniser):
    before, start = pids(pool), time.monotonic()
    results = pool.read(images(3, 10, 11, 12))
    assert time.monotonic() - start < 20
    assert firsts(results)[1:] == [10, 11, 12]
    assert isinstance(results[0], TimeoutError)
    assert str(results[0]) == "took more than 1 s reading; its process was ended"
    assert firsts(pool.read(images(20, 21, 22, 23))) == [20, 21, 22, 23]
    assert len(set(before) & set(pids(pool))) == 1


def test_processes_that_are_killed_between_batches_are_replaced(pool: Recogniser):
    pool.read(images(10, 11))
    for pid in pids(pool):
        os.kill(pid, signal.SIGKILL)
    assert firsts(pool.read(images(12, 13, 14, 15))) == [12, 13, 14, 15]


def test_what_is_printed_is_no_reply(pool: Recogniser):
    assert firsts(pool.read(images(6, 10, 6, 11))) == [6, 10, 6, 11]


def test_several_threads_may_read(pool: Recogniser):
    found: dict[int, list] = {}

    def read(first: int) -> None:
        found[first] = firsts(pool.read(images(*range(first, first + 10))))

    threads = [threading.Thread(target=read, args=(first,)) for first in (10, 30, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {first: list(range(first, first + 10)) for first in (10, 30, 50)}


def test_close_ends_all_processes_at_once_even_hanging_ones(tmp_path: Path):
    pool = Recogniser(2, 100.0, (sys.executable, "-c", FAKE, str(tmp_path / "died")))
    results: list = []
    reading = threading.Thread(target=lambda: results.extend(pool.read(images(3, 10, 3, 11))))
    reading.start()
    time.sleep(1)
    started = pids(pool)
    pool.close()
    reading.join(timeout=20)
    assert not reading.is_alive()
    assert all(gone(pid) for pid in [*started, *pids(pool)])
    assert len([result for result in results if isinstance(result, ReadingError)]) >= 2
    pool.close()  # again is no harm


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path):
    """Whether they wait for images or hang in one."""
    code = f"""
import sys, threading, time
import numpy as np
from fopd_jax.rewards.recogniser import Recogniser
pool = Recogniser(2, 1000.0, (sys.executable, "-c", {FAKE!r}, {str(tmp_path / "died")!r}))
image = np.full((1, 20, 30, 3), 3, np.uint8)
threading.Thread(target=pool.read, args=(image,)).start()
time.sleep(0.5)
print(*(worker._process.pid for worker in pool._workers), flush=True)
time.sleep(600)
"""
    with subprocess.Popen((sys.executable, "-c", code), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        started = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(started) == 2
        assert not any(gone(pid, 0.2) for pid in started)
        parent.kill()
    assert all(gone(pid) for pid in started)


def test_signals_for_the_run_do_not_reach_them(pool: Recogniser):
    assert all(os.getpgid(pid) == pid for pid in pids(pool))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "from fopd_jax.rewards.ocr_worker import serve\ndef load(): raise OSError('no models')\nserve(load)",
            "OSError: no models",
        ),
        ("import sys; sys.exit('no such library')", "the process that was starting ended with status 1: no such"),
    ],
)
def test_what_cannot_start_is_refused_at_once(code: str, message: str):
    with pytest.raises(ValueError, match=message):
        Recogniser(2, 1.0, (sys.executable, "-c", code))


def test_what_takes_too_long_to_start_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recogniser, "_STARTS_WITHIN", 0.5)
    with pytest.raises(ValueError, match=r"took more than 0\.5 s starting"):
        Recogniser(1, 1.0, (sys.executable, "-c", "import time; time.sleep(60)"))
