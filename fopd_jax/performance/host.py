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


def gpu() -> str:
    """Name, driver and memory of each NVIDIA GPU, one a line; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return _output(query)


def commit() -> str:
    """The commit, with a + where the tree differs from it; empty outside of a repository."""
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
