"""Sampling an adapter with capability coordinates: turned from the command line, told, refused where there are none."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.coordinates import with_coordinates
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from fopd_jax.models.coordinates import LAYER
from tests import test_sample
from tests.test_sample import PROMPTS, TINY, Run, _flags, _pixels, _text

pytestmark = test_sample.pytestmark
small_network, weights, run = test_sample.small_network, test_sample.weights, test_sample.run
FEW: dict[str, Any] = {"num_steps": 2, "guidance": 1.0, "batch_size": 1}


@pytest.fixture(scope="module")
def student(weights: Path) -> str:
    """The random adapter with coordinates that show."""
    adapter, _ = load_adapter(weights / "adapter.safetensors")
    made = with_coordinates(jax.random.key(0), adapter, 2, 4, TINY.width)
    made.weights[LAYER]["b"] = np.random.default_rng(0).normal(size=(4, TINY.width)).astype(np.float32)
    card = AdapterCard(coordinates=("composition", "text"), coordinates_high=1.25)
    save_adapter(weights / "student.safetensors", made, {"preset": "miniature"}, card)
    save_adapter(weights / "silent.safetensors", made, {"preset": "miniature"})
    return f"--adapter={weights / 'student.safetensors'}"


def _about(path: Path) -> dict[str, float]:
    return json.loads(_text(path)["settings"])["adapter"]["coordinates"]


def test_dials_turn_an_image_and_stand_beside_it(
    run: Run, student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompt = _flags(PROMPTS[0])
    (plain,) = run(tmp_path / "plain", student, *prompt, **FEW)
    assert "coordinates of " in (told := capsys.readouterr().out)
    assert "composition 1, text 1, where nobody turns them; --dial does" in told
    assert _about(plain) == {"composition": 1.0, "text": 1.0}
    (turned,) = run(tmp_path / "turned", student, *prompt, "--dial=text=1.5,composition=-0.5", **FEW)
    assert "composition -0.5, text 1.5\n" in capsys.readouterr().out
    assert _about(turned) == {"composition": -0.5, "text": 1.5}
    assert (_pixels(turned) != _pixels(plain)).any()
    field = '--config.eval.coordinates={"text": 1.0}'
    (same,) = run(tmp_path / "same", student, *prompt, field, **FEW)
    assert (_pixels(same) == _pixels(plain)).all()
    (over,) = run(tmp_path / "over", student, *prompt, field, "--dial=text=1.5", **FEW)
    assert _about(over) == {"composition": 1.0, "text": 1.5}


@pytest.mark.parametrize(
    ("adapter", "dial", "problem"),
    [
        ("student", "colour=1", "dial: found colour, expected some of composition, text"),
        ("student", "text", "dial: found 'text', expected SKILL=NUMBER, such as text=1.5"),
        ("student", "text=high", "dial: found 'text=high', expected SKILL=NUMBER"),
        ("student", "text=11", "eval.coordinates: found {'text': 11.0}, expected numbers from -10 to 10"),
        ("adapter", "text=1", "dial: found text, but .*adapter.safetensors has no coordinates"),
        ("silent", "text=1", "adapter: .*silent.safetensors: has 2 coordinates, but its card names 0"),
        ("", "text=1", "dial: found text, but no --adapter that has coordinates"),
    ],
)
def test_bad_dials_are_refused_by_name(
    adapter: str, dial: str, problem: str, run: Run, student: str, weights: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    given = [f"--adapter={weights / adapter}.safetensors"] if adapter else []
    with pytest.raises(SystemExit):
        run(tmp_path / "out", *given, *_flags(PROMPTS[0]), f"--dial={dial}", **FEW)
    assert re.search(problem, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
