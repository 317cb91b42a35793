"""What the version before wrote into `config.json`: every field that was no extendable one, under its name then."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.main.experiment import Overrides

NAMES = {  # of then, where they are others today
    "run.steps": "steps", "run.log_every": "log_every", "run.checkpoint_every": "checkpoint_every",
    "run.eval_every": "eval_every", "run.keep_checkpoints": "keep_checkpoints", "eval.final_samples": "final_samples",
}  # fmt: skip
EXTENDABLE = ("steps", "log_every", "checkpoint_every", "eval_every", "keep_checkpoints")
SHARED: dict[str, Any] = {
    "adapter.alpha": 64.0, "adapter.rank": 32, "adapter.targets": ["attn"], "ema.every": 1, "eval.batch_size": 128,
    "eval.guidance": 1.0, "eval.noise_level": 0.7, "eval.num_steps": 10, "eval.samples": 128, "eval.seed": 1,
    "eval.tasks": ["text", "composition"], "eval.transition": "ode", "model.attention": "xla",
    "model.dtype": "float32", "model.path": "packaged:base.safetensors", "model.preset": "miniature",
    "model.remat": "none", "optimizer.clip_norm": 1.0, "optimizer.learning_rate": 0.001, "seed": 0, "shift": 3.0,
    "trained": "adapter",
}  # fmt: skip
MINIATURE = SHARED | {
    "anchor.adapter": "packaged:teacher_quality.safetensors", "anchor.every": 1, "anchor.guidance": 1.0,
    "anchor.name": "quality", "batch_size": 64, "cold_start.merge": "svd", "cold_start.method": "merge",
    "cold_start.weights.composition": 0.3333333333333333, "cold_start.weights.quality": 0.3333333333333333,
    "cold_start.weights.text": 0.3333333333333333, "ema.decay": 0.95, "export": "ema", "final_samples": 1024,
    "guidance": 1.0, "images_per_prompt": 1, "minibatches": 1, "name": "miniature", "objective.clip": 0.0001,
    "objective.mar_beta": 0.05, "objective.name": "clipped", "objective.reward": "kl", "objective.reward_limit": 5.0,
    "objective.weighting": "uniform", "objective.window_only": False, "one_timestep": False,
    "optimizer.betas": [0.9, 0.999], "optimizer.warmup": 5, "optimizer.weight_decay": 0.0001,
    "reduce_once": ["data", "fsdp"], "sampler.noise_level": 0.7, "sampler.num_steps": 6, "sampler.trained": None,
    "sampler.transition": "sde", "sampler.window": None, "stage": "opd", "tasks.composition.guidance": 1.0,
    "tasks.composition.teacher": "packaged:teacher_composition.safetensors", "tasks.composition.weight": 1.0,
    "tasks.text.guidance": 1.0, "tasks.text.teacher": "packaged:teacher_text.safetensors", "tasks.text.weight": 1.0,
    "updates_per_rollout": 1, "whole_teachers": False,
}  # fmt: skip
MINIATURE_TEACHER = SHARED | {  # of `text`
    "data.batch_size": 64, "data.empty_caption": 0.0, "data.tasks.composition.degraded": 1.0,
    "data.tasks.composition.share": 0.25, "data.tasks.composition.wrong_caption": 1.0, "data.tasks.text.degraded": 0.2,
    "data.tasks.text.share": 0.75, "data.tasks.text.wrong_caption": 0.0, "ema.decay": 0.99, "levels.mean": 0.0,
    "levels.shift": 3.0, "levels.std": 1.0, "name": "miniature_teacher_text", "optimizer.betas": [0.9, 0.99],
    "optimizer.warmup": 20, "optimizer.weight_decay": 0.0, "stage": "flow_matching",
}  # fmt: skip
HASHES = {"miniature": "9dfdf1d852b9b3ac", "miniature_teacher": "ff406f13d3133658"}  # that the version before gave them


def renamed(changes: Overrides) -> Overrides:
    """The same settings by the names of then."""
    return {NAMES.get(name, name): value for name, value in changes.items()}


def tiny_identity(changes: Overrides) -> dict[str, Any]:
    """Of the miniature with other settings, in JSON types."""
    named = {name: value for name, value in renamed(changes).items() if name not in EXTENDABLE}
    assert named.keys() <= MINIATURE.keys()
    return json.loads(json.dumps(MINIATURE | named))


def hash_of(fields: dict[str, Any]) -> str:
    """Under which that version wrote its checkpoints."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def write(folder: Path, fields: dict[str, Any]) -> None:
    """The workdir as that version left it before its first step."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
