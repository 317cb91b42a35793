"""What a measurement says of its machine and sources."""

import subprocess
from pathlib import Path

import jax
import pytest

from fopd_jax.performance import host


def test_versions_of_what_is_installed_and_none_of_the_rest():
    assert host.versions(["jax", "no-such-package"]) == {"jax": jax.__version__, "no-such-package": None}


def test_hardware_names_processor_threads_and_memory():
    found = host.hardware()
    assert found["cpu"]
    assert 1 <= found["threads"] <= found["cores"]
    assert found["memory_gib"] >= 1


@pytest.mark.parametrize("failure", [OSError("no such program"), subprocess.CalledProcessError(9, "nvidia-smi")])
def test_without_a_gpu_or_a_repository_the_fields_are_empty(failure: Exception, monkeypatch: pytest.MonkeyPatch):
    def run(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", run)
    assert (host.gpu(), host.commit()) == ("", "")


@pytest.mark.parametrize(
    ("tracked", "status", "expected"),
    [("host.py", "", "abc"), ("host.py", " M file", "abc+"), ("", "", "")],  # the last: installed in another's checkout
)
def test_the_commit_tells_of_uncommitted_changes(
    tracked: str, status: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    said = {"ls-files": tracked, "rev-parse": "abc", "status": status}
    monkeypatch.setattr(host, "_output", lambda command: said[command[1]])
    assert host.commit() == expected


def test_the_memory_of_this_machine_is_understood():
    memory = host.available_memory()
    assert memory is not None
    assert 2**24 < memory < 2**50


def test_the_smaller_of_machine_and_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    3000 kB\n")
    monkeypatch.setattr(host, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(host, "_GROUP", tmp_path)
    assert host.available_memory() == 3000 << 10
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert host.available_memory() == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert host.available_memory() == 3000 << 10
