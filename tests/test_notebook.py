"""The face for notebooks: docs/notebook.md runs as it is written, nothing is imported before it is used, errors."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fopd_jax

ROOT = Path(__file__).parents[1]
MOST_LINES = 10


def blocks() -> list[str]:
    text = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_page_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    found: dict = {}
    with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
        for block in blocks():
            exec(compile(block, "docs/notebook.md", "exec"), found)
    assert found["images"].shape == (2, 24, 24, 3)
    assert found["images"].dtype == np.uint8
    assert found["scores"]["text"].shape == (4,)
    assert int(found["state"].step) == 1
    # The gradient at that trajectory is the one that the update took.
    norm = np.sqrt(
        sum(float((leaf.astype(np.float64) ** 2).sum()) for leaf in map(np.asarray, jax.tree.leaves(found["gradient"])))
    )
    np.testing.assert_allclose(norm, float(found["metrics"]["grad_norm"]), rtol=1e-4)


def test_each_thing_takes_at_most_ten_lines():
    assert all(len(block.strip().splitlines()) <= MOST_LINES for block in blocks())
    assert len(blocks()) >= 4


def test_importing_the_package_imports_nothing_else():
    code = "import sys, fopd_jax; print(sorted({'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_the_offer_is_what_is_there():
    assert set(dir(fopd_jax)) == {*fopd_jax.__all__, "__version__"}
    assert all(callable(getattr(fopd_jax, name)) for name in fopd_jax.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'train'; it offers encode"):
        _ = fopd_jax.train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__clip": -1.0}, r"^objective\.clip: found -1\.0, expected > 0, at most 1e\+30$"),
        ({"sampler__steps": 3}, r"sampler\.steps: no such field"),
    ],
)
def test_bad_fields_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        fopd_jax.load_config(ROOT / "configs" / "miniature.py", **changes)
    with pytest.raises(ValueError, match=r"nowhere\.py: no such file"):
        fopd_jax.load_config("nowhere.py")
