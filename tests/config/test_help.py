"""`--help` tells usage, flags and fields, at once and with status 0."""

import subprocess
import sys
from pathlib import Path

import pytest

from fopd_jax.config.help import describe_program
from fopd_jax.config.parse import flatten
from fopd_jax.config.schema import OPD, FlowMatching

ROOT = Path(__file__).parents[2]
OWN = {
    "main": "--check=false", "sample": "--images-per-prompt=1", "compile_for": "--topology", "benchmark": "--steps=10",
    "evaluate": "--weights-only=false", "demonstrate": "--best-of=1",
}  # fmt: skip


@pytest.mark.parametrize("program", OWN)
def test_a_program_tells_its_usage_its_flags_and_the_fields(program: str):
    text = describe_program(ROOT / "fopd_jax" / f"{program}.py")
    assert text.startswith(f"`python -m fopd_jax.{program} --")
    for line in (OWN[program], "--config ", "--workdir ", "--distributed=auto", "run.mesh.data=-1",
                 "tasks.NAME.teacher=", "tasks.NAME.share=1.0", "cold_start.weights={}"):  # fmt: skip
        assert f"\n  {line}" in text
    told = {line.split("=")[0].strip() for line in text.partition("\nFields")[2].splitlines()}
    sections = ("stage", "tasks", "offline.tasks", "rewards", "run.servers")
    for config in (OPD(), FlowMatching()):
        entries = ("run.alarms.", "health.bands.")  # of dicts with defaults, told as one
        assert {name for name in flatten(config) if name not in sections and not name.startswith(entries)} <= told
    assert {"tasks.NAME.rewards", "rewards.NAME.kind", "run.servers.NAME.urls"} <= told


@pytest.mark.parametrize("program", OWN)
def test_help_is_there_at_once(program: str):
    """Nothing that takes long is imported: Python says what was."""
    command = [sys.executable, "-X", "importtime", "-m", f"fopd_jax.{program}", "--config=any.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "Fields of the config" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"jax", "numpy", "PIL", "orbax"}


def test_a_reader_that_stops_is_no_error():
    command = f"{sys.executable} -m fopd_jax.main --help | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
