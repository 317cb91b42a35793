"""A wider and deeper network teaches the packaged student text, in miniature, beside a teacher on the student's base.

    python -m fopd_jax.main --config=configs/miniature_pretrain.py:large
    python -m fopd_jax.main --config=configs/miniature_large.py

The larger network has 7.7 million numbers, the student's 2.5; both live in the same world, whose latents are pixels.
The larger one is asked about the samples of tasks that name it, in slots of its own (fopd_jax/policy/groups.py), and is
reported as `teacher/text`, sampled with its own network. All else is as in configs/miniature.py.

Cost on 2 CPU cores: not measured; by arithmetic an update costs 1.2 times that of configs/miniature.py.
Result: none yet. `:smoke` asks a larger network of random weights, which teaches nothing.

Other recipes are settings:
    --config.networks.large.dtype=float8_e4m3         its weights in float8
    --config.tasks.text.extrapolation=0.25            beyond it, away from the student's base
    --config.tasks.composition.network=large --config.tasks.composition.teacher= --config.cold_start.method=none
                                                      both skills from it
"""

from fopd_jax.config.schema import (
    EMA,
    OPD,
    Anchor,
    ColdStart,
    Evaluation,
    Model,
    Objective,
    Optimizer,
    RoutedTask,
    Run,
    Sampler,
)
from fopd_jax.config.teaching import TeacherNetwork
from fopd_jax.config.variants import smoke, split_variant


def get_config(variant: str = "") -> OPD:
    """`variant` may be `smoke`."""
    _, small = split_variant(variant)
    config = OPD(
        name="miniature_large",
        model=Model(preset="miniature", path="packaged:base.safetensors", dtype="float32"),
        tasks={
            "text": RoutedTask(guidance=1.0, network="large"),
            "composition": RoutedTask("packaged:teacher_composition.safetensors", guidance=1.0),
        },
        networks={
            "large": TeacherNetwork("miniature_large", "runs/miniature_pretrain_large/base.safetensors", "float32")
        },
        anchor=Anchor("quality", "packaged:teacher_quality.safetensors", guidance=1.0),
        guidance=1.0,
        batch_size=64,
        cold_start=ColdStart(weights={"composition": 0.5, "quality": 0.5}),
        sampler=Sampler(num_steps=6),
        objective=Objective(weighting="uniform"),
        optimizer=Optimizer(learning_rate=1e-3, warmup=5),
        ema=EMA(decay=0.95, every=1),
        eval=Evaluation(samples=128, batch_size=128, num_steps=10, guidance=1.0, final_samples=1024),
        run=Run(steps=120, eval_every=40, attention="xla", remat="none", alarms={"ratio": (0.9, 1.1)}),
    )
    if small:
        smoke(config)
        config.tasks["text"] = RoutedTask(guidance=1.0, network="large")
        config.networks["large"] = TeacherNetwork("miniature_large", dtype="float32")
        config.cold_start.weights = {"composition": 0.5, "quality": 0.5}
    return config
