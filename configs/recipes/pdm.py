"""PDM (arXiv 2607.24731): the branches of guidance matched apart, since guided velocities hide errors that cancel.

    python -m fopd_jax.main --config=configs/recipes/pdm.py
    python -m fopd_jax.main --config=configs/recipes/pdm.py:miniature

Theirs: ‖v_c - v_c,k‖² + a·‖(v_c - v_n) - (v_c,k - v_n,k)‖².
Guessed: a = 1; everything else is `configs/sd35m_opd.py`'s with the direct objective and plain weights, and no
anchor: theirs controls video models.

Cost: the guided student's, whose two branches are there anyway.
Cost on 2 CPU cores: `:miniature` by its FLOPs 1.5 times what `configs/miniature.py` costs.
Result, published: none on images. In miniature: docs/teaching.md.
"""

from fopd_jax.config.recipes import recipe
from fopd_jax.config.schema import OPD, Objective


@recipe
def get_config(config: OPD, miniature: bool) -> None:
    """Branches apart."""
    config.objective = Objective("direct", weighting="uniform", mar_beta=0.0, match="branches", branch_weight=1.0)
