"""Reinforcement learning from an adapter that was trained before; the base stays the reference."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import delta, rank_of
from fopd_jax.config.parse import resolve
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from fopd_jax.stages.pipeline import weight_path
from fopd_jax.stages.reinforced import start_of
from tests.configs import load, prepare

TEACHER = "packaged:teacher_text.safetensors"


def config_of(variant: str, **changes: Any) -> Any:
    return resolve(load("miniature_rl", f"{variant}:smoke", **changes))


@pytest.mark.parametrize("variant", ["text", "text-nft"])
def test_it_starts_as_the_adapter_and_tells_of_it(variant: str, tmp_path: Path) -> None:
    teacher, _ = load_adapter(weight_path(TEACHER))
    config = config_of(variant, start=TEACHER, **{"adapter.rank": 32})
    stage = prepare(config, tmp_path)
    given = start_of(config, stage.pipeline, stage.base, stage.given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), delta(given), delta(teacher))
    if variant == "text":
        stage.finish(stage.start())
        found = json.loads((tmp_path / "results.json").read_text())["models"]
        assert {*found} == {"base", "start", "policy"}
        assert found["start"] == found["policy"] != found["base"]
    stage.close()


def test_without_one_nothing_is_other_than_it_was(tmp_path: Path) -> None:
    stage = prepare(config_of("text"), tmp_path)
    assert all(
        not np.any(leaf)
        for leaf in jax.tree.leaves(delta(start_of(stage.config, stage.pipeline, stage.base, stage.given)))
    )
    stage.close()


def test_what_a_smaller_rank_loses_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stage = prepare(config_of("text", start=TEACHER, **{"adapter.rank": 4}), tmp_path)
    found = start_of(stage.config, stage.pipeline, stage.base, stage.given)
    assert rank_of(found) == 4
    assert re.search(r"start: rank 4 keeps [0-9.]+% of the adapter, [0-9.]+% at worst", capfd.readouterr().err)
    assert stage.outputs["samples.png"] == "base, start and policy on the same prompts"
    stage.close()


def test_what_nobody_can_start_from_is_refused(tmp_path: Path) -> None:
    teacher, metadata = load_adapter(weight_path(TEACHER))
    other = tmp_path / "other.safetensors"
    save_adapter(other, teacher, metadata, AdapterCard("flow_grpo", base="0" * 64, preset="miniature"))
    narrow = {"adapter.targets": ("attn2",)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"start": str(tmp_path / "nowhere")}, r"^start: .*nowhere"),
        ({"start": str(other)}, r"^start: .*other\.safetensors: trained on another base"),
        ({"start": TEACHER, **narrow}, r"^start: .*adapter.targets leaves that layer out"),
        ({"start": TEACHER, "trained": "params"}, r"^start: found .* expected none: trained is 'params'"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare(config_of("text", **changes), tmp_path / "run")
