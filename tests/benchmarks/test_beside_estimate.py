"""A measured update beside an estimated one, from files as the programs write them."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MEASURED: dict[str, Any] = {
    "device": {"kind": "TPU v6 lite"},
    "update": {
        "config": "sd35m_opd", "teachers": 4, "remat": "attention", "batch_size": 8, "chips": 2, "fits": True,
        "step": {"median": 10.0}, "mfu": {"matmul": 0.3, "datasheet": 0.2},
        "phases": [
            {"phase": "rollout = student forward", "seconds": 2.0}, {"phase": "teachers", "seconds": 1.5},
            {"phase": "anchor", "seconds": 0.5}, {"phase": "backward", "seconds": 5.0},
        ],
    },
}  # fmt: skip
ESTIMATED: dict[str, Any] = {
    "config": "sd35m_opd", "program": "update", "teachers": 4, "remat": "attention", "batch_size": 4,
    "estimate": {
        "cycles": 4000, "seconds": 8.0, "mfu": 0.25,
        "phases": {
            "student forward": {"cycles": 800}, "teachers and anchor": {"cycles": 900}, "backward": {"cycles": 2000},
            "optimizer": {"cycles": 300},
        },
    },
}  # fmt: skip


@pytest.fixture
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/beside_estimate.py")


def test_the_whole_and_each_phase_that_both_know(tool: ModuleType):
    assert tool.rows(MEASURED, ESTIMATED) == [
        ("update", 10.0, 8.0),
        ("student forward", 2.0, pytest.approx(1.6)),
        ("backward", 5.0, pytest.approx(4.0)),
        ("teachers and anchor", 2.0, pytest.approx(1.8)),
    ]
    text = tool.describe(MEASURED, ESTIMATED)
    assert "MFU 20.0% measured, 25.0% estimated (without waits for DMA)" in text
    assert "1.25" in text.splitlines()[2]


@pytest.mark.parametrize(("field", "value"), [("remat", "dots"), ("teachers", 3), ("batch_size", 8)])
def test_what_differs_is_not_compared(tool: ModuleType, field: str, value: Any):
    other = copy.deepcopy(ESTIMATED) | {field: value}
    with pytest.raises(
        ValueError, match=f"^{field.replace('batch_size', 'images a chip')}: found .* expected the same"
    ):
        tool.describe(MEASURED, other)


def test_what_was_not_timed_or_not_estimated_is_an_error(tool: ModuleType):
    with pytest.raises(ValueError, match=r"^measured: found no update that was timed"):
        tool.describe({"update": {"fits": False}}, ESTIMATED)
    with pytest.raises(ValueError, match=r"^estimate: found a file without one of an update"):
        tool.describe(MEASURED, ESTIMATED | {"program": "forward, base"})


def test_the_program_prints_or_says_what_is_wrong_in_one_line(tool: ModuleType, tmp_path: Path):
    for name, fields in (("measured", MEASURED), ("estimated", ESTIMATED)):
        (tmp_path / name).write_text(json.dumps(fields))

    def run(*names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tool.__file__), *(str(tmp_path / name) for name in names)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("measured", "estimated").stdout.strip() == tool.describe(MEASURED, ESTIMATED)
    swapped = run("estimated", "measured")
    assert swapped.returncode == 2
    assert "error: estimate: found a file without one" in swapped.stderr
