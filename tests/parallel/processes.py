"""Programs in processes of their own."""

import socket
import subprocess
import sys

from tests.quick import environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(arguments: list[str], devices: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(devices),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(programs: list[subprocess.Popen[str]]) -> list[str]:
    """What each said; all have to succeed."""
    try:
        said = [program.communicate(timeout=900)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
    for program, text in zip(programs, said, strict=True):
        assert program.returncode == 0, text
    return said
