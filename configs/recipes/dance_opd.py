"""DanceOPD (arXiv 2606.27377): one query a rollout, at a state of little noise, and the plain error of velocities.

    python -m fopd_jax.main --config=configs/recipes/dance_opd.py
    python -m fopd_jax.main --config=configs/recipes/dance_opd.py:miniature

Theirs: hard routing, deterministic rollouts of ten steps without guidance, one trained state each, drawn towards the
end of the rollout, mean squared error of velocities, no anchor.
Guessed: the draw. Theirs is Beta(5, 2) over the states, which puts 94% on the last five trained ones; here these are
drawn alike (in miniature, of four, the last three). The start is the base. Batch, rate and length are those of
`configs/sd35m_opd.py`.

Cost: ten forwards of the rollout, and one of the student with its backward and one of a teacher, without guidance:
about a fifth of `configs/sd35m_opd.py`'s for each image.
Cost on 2 CPU cores: `:miniature` by its FLOPs .35 times what `configs/miniature.py` costs.
Result, published: GenEval .924, and .684 once prompts are rewritten (in CapField's table). In miniature:
docs/teaching.md.
"""

from fopd_jax.config.recipes import recipe
from fopd_jax.config.schema import OPD, Objective


@recipe
def get_config(config: OPD, miniature: bool) -> None:
    """One timestep of a deterministic rollout."""
    config.objective = Objective("direct", weighting="uniform", mar_beta=0.0)
    config.sampler.transition, config.cold_start.method, config.one_timestep = "ode", "none", True
    config.sampler.trained = (2, 5) if miniature else (4, 9)
    config.guidance = 1.0
