"""teacher (draft)"""

from ml_collections import ConfigDict


def get_config(variant: str = "text") -> ConfigDict:
    c = ConfigDict()
    c.name = f"miniature_teacher_{variant}"
    c.stage = "flow_matching"
    c.preset = "miniature"
    c.seed = 0
    c.steps = 600
    c.log_every, c.checkpoint_every, c.eval_every, c.keep_checkpoints = 50, 200, 200, 2
    c.base = "packaged:base.safetensors"
    c.trained = "adapter"
    c.attention, c.dtype = "xla", "float32"
    c.shift = 3.0
    c.levels = ConfigDict({"mean": 0.0, "std": 1.0, "shift": 3.0})
    tasks = {"text": {"text": 1.0}, "composition": {"composition": 1.0}, "quality": {"text": 1.0, "composition": 1.0}}[
        variant
    ]
    wrong = 0.35 if variant == "quality" else 0.0
    degraded = 0.0 if variant == "quality" else 0.5
    c.data = ConfigDict(
        {"batch_size": 64, "tasks": tasks, "wrong_caption": wrong, "degraded": degraded, "empty_caption": 0.0}
    )
    c.adapter = ConfigDict({"rank": 32, "alpha": 64.0, "targets": ("attn",)})
    c.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "warmup": 20, "betas": (0.9, 0.99), "weight_decay": 0.0, "clip_norm": 1.0}
    )
    c.ema = ConfigDict({"decay": 0.99, "every": 1})
    c.eval = ConfigDict(
        {
            "tasks": ("text", "composition"),
            "samples": 128,
            "batch_size": 128,
            "num_steps": 10,
            "guidance": 1.0,
            "seed": 1,
        }
    )
    return c
