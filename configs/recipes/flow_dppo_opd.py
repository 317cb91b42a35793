"""Flow-DPPO (arXiv 2606.11025) as the trust region of on-policy distillation: several updates a rollout.

    python -m fopd_jax.main --config=configs/recipes/flow_dppo_opd.py
    python -m fopd_jax.main --config=configs/recipes/flow_dppo_opd.py:miniature

Theirs: no ratio is clipped; a step is left out where it moves away from the policy that drew it and their exact
divergence has reached 1e-5; noise of .7; each rollout is gone through more than once.
Guessed: all about distillation, since they train on rewards alone. The surrogate's reward is the teachers', attached,
so that a step that is left out teaches nothing; four updates on two halves of a rollout; noise in all of ten steps,
where theirs is in three of the first five (`--config.sampler.window="(0,3)"`); teachers, weights, anchor and start are
Flow-OPD's. Flow-Factory masks from 1e-6 on:
    --config.objective.divergence=1e-6

Cost: four updates of 64 images where `configs/sd35m_opd.py` has one of 128; each image is trained on twice.
Cost on 2 CPU cores: `:miniature` by its FLOPs 1.75 times what `configs/miniature.py` costs.
Result, published: none of both together. In miniature: docs/teaching.md.
"""

from fopd_jax.config.recipes import recipe
from fopd_jax.config.schema import EMA, OPD, Objective


@recipe
def get_config(config: OPD, miniature: bool) -> None:
    """Masked, and twice through each rollout."""
    weighting = "uniform" if miniature else "kl"
    config.objective = Objective("clipped", weighting=weighting, surrogate="dppo", divergence=1e-5)
    config.updates_per_rollout, config.minibatches = 4, 2
    if not miniature:
        config.ema = EMA(every=2)  # four updates a step
