"""Flow-OPD as last published (arXiv 2605.08063v5): the dense loss itself, no policy gradient, and the anchor.

    python -m fopd_jax.main --config=configs/recipes/flow_opd_v5.py
    python -m fopd_jax.main --config=configs/recipes/flow_opd_v5.py:miniature

Theirs: the direct objective on the student's own rollout, weighted by the divergence of the SDE's transitions, β .02,
the start from the teachers' average.
Guessed: as `configs/sd35m_opd.py` marks.

Cost: that of `configs/sd35m_opd.py`.
Cost on 2 CPU cores: `:miniature` by its FLOPs what `configs/miniature.py` costs.
Result, published: as v1's; the text changed, the table did not. In miniature: docs/teaching.md.
"""

from fopd_jax.config.recipes import recipe
from fopd_jax.config.schema import OPD, Objective


@recipe
def get_config(config: OPD, miniature: bool) -> None:
    """The loss is direct, the rest as ever."""
    config.objective = Objective("direct", weighting="kl", mar_beta=0.02)
