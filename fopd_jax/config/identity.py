"""What identifies an experiment: every field of its config but those that change no step of its training."""

import hashlib
import json
from typing import Any

from ml_collections import ConfigDict

Config = Any
"""An `ml_collections.ConfigDict`; its fields are dynamic, so type checkers cannot know them."""

EXTENDABLE = (
    "steps", "log_every", "checkpoint_every", "eval_every", "keep_checkpoints", "mesh", "conditioning_cache",
    "encode_batch_size", "resident_encoders", "keep_best", "max_skipped_steps", "alarms", "watchdog_seconds",
    "watchdog_abort",
)  # fmt: skip
"""Fields, or groups of them, under whose new values a run may be resumed or extended."""


def identity(config: Config) -> dict[str, Any]:
    """Flat `{dotted field: value}` in JSON types, without the extendable fields."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, ConfigDict):
            for key, value in node.items():
                visit(f"{prefix}{key}.", value)
        else:
            flat[prefix[:-1]] = node

    visit("", config)
    return json.loads(json.dumps({name: value for name, value in flat.items() if name.split(".")[0] not in EXTENDABLE}))


def with_batch(config: Config, batch_size: int) -> Config:
    """The config at another batch size."""
    config = config.copy_and_resolve_references()
    config.batch_size = batch_size
    return config


def with_teachers(config: Config, count: int) -> Config:
    """The config with so many tasks, its own in turn, to compile or time a bank of any size."""
    config = config.copy_and_resolve_references()
    tasks = list(config.tasks.values())
    with config.unlocked():
        config.tasks = ConfigDict({f"task{k}": tasks[k % len(tasks)] for k in range(count)})
    return config


def config_hash(config: Config) -> str:
    """SHA-256 of the identity, first 16 hex digits."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]
