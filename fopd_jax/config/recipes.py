"""Published recipes as changes to the two main configs: of Stable Diffusion 3.5 Medium, and of the miniature."""

from collections.abc import Callable
from pathlib import Path

from fopd_jax.config.load import load_config
from fopd_jax.config.schema import OPD
from fopd_jax.config.variants import smoke, split_variant

Change = Callable[[OPD, bool], None]
"""`change(config, miniature)`: what a recipe does otherwise; `miniature`: of which of the two."""
MINIATURE = "miniature"


def recipe(change: Change) -> Callable[..., OPD]:
    """A `get_config(variant)` for a file in `configs/recipes/`, which names the recipe.

    `variant`: nothing for `configs/sd35m_opd.py` with the change, `miniature` for `configs/miniature.py` with it; with
    `:smoke` behind either as small as can be.
    """
    file = Path(change.__globals__["__file__"])

    def get_config(variant: str = "") -> OPD:
        choice, small = split_variant(variant, ("", MINIATURE))
        miniature = choice == MINIATURE
        config = load_config(file.parents[1] / ("miniature.py" if miniature else "sd35m_opd.py"))
        assert isinstance(config, OPD)
        config.name = f"{file.stem}_{MINIATURE if miniature else 'sd35m'}"
        change(config, miniature)
        return smoke(config) if small else config

    return get_config
