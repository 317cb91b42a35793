"""pretrain (draft)"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    c = ConfigDict()
    c.name = "miniature_pretrain"
    c.stage = "flow_matching"
    c.preset = "miniature"
    c.seed = 0
    c.steps = 12000
    c.log_every, c.checkpoint_every, c.eval_every, c.keep_checkpoints = 50, 500, 500, 2
    c.base = ""
    c.trained = "params"
    c.attention, c.dtype = "xla", "float32"
    c.shift = 3.0
    c.levels = ConfigDict({"mean": 0.0, "std": 1.0, "shift": 3.0})
    c.data = ConfigDict(
        {
            "batch_size": 64,
            "tasks": {"text": 1.0, "composition": 1.0},
            "clean_steps": 1000000,
            "wrong_caption": 0.35,
            "degraded": 0.5,
            "empty_caption": 0.1,
        }
    )
    c.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "warmup": 100, "betas": (0.9, 0.99), "weight_decay": 1e-4, "clip_norm": 1.0}
    )
    c.ema = ConfigDict({"decay": 0.995, "every": 1})
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
