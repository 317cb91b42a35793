"""STEP-OPD (arXiv 2608.04887): targets beyond the teachers, on the line from the base through them.

    python -m fopd_jax.main --config=configs/recipes/step_opd.py
    python -m fopd_jax.main --config=configs/recipes/step_opd.py:miniature

Theirs: v_k + λ·(v_k - v_base) as target; the rest is DiffusionOPD's, with which they compare.
Guessed: λ = .25; four works that extrapolate take 1.25 to 1.5 times the teacher's distance. Not here: their second
term, which aligns direction and size of what blocks change in the student and the teacher.

Cost: a forward of the base beside each teacher's.
Cost on 2 CPU cores: `:miniature` by its FLOPs what `configs/miniature.py` costs.
Result, published: GenEval .961 (DiffusionOPD: .927), above every teacher on all three tasks. In miniature:
docs/teaching.md.
"""

from fopd_jax.config.recipes import recipe
from fopd_jax.config.schema import OPD, Objective


@recipe
def get_config(config: OPD, miniature: bool) -> None:
    """DiffusionOPD's, with every teacher extrapolated."""
    config.objective = Objective("direct", weighting="ode", mar_beta=0.0)
    config.sampler.transition, config.cold_start.method = "ode", "none"
    for task in config.tasks.values():
        task.extrapolation = 0.25
