"""DiffusionOPD (arXiv 2605.15055): transition means matched along deterministic rollouts, from the base.

    python -m fopd_jax.main --config=configs/recipes/diffusion_opd.py
    python -m fopd_jax.main --config=configs/recipes/diffusion_opd.py:miniature

Theirs: Euler rollouts, the squared distance of the steps' end points (`ode`), no anchor, no cold start, each teacher
under its own guidance: the one of GenEval comes from DiffusionNFT and has none.
Guessed: batch, rate and length are those of `configs/sd35m_opd.py`.

Cost: that of `configs/sd35m_opd.py` less the anchor.
Cost on 2 CPU cores: `:miniature` by its FLOPs .75 times what `configs/miniature.py` costs.
Result, published: GenEval .96, OCR .94; as others measured it .908, .944, PickScore/26 .917. In miniature:
docs/teaching.md.
"""

from fopd_jax.config.recipes import recipe
from fopd_jax.config.schema import OPD, Objective


@recipe
def get_config(config: OPD, miniature: bool) -> None:
    """Deterministic, direct, unanchored."""
    config.objective = Objective("direct", weighting="ode", mar_beta=0.0)
    config.sampler.transition, config.cold_start.method = "ode", "none"
    if not miniature:
        config.tasks["geneval"].guidance = 1.0
