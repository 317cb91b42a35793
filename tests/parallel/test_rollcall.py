"""Roll calls: everybody learns the hosts, and who is missing or does not belong is named."""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fopd_jax.parallel.rollcall import roll_call
from tests.parallel.processes import free_port


def _call(*calls: tuple[int, int], timeout_s: float = 20.0) -> list[Any]:
    """Results or errors of concurrent roll calls, given as (count, process)."""
    port = free_port()

    def call(numbers: tuple[int, int]) -> Any:
        try:
            return roll_call(f"localhost:{port}", *numbers, timeout_s)
        except (ValueError, TimeoutError) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(call, calls))


def test_a_roll_call_tells_everybody_the_hosts():
    assert _call((3, 1), (3, 2), (3, 0)) == [(socket.gethostname(),) * 3] * 3


def test_a_roll_call_names_who_has_not_started():
    for error in _call((4, 0), (4, 2), timeout_s=1.0):
        assert isinstance(error, TimeoutError)
        host = socket.gethostname()
        assert str(error) == f"not started within 1 s: process 1, 3; there are: 0 ({host}), 2 ({host})"


def test_a_process_without_a_coordinator_says_so():
    [error] = _call((2, 1), timeout_s=0.5)
    assert isinstance(error, TimeoutError)
    assert re.search(r"process 1 \(.*\): the coordinator, process 0 at localhost:\d+, has not answered", str(error))


@pytest.mark.parametrize(
    ("calls", "message"),
    [(((3, 0), (3, 1), (3, 1)), "process-id: 1 was given twice"), (((3, 0), (2, 1)), "num-processes: process 1")],
)
def test_processes_that_do_not_agree_are_refused(calls: tuple[tuple[int, int], ...], message: str):
    for error in _call(*calls):
        assert isinstance(error, ValueError)
        assert message in str(error)


def test_a_stranger_on_the_port_does_not_count():
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        main = threads.submit(roll_call, f"localhost:{port}", 2, 0, 20.0)
        while True:
            try:
                with socket.create_connection(("localhost", port)) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    break
            except ConnectionRefusedError:
                time.sleep(0.02)
        assert roll_call(f"localhost:{port}", 2, 1, 20.0) == main.result() == (socket.gethostname(),) * 2
