"""What a step costs is the same told by a config as by the stage that would run it."""

import pytest

from fopd_jax.config.parse import resolve
from fopd_jax.stages.costs import step_cost
from tests.configs import load


@pytest.mark.parametrize(
    ("config", "variant", "tera"),
    [("sd35m_opd", "", 167), ("sd35m_grpo", "ocr", 171), ("sd35m_sft", "images", 4.8)],
)
def test_it_is_what_the_configs_say(config: str, variant: str, tera: float) -> None:
    """TFLOP an image, of their docstrings."""
    found = resolve(load(config, variant))
    assert step_cost(found).model / found.batch_size / 1e12 == pytest.approx(tera, rel=0.01)


def test_every_stage_has_one() -> None:
    for config, variant in (("miniature", ""), ("miniature_rl", "text"), ("miniature_rl", "text-nft"),
                            ("miniature_sft", "text")):  # fmt: skip
        assert step_cost(resolve(load(config, variant))).model > 0
