"""Estimates that are kept: each adds up, and the pages say what the files do."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fopd_jax.performance.bounds import FLOPS_PER_CYCLE

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks" / "results").glob("estimate_*.json"))


def _load(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def test_there_are_some():
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_adds_up_and_says_what_it_is(file: Path):
    fields = _load(file)
    estimate = fields["estimate"]
    assert "estimate by the TPU compiler" in estimate["what"]
    assert "without waits for DMA" in estimate["what"]
    assert sum(estimate["kinds"].values()) == estimate["cycles"]
    assert sum(row["cycles"] for row in estimate["phases"].values()) == estimate["cycles"]
    kernels = sum(row["calls"] * row["cycles_a_call"] for row in estimate["kernels"] if row["kind"] == "attention")
    assert kernels == estimate["kinds"]["attention"] > 0
    peak = FLOPS_PER_CYCLE[estimate["chip"]]
    assert estimate["mfu"] == pytest.approx(estimate["model_flops"] / estimate["cycles"] / peak)
    assert estimate["mfu"] < estimate["bounds"]["width"]


def test_the_pages_hold_the_files_figures(load_script: Callable[[str], ModuleType]):
    """The whole table in the details; in the README every utilisation."""
    found = [_load(file) for file in FILES]
    assert load_script("benchmarks/estimates.py").table(found) in (ROOT / "docs" / "throughput.md").read_text()
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("**TPUs, estimated.**") : readme.index("**GPUs.**")]
    assert all(f"{fields['estimate']['mfu']:.1%}" in section for fields in found)
