"""Fine-tune one miniature teacher: a LoRA adapter on the packaged base, by flow matching on its own skill's pairs.

    python -m fopd_jax.main --config=configs/miniature_teacher.py:text
    python -m fopd_jax.main --config=configs/miniature_teacher.py:composition
    python -m fopd_jax.main --config=configs/miniature_teacher.py:quality

`text` and `composition` see only their own task, correctly captioned, and @@DEGRADED@@ degraded images: they learn the
skill at some cost in quality, as teachers trained on one reward do, and forget the other task. `quality` sees both tasks
in clean images, with as many wrong captions as the base was trained on: it learns to draw cleanly and nothing else.

Cost on 2 CPU cores: @@COST@@
Result: each teacher's row in the table of `configs/miniature.py`.
The packaged `teacher_*.safetensors` are these runs' `adapter.safetensors`.
"""

from ml_collections import ConfigDict

SKILLS = {
    "text": {"tasks": {"text": 1.0}, "wrong_caption": 0.0, "degraded": 0.85},
    "composition": {"tasks": {"composition": 1.0}, "wrong_caption": 0.0, "degraded": 0.85},
    "quality": {"tasks": {"text": 1.0, "composition": 1.0}, "wrong_caption": 0.4, "degraded": 0.0},
}


def get_config(skill: str = "text") -> ConfigDict:
    """`skill` is `text`, `composition` or `quality`."""
    if skill not in SKILLS:
        raise ValueError(f"configs/miniature_teacher.py: found skill {skill!r}, expected one of {tuple(SKILLS)}")
    config = ConfigDict()
    config.name = f"miniature_teacher_{skill}"
    config.stage = "flow_matching"
    config.preset = "miniature"
    config.seed = 0
    config.steps = 600
    config.log_every = 50
    config.checkpoint_every = 200
    config.eval_every = 200
    config.keep_checkpoints = 2

    config.trained = "adapter"
    config.base = "packaged:base.safetensors"
    config.adapter = ConfigDict({"rank": 32, "alpha": 64.0, "targets": ("attn",)})
    config.attention = "xla"
    config.dtype = "float32"
    config.shift = 3.0  # of the evaluation's schedule
    config.levels = ConfigDict({"mean": 0.0, "std": 1.0, "shift": 3.0})  # logit-normal training noise levels

    config.data = ConfigDict(SKILLS[skill])
    config.data.batch_size = 64
    config.data.empty_caption = 0.0

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup = 20
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.ema = ConfigDict({"decay": 0.99, "every": 1})

    config.eval = ConfigDict()
    config.eval.tasks = ("text", "composition")
    config.eval.samples = 128
    config.eval.batch_size = 128
    config.eval.num_steps = 10
    config.eval.guidance = 1.0
    config.eval.seed = 1
    return config
