"""`benchmarks/h200.sh` and `tpu.sh` against a played interpreter: their commands are ones that the programs take."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fopd_jax.config.parse import flatten
from tests.configs import load

ROOT = Path(__file__).parents[2]
H200, TPU = "h200.sh", "tpu.sh"
PARTS = ("step", "phases", "peer", "variants", "flags", "sweep", "startup")
Played = tuple[subprocess.CompletedProcess[str], list[str]]


def play(folder: Path, *parts: str, status: int = 0, script: str = H200, **variables: str) -> Played:
    """Run a script; what it said, and every command that it gave, after `XLA_FLAGS` in brackets."""
    interpreter, log = folder / "python", folder / "commands"
    interpreter.write_text(f'#!/bin/bash\necho "[$XLA_FLAGS] $*" >> {log}\nexit {status}\n')
    interpreter.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {
        "PYTHON": str(interpreter),
        "OUT": str(folder / "out"),
        "GPU": "NVIDIA H200",
        "KIND": "v6e",
    } | variables
    done = subprocess.run(
        [str(ROOT / "benchmarks" / script), *parts], env=environment, capture_output=True, text=True, check=False
    )
    return done, log.read_text().splitlines() if log.exists() else []


@functools.cache
def known_flags(program: str) -> set[str]:
    """Names of the flags that a program's help lists."""
    command = [sys.executable, *(["-m", program] if program.startswith("fopd_jax") else [program]), "--help"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return set(re.findall(r"--(?:\[no\])?([\w-]+)", done.stdout))


def config_fields() -> set[str]:
    return {"config", *(f"config.{name}" for name in flatten(load("sd35m_opd")))}


def launched() -> list[str]:
    lines = (ROOT / "launch" / "xla_flags" / "gpu.txt").read_text().splitlines()
    return [line for line in lines if line.startswith("--")]


@pytest.mark.parametrize(("script", "part"), [*((H200, each) for each in PARTS), (TPU, "all")])
def test_every_flag_is_one_that_the_program_has(script: str, part: str, tmp_path: Path) -> None:
    done, commands = play(tmp_path, part, script=script)
    assert done.returncode == 0, done.stderr
    assert commands
    for command in commands:
        words = command.partition("] ")[2].split()
        program = words[1] if words[0] == "-m" else words[0]
        for name in (word[2:].partition("=")[0] for word in words if word.startswith("--")):
            assert name in (config_fields() if name.startswith("config.") else known_flags(program) | {"config"}), name


def test_no_two_measurements_share_a_file(tmp_path: Path) -> None:
    _, commands = play(tmp_path)
    files = [file for command in commands for file in re.findall(r"--json=(\S+)", command)]
    assert len(files) == len(commands)
    assert len(files) == len(set(files))
    assert all(Path(file).parent == tmp_path / "out" for file in files)


def test_each_flag_of_the_launchers_is_measured_alone(tmp_path: Path) -> None:
    _, commands = play(tmp_path, "flags")
    measured = [command.partition("]")[0].strip("[ ").split() for command in commands]
    assert measured[0] == []
    assert measured[1:-1] == [[flag] for flag in launched()]


def test_the_other_parts_run_under_all_flags_of_the_launchers(tmp_path: Path) -> None:
    _, (command,) = play(tmp_path, "step", XLA_FLAGS="--xla_mine=1")
    assert command.partition("]")[0].strip("[ ").split() == ["--xla_mine=1", *launched()]


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    done, commands = play(tmp_path, "step", "phases", status=3)
    assert done.returncode == 1
    assert len(commands) == 2
    assert "step: ended with status 3" in done.stdout


def test_what_the_budget_leaves_no_time_for_is_named(tmp_path: Path) -> None:
    done, commands = play(tmp_path, "step", BUDGET="10")
    assert done.returncode == 1
    assert commands == []
    assert "step: left out, the budget of 10 s is spent" in done.stdout


def test_a_smaller_gpu_gets_a_smaller_batch_and_files_of_its_own(tmp_path: Path) -> None:
    """16 images need about 85 GiB: too much for an H100's 80 GB."""
    for gpu, name, batch in (("NVIDIA H200", "h200", 16), ("NVIDIA H100 80GB HBM3", "h100", 8)):
        (tmp_path / name).mkdir()
        _, (command,) = play(tmp_path / name, "step", GPU=gpu)
        assert f"--batch={batch} " in command
        assert f"/out/{name}_step.json " in command


def test_a_tpus_update_is_timed_estimated_and_compared(tmp_path: Path) -> None:
    """The same images a chip in both; the estimate sees no chip."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tpu_v5p_step.json").touch()
    done, (step, estimate, compare) = play(tmp_path, script=TPU, KIND="v5p", CHIPS="4", BATCH="2")
    assert done.returncode == 0, done.stderr
    assert "--batch=8 " in step
    assert "--estimate" not in step
    assert "--batch=2 --estimate --topology=v5p:2x2x1 " in estimate
    assert compare.split()[-3:] == [
        "benchmarks/beside_estimate.py",
        *(str(tmp_path / "out" / f"tpu_v5p_{name}.json") for name in ("step", "estimate")),
    ]


def test_a_machine_without_a_known_tpu_is_an_error(tmp_path: Path) -> None:
    done, commands = play(tmp_path, script=TPU, KIND="cpu")
    assert (done.returncode, commands) == (2, [])
    assert "error: KIND: found cpu, expected a v5e, v5p or v6e here" in done.stderr


def test_an_unknown_part_is_an_error(tmp_path: Path) -> None:
    done, commands = play(tmp_path, "speed")
    assert done.returncode == 2
    assert commands == []
    assert "found speed, expected step, phases" in done.stderr
