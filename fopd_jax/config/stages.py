"""The stages' configs, as one type, and what several of them have in common."""

from fopd_jax.config.learning import GRPO, ForwardRL, Reinforced
from fopd_jax.config.schema import OPD, Config, FlowMatching

StageConfig = OPD | FlowMatching | GRPO | ForwardRL
"""A config of any of the stages there are."""


def taught(config: OPD) -> tuple[str, ...]:
    """The tasks whose teachers there are, in the panel's order: under 'classifier' some tasks may have none."""
    labelled = config.routing.method != "classifier"
    return tuple(name for name, task in config.tasks.items() if task.teacher or task.network or labelled)


def is_mixed(config: Config) -> bool:
    """Whether a config distils and trains on rewards at once."""
    return isinstance(config, OPD) and config.objective.name == "mixed"


def trains_on_rewards(config: Config) -> bool:
    """Whether its images are scored while it trains."""
    return isinstance(config, Reinforced) or is_mixed(config)
