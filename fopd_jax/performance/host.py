"""The machine and the sources that a measurement was made with, without touching an accelerator."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GIB = 2**30
ROOT = Path(__file__).parents[2]
Fields = dict[str, Any]
_GROUP = Path("/sys/fs/cgroup")
_MEMORY = Path("/proc/meminfo")


def hardware() -> Fields:
    """Processor, its cores and those of this process, memory, and the GPU with its driver (empty without one)."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB),
        "gpu": gpu(),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def available_memory() -> int | None:
    """Bytes that this process may still take: the machine's, or its container's if that is less. None if unknown."""
    known = [value for value in (_machine_memory(), _group_memory()) if value is not None]
    return min(known, default=None)


def _machine_memory() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _group_memory() -> int | None:
    """What the control group (version 2) leaves; cached file pages count as free."""
    try:
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(statistics["inactive_file"])
    except (OSError, KeyError, ValueError):  # no group, no limit ("max"), another version
        return None


def gpu() -> str:
    """Name, driver and memory of each NVIDIA GPU, one a line; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return _output(query)


def commit() -> str:
    """The commit, with a + where the tree differs from it; empty where the code is in no repository, or not its own."""
    if not _output(["git", "ls-files", __file__]):  # an environment inside of somebody's project
        return ""
    return _output(["git", "rev-parse", "HEAD"]) + ("+" if _output(["git", "status", "--porcelain"]) else "")


def versions(packages: Sequence[str]) -> Fields:
    """Installed version of each package, or None."""
    return {name: _version(name) for name in packages}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: Sequence[str]) -> str:
    """What a program prints, or nothing where there is none, or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
