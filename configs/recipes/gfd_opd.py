"""GFD-OPD (arXiv 2609.39692): the teachers' guidance folded into the student, and targets beyond the teachers.

    python -m fopd_jax.main --config=configs/recipes/gfd_opd.py
    python -m fopd_jax.main --config=configs/recipes/gfd_opd.py:miniature

Theirs: the student's conditional velocity learns the teachers' guided one; targets are v_T + (λ - 1)·(v_T - v_R), λ =
1.25; rollouts of ten steps with noise in two of them; sampling at a guidance of 2.
Guessed: rollouts are without guidance, v_R is the base, the loss is direct with plain weights, the noise stands in
the third and fourth step. Theirs is full fine-tuning at 1024 px, 48 samples an update, rate 5e-6:
    --config.trained=params --config.optimizer.learning_rate=5e-6 --config.batch_size=48 --config.model.resolution=1024
Not here: their teachers are adapters on SD3.5-Large (configs/sd35m_large.py); these are on Medium itself.
The miniature knows no guidance: there its teachers are asked under 1.25, and the student samples without.

Cost: the student's forward once instead of twice; a forward of the base beside each teacher's.
Cost on 2 CPU cores: `:miniature` by its FLOPs 1.5 times what `configs/miniature.py` costs.
Result, published: GenEval .963, OCR .973, PickScore/26 .930 with the large teachers; from Medium's own .884 and .908
without folding, .952 and .954 with it. In miniature: docs/teaching.md.
"""

from fopd_jax.config.recipes import recipe
from fopd_jax.config.schema import OPD, Objective


@recipe
def get_config(config: OPD, miniature: bool) -> None:
    """Folded, extrapolated, noise in a window."""
    config.objective = Objective("direct", weighting="uniform", mar_beta=0.0, match="conditional")
    config.guidance, config.cold_start.method = 1.0, "none"
    config.sampler.window = (1, 3) if miniature else (2, 4)
    for task in config.tasks.values():
        task.extrapolation = 0.25
        task.guidance = 1.25 if miniature else task.guidance
    if not miniature:
        config.eval.guidance = 2.0
