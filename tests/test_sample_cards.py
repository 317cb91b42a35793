"""Sampling with adapters whose files say how to use them: drawn as they are meant, and what differs is told."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from tests import test_sample
from tests.test_sample import CONFIG, PROMPTS, _call, _flags, _text

pytestmark = test_sample.pytestmark
small_network, weights = test_sample.small_network, test_sample.weights


@pytest.fixture
def speaking(weights: Path, tmp_path: Path) -> Callable[..., str]:
    """The random adapter in a file that says so of itself."""

    def write(name: str, **said: Any) -> str:
        adapter, _ = load_adapter(weights / "adapter.safetensors")
        save_adapter(tmp_path / name, adapter, {"preset": "miniature"}, AdapterCard(**said))
        return f"--adapter={tmp_path / name}"

    return write


def _guidance(out: Path, weights: Path, *arguments: str, config: Path = CONFIG) -> float:
    """Under which one image was drawn, as it says itself."""
    few = ["--config.eval.num_steps=1", f"--config.model.path={weights}/base.safetensors", f"--out={out}"]
    _call(*few, *_flags(PROMPTS[0]), *arguments, config=config)
    return json.loads(_text(next(iter(out.glob("[0-9]*.png"))))["settings"])["guidance"]


def test_an_adapter_is_drawn_as_it_is_meant(
    weights: Path, speaking: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Where neither flags nor the config's file set a guidance, and all adapters are for the same."""
    one, same, two = speaking("one", guidance=1.0), speaking("same", guidance=1.0), speaking("two", guidance=2.0)
    config = tmp_path / "config.py"
    text = CONFIG.read_text(encoding="utf-8")
    config.write_text(text.replace("num_steps=10, guidance=1.0", "num_steps=10"))
    assert config.read_text() != text
    line = "guidance 1, which {} says to be for; --config.eval.guidance=… sets another"
    assert _guidance(tmp_path / "a", weights, one, config=config) == 1.0
    assert line.format(tmp_path / "one") in capsys.readouterr().out
    assert _guidance(tmp_path / "b", weights, one, same, config=config) == 1.0
    assert line.format(f"{tmp_path / 'one'}, {tmp_path / 'same'}") in capsys.readouterr().out
    other = f"warning: adapter: {tmp_path / 'one'} is for guidance 1, but eval.guidance is 4.5"
    for arguments in ((one, two), (one, "--config.eval.guidance=4.5")):
        out = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
        assert _guidance(out, weights, *arguments, config=config) == 4.5
        said = capsys.readouterr()
        assert other in said.err
        assert "says to be for" not in said.out
    assert _guidance(tmp_path / "d", weights, two) == 1.0  # the config's file sets it
    assert f"warning: adapter: {tmp_path / 'two'} is for guidance 2, but eval.guidance is 1" in capsys.readouterr().err
    assert _guidance(tmp_path / "e", weights, f"--adapter={weights}/adapter.safetensors", config=config) == 4.5
    assert "warning" not in capsys.readouterr().err


def test_an_adapter_of_another_base_is_told_and_drawn(
    weights: Path, speaking: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = hashlib.sha256((weights / "base.safetensors").read_bytes()).hexdigest()
    _guidance(tmp_path / "own", weights, speaking("own.safetensors", base=own))
    assert "warning" not in capsys.readouterr().err
    _guidance(tmp_path / "other", weights, speaking("other.safetensors", base="c0ffee" * 10))
    line = f"warning: adapter: {tmp_path / 'other.safetensors'}: trained on another base (SHA-256 of its weights c0ffee"
    assert line in capsys.readouterr().err
