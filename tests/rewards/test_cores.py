import os
from pathlib import Path

import pytest

from fopd_jax.rewards import cores as module
from fopd_jax.rewards.cores import cores


@pytest.mark.parametrize(
    ("limit", "expected"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("", None)]
)
def test_cores_are_those_of_the_container(
    limit: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(module, "_LIMIT", tmp_path / "cpu.max")
    assert cores() == expected or (expected is None and cores() == len(os.sched_getaffinity(0)))
