"""Who is there, before JAX's runtime starts: it ends the process where a host is missing, and does not say which.

Process 0 listens on the coordinator's own port, every other process reports to it, and all are told the host names, or
who is missing. Then the port is free for JAX's coordination service.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping

_LONGEST, _RETRY_S, _GRACE_S = 65536, 0.2, 10.0


def roll_call(coordinator: str, count: int, process: int, timeout_s: float) -> tuple[str, ...]:
    """Host names of all `count` processes, in order, once all have reported. `coordinator`: `host:port` of process 0.

    Raises:
      OSError: process 0 cannot listen on the coordinator's port; names it.
      TimeoutError: not all did within `timeout_s`; names the missing processes, or the coordinator if it is silent.
      ValueError: two processes have one number, or they do not agree how many they are; names them.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout_s
    if process == 0:
        return _listen(int(port), count, deadline, timeout_s)
    return _report(host.strip("[]"), int(port), count, process, deadline, timeout_s)


def _listen(port: int, count: int, deadline: float, timeout_s: float) -> tuple[str, ...]:
    present, connections = {0: socket.gethostname()}, contextlib.ExitStack()
    with connections, _server(port) as server:
        waiting: list[socket.socket] = []
        problem = ""
        while len(present) < count and not problem and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(
                TimeoutError, OSError, ValueError, KeyError
            ):  # a stranger's call counts for nothing
                connection = connections.enter_context(server.accept()[0])
                found = _receive(connection, min(left, _GRACE_S))
                waiting.append(connection)
                problem = _register(present, count, int(found["process"]), int(found["count"]), str(found["host"]))
        missing = [process for process in range(count) if process not in present]
        late = bool(missing) and not problem
        if late:
            problem = _absence(missing, present, timeout_s)
        hosts = [present.get(process, "") for process in range(count)]
        for connection in waiting:
            with contextlib.suppress(OSError):  # one that has gone since will be missed at the first barrier
                _send(connection, {"hosts": hosts, "problem": problem, "late": late})
    return _verdict(hosts, problem, late)


def _register(present: dict[int, str], count: int, process: int, their_count: int, host: str) -> str:
    """Note who reported; returns what is wrong with it, if anything."""
    if their_count != count:
        return f"num-processes: process {process} ({host}) says {their_count}, process 0 ({present[0]}) says {count}"
    if not 0 <= process < count or process in present:
        return f"process-id: {process} was given twice, on {present.get(process)} and on {host}"
    present[process] = host
    return ""


def _absence(missing: list[int], present: Mapping[int, str], timeout_s: float) -> str:
    there = ", ".join(f"{process} ({host})" for process, host in sorted(present.items()))
    return f"not started within {timeout_s:g} s: process {', '.join(map(str, missing))}; there are: {there}"


def _report(host: str, port: int, count: int, process: int, deadline: float, timeout_s: float) -> tuple[str, ...]:
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                _send(connection, {"process": process, "count": count, "host": socket.gethostname()})
                found = _receive(connection, left + _GRACE_S)
        except (OSError, ValueError):  # nobody there yet, or somebody else
            time.sleep(_RETRY_S)
        else:
            return _verdict(found["hosts"], found["problem"], found["late"])
    raise TimeoutError(
        f"process {process} ({socket.gethostname()}): the coordinator, process 0 at {host}:{port}, "
        f"has not answered within {timeout_s:g} s"
    )


def _verdict(hosts: list[str], problem: str, late: bool) -> tuple[str, ...]:
    if problem:
        raise TimeoutError(problem) if late else ValueError(problem)
    return tuple(hosts)


def _server(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(error.errno, f"coordinator: cannot listen on port {port} of this host: {reason}") from error


def _send(connection: socket.socket, message: Mapping[str, object]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, timeout_s: float) -> dict:
    """One line of JSON.

    Raises:
      ValueError: it is something else.
    """
    connection.settimeout(timeout_s)
    with connection.makefile("rb") as stream:
        return json.loads(stream.readline(_LONGEST))
