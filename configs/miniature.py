"""main job (draft)"""

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "") -> ConfigDict:
    c = ConfigDict()
    c.name = "miniature"
    c.stage = "opd"
    c.preset = "miniature"
    c.seed = 0
    c.steps = 60
    c.log_every, c.checkpoint_every, c.eval_every, c.keep_checkpoints = 1, 20, 20, 2
    c.base = "packaged:base.safetensors"
    c.attention, c.dtype = "xla", "float32"
    c.shift = 3.0
    c.batch_size, c.images_per_prompt = 64, 1
    c.updates_per_rollout, c.minibatches = 1, 1
    c.sampler = ConfigDict(
        {"num_steps": 6, "transition": "sde", "noise_level": 0.7, "window": config_dict.placeholder(tuple)}
    )
    c.objective = ConfigDict(
        {
            "name": "clipped",
            "reward": "kl",
            "weighting": "kl",
            "clip": 1e-4,
            "reward_limit": 5.0,
            "mar_beta": 0.02,
            "window_only": False,
        }
    )
    c.guidance = 1.0
    c.tasks = ConfigDict({"text": 1.0, "composition": 1.0})
    c.teachers = ConfigDict(
        {
            "text": {"adapter": "packaged:teacher_text.safetensors", "guidance": 1.0},
            "composition": {"adapter": "packaged:teacher_composition.safetensors", "guidance": 1.0},
        }
    )
    c.anchor = ConfigDict({"name": "quality", "adapter": "packaged:teacher_quality.safetensors", "guidance": 1.0})
    c.adapter = ConfigDict({"rank": 32, "alpha": 64.0, "targets": ("attn",)})
    c.cold_start = ConfigDict(
        {"method": "merge", "merge": "svd", "weights": {"text": 1 / 3, "composition": 1 / 3, "quality": 1 / 3}}
    )
    c.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "warmup": 5, "betas": (0.9, 0.999), "weight_decay": 1e-4, "clip_norm": 1.0}
    )
    c.ema = ConfigDict({"decay": 0.9, "every": 1})
    c.export = "ema"
    c.final_samples = 1024
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
