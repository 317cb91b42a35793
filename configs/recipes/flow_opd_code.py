"""Flow-OPD as its authors' released program runs it, where that is not what they write.

    python -m fopd_jax.main --config=configs/recipes/flow_opd_code.py
    python -m fopd_jax.main --config=configs/recipes/flow_opd_code.py:miniature

Theirs: |dt| is forgotten in the variance of the weights (`kl_no_dt`), β .04, 16 prompts of 16 images in two updates
of one half each, the merge averages the factors a and b apart, the average counts optimizer updates.
Not theirs, on purpose: what are errors there. Samples' credit is not mixed by broadcasting, groups whose task reward
has no variance are not dropped, tasks share a batch instead of alternating by epoch
(as theirs: `--config.alternate=1`).
Guessed: nothing.

Cost: an update has 256 images where `configs/sd35m_opd.py` has 128, and goes through each rollout once more.
Cost on 2 CPU cores: `:miniature` by its FLOPs 1.25 times what `configs/miniature.py` costs.
Result, published: none of the program's own. In miniature: docs/teaching.md.
"""

from fopd_jax.config.recipes import recipe
from fopd_jax.config.schema import EMA, OPD, Objective


@recipe
def get_config(config: OPD, miniature: bool) -> None:
    """The program's batch, weights and anchor."""
    config.objective = Objective("clipped", reward="kl", weighting="kl_no_dt", clip=1e-4, mar_beta=0.04)
    config.cold_start.merge = "factors"
    config.images_per_prompt, config.updates_per_rollout, config.minibatches = 16, 2, 2
    if not miniature:
        config.batch_size, config.ema = 256, EMA(every=4)  # two updates a step
