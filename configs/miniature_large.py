"""A wider and deeper network teaches the packaged student text, in miniature, beside a teacher on the student's base.

    python -m fopd_jax.main --config=configs/miniature_pretrain.py:large
    python -m fopd_jax.main --config=configs/miniature_large.py

The larger network has 7.7 million numbers, the student's 2.5; both live in the same world, whose latents are pixels.
The larger one is asked about the samples of tasks that name it, in slots of its own (fopd_jax/policy/groups.py), and is
reported as `teacher/text`, sampled with its own network. Settings:
    --config.tasks.composition.network=large --config.tasks.composition.teacher= --config.cold_start.method=none
                                                                both skills from Large
    --config.networks.large.dtype=float8_e4m3                   its weights in float8
    --config.tasks.text.extrapolation=0.25                      beyond it, away from the student's base

Cost: not measured yet. Result: none yet; `:smoke` teaches by random weights of Large.
"""

import runpy
from pathlib import Path

from fopd_jax.config.schema import OPD
from fopd_jax.config.teaching import TeacherNetwork
from fopd_jax.config.variants import smoke, split_variant


def get_config(variant: str = "") -> OPD:
    """`variant` may be `smoke`."""
    _, small = split_variant(variant)
    config = runpy.run_path(str(Path(__file__).with_name("miniature.py")))["get_config"]()
    config.name = "miniature_large"
    if small:
        smoke(config)
    config.cold_start.weights = {"composition": 0.5, "quality": 0.5}
    path = "" if small else "runs/miniature_pretrain_large/base.safetensors"
    config.networks = {"large": TeacherNetwork("miniature_large", path, "float32")}
    config.tasks["text"].network, config.tasks["text"].teacher = "large", ""
    return config
