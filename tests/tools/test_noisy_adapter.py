"""`tools/noisy_adapter.py`: how large its noise is, what the new file says of itself, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from fopd_jax.interop.lora.cards import read_card

CARD = AdapterCard("flow_grpo", {"text": 1.0}, guidance=1.0, preset="miniature", scores={"text": 0.9}, scored_at=40)


@pytest.fixture
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/noisy_adapter.py")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    weights = {
        "layer": {name: size * draw.standard_normal((64, 64), np.float32) for name, size in (("a", 2), ("b", 0.5))}
    }
    save_adapter(path := tmp_path / "source.safetensors", Adapter(weights, 0.5), {"preset": "miniature"}, CARD)
    return path


def run(tool: ModuleType, source: Path, scale: float, seed: int = 0) -> Path:
    tool.main(
        ["--src", str(source), "--dst", str(dst := source.with_name("noisy")), f"--scale={scale}", f"--seed={seed}"]
    )
    return dst


def test_noise_is_as_large_as_said_in_every_factor(tool: ModuleType, source: Path) -> None:
    (before, _), (after, metadata) = load_adapter(source), load_adapter(run(tool, source, 3.0))
    assert (after.scale, metadata["preset"]) == (0.5, "miniature")
    noises = jax.tree.leaves(jax.tree.map(np.subtract, after.weights, before.weights))
    for noise, size in zip(noises, (2, 0.5), strict=True):
        np.testing.assert_allclose(noise.std(), 3 * size, rtol=0.05)
        assert abs(noise.mean()) < 0.1 * noise.std()
    assert abs(np.corrcoef(*(noise.ravel() for noise in noises))[0, 1]) < 0.05


def test_it_is_a_function_of_the_seed(tool: ModuleType, source: Path) -> None:
    first, again, other = (run(tool, source, 1.0, seed).read_bytes() for seed in (0, 0, 1))
    assert first == again != other


def test_the_card_says_so_and_has_no_scores(tool: ModuleType, source: Path) -> None:
    card = read_card(run(tool, source, 4.0, 7))
    assert card is not None
    assert card.algorithm == "flow_grpo, then gaussian noise of scale 4, seed 7"
    assert (dict(card.scores), card.scored_at) == ({}, None)
    assert (card.guidance, card.preset, dict(card.rewards)) == (1.0, "miniature", {"text": 1.0})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--scale=-1"], "--scale: found -1, expected a number from 0 to 1e+06"),
        (["--scale=nan"], "--scale: found nan, expected a number from 0 to 1e+06"),
        (["--scale=1", "--seed=-1"], "--seed: found -1, expected a whole number from 0 to 4294967295"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], problem: str, tool: ModuleType, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = source.with_name("noisy")
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--src", str(source), "--dst", str(dst), *arguments])
    told = f"{stopped.value.code} {capsys.readouterr().err}"
    assert problem in told
    assert not dst.exists()
