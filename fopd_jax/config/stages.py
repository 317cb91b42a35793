"""The stages' configs, as one type."""

from fopd_jax.config.learning import GRPO, ForwardRL
from fopd_jax.config.schema import OPD, FlowMatching

StageConfig = OPD | FlowMatching | GRPO | ForwardRL
"""A config of any of the stages there are."""
