"""CapField-OPD: one student with a dial per skill, its coordinates; see `fopd_jax/policy/coordinates.py`.

    python -m fopd_jax.main --config=configs/recipes/capfield_opd.py
    python -m fopd_jax.main --config=configs/recipes/capfield_opd.py:miniature
    python -m fopd_jax.sample --config=configs/recipes/capfield_opd.py:miniature --adapter=FILE --dial=text=1.5 …

Theirs: coordinates as extra conditioning through a zero-initialised network, targets of base, task and joint teachers
by them, coordinates beyond 1 at use.
Guessed: how coordinates are drawn, the size of the network (rank 32), and what is taught where several skills stand
together: the prompt's own teacher, since no joint teacher is at hand. The loss is DiffusionOPD's. Theirs adapts
FLUX.1-dev.

Cost: every sample asks all teachers and the base.
Cost on 2 CPU cores: `:miniature` by its FLOPs 1.3 times what `configs/miniature.py` costs.
Result, published (FLUX.1-dev): GenEval .953, OCR .959, HPSv3 15.3; .927 on rewritten prompts, where DiffusionOPD
falls from .951 to .624. In miniature: docs/teaching.md.
"""

from fopd_jax.config.recipes import recipe
from fopd_jax.config.schema import OPD, Objective


@recipe
def get_config(config: OPD, miniature: bool) -> None:
    """Coordinates, on a deterministic rollout."""
    config.objective = Objective("direct", weighting="uniform" if miniature else "ode", mar_beta=0.0)
    config.sampler.transition, config.coordinates.rank = "ode", 32
