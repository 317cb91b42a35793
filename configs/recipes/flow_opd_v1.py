"""Flow-OPD as first published (arXiv 2605.08063v1): dense rewards in PPO's clipped surrogate, and the anchor.

    python -m fopd_jax.main --config=configs/recipes/flow_opd_v1.py
    python -m fopd_jax.main --config=configs/recipes/flow_opd_v1.py:miniature

Theirs: the clipped objective with ε = 1e-4, divergences of the SDE's transitions as weights, ten steps at noise .7, β
.02 towards the teacher of image quality, the start from the teachers' average.
Guessed: nothing but what `configs/sd35m_opd.py` marks [code] or [ours]. Not theirs: the dense reward is attached, as
their code has it; as the text writes it (`--config.objective.reward=kl_detached`) its mean gradient is zero and
nothing is learnt.

Cost: that of `configs/sd35m_opd.py`.
Cost on 2 CPU cores: `:miniature` by its FLOPs what `configs/miniature.py` costs.
Result, published: GenEval .92, OCR .94, DeQA 4.35, PickScore 23.08. In miniature: docs/teaching.md.
"""

from fopd_jax.config.recipes import recipe
from fopd_jax.config.schema import OPD, Objective


@recipe
def get_config(config: OPD, miniature: bool) -> None:
    """The defaults, named."""
    config.objective = Objective("clipped", reward="kl", weighting="kl", clip=1e-4, mar_beta=0.02)
