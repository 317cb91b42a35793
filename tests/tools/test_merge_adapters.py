"""`tools/merge_adapters.py`: the sum it says, what the new file says of itself, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter, delta, rank_of
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from fopd_jax.interop.lora.cards import read_card


@pytest.fixture
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/merge_adapters.py")


def save(path: Path, seed: int, base: str = "abc", rank: int = 2) -> str:
    draw = np.random.default_rng(seed)
    weights = {"layer": {"a": draw.standard_normal((8, rank), np.float32),
                         "b": draw.standard_normal((rank, 6), np.float32)}}  # fmt: skip
    save_adapter(path, Adapter(weights, 0.5), {"preset": "miniature"}, AdapterCard("flow_grpo", base=base))
    return str(path)


def update(path: str | Path) -> np.ndarray:
    return np.asarray(delta(load_adapter(Path(path))[0])["layer"])


def test_at_a_rank_that_holds_it_the_sum_is_exact(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = save(tmp_path / "one", 0), save(tmp_path / "two", 1, rank=3)
    dst = tmp_path / "merge"
    tool.main(["--src", one, two, "--dst", str(dst), "--weights", "0.25", "0.75", "--rank=5"])
    np.testing.assert_allclose(update(dst), 0.25 * update(one) + 0.75 * update(two), rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().out == f"{dst}: svd of 2 adapters; rank 5 keeps 100.0% of the sum\n"
    card = read_card(dst)
    assert card is not None
    assert (card.algorithm, card.base, dict(card.scores)) == ("merge (svd)", "abc", {})


def test_by_default_they_count_alike_at_the_firsts_rank(tool: ModuleType, tmp_path: Path) -> None:
    one, two = save(tmp_path / "one", 0), save(tmp_path / "two", 1)
    tool.main(["--src", one, two, "--dst", str(dst := tmp_path / "merge")])
    merged, _ = load_adapter(dst)
    assert (rank_of(merged), merged.scale) == (2, 0.5)
    u, s, v = np.linalg.svd((update(one) + update(two)) / 2)
    np.testing.assert_allclose(update(dst), (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one"], "--src: found 1 adapter, expected at least 2"),
        (["one", "two", "--weights", "1"], "--weights: found 1, expected 2, one a source"),
        (["one", "other"], "--src: found adapters of different bases"),
        (["one", "two", "--density=0"], "--density: found 0, expected above 0"),
        (["one", "two", "--rank=-1"], "--rank: found -1, expected 0"),
        (["one", "nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], message: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "one", 0)
    save(tmp_path / "two", 1)
    save(tmp_path / "other", 2, "another")
    named = [str(tmp_path / word) if not word.startswith("-") and word.isalpha() else word for word in words]
    with pytest.raises(SystemExit) as ended:
        tool.main(["--dst", str(tmp_path / "merge"), "--src", *named])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "merge").exists()
