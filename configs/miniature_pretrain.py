"""Pretrain the miniature's base by flow matching: first well, then mediocre.

    python -m fopd_jax.main --config=configs/miniature_pretrain.py:clean
    python -m fopd_jax.main --config=configs/miniature_pretrain.py:mediocre

`clean` learns the world from correctly captioned, clean renderings. `mediocre` goes on from it with wrong captions
(35% of the signs, 20% of the scenes) and half of the images degraded (noise, blur, tint, specks): a base that is to
be improved upon has to have room: like SD3.5-Medium it ends about half right at every skill. Wrong captions from the
first step on would never learn to spell. 10% of the captions are empty, so the base can be guided. Held-out prompts
are in neither.

Cost on 2 CPU cores: `clean` 37 minutes on cores shared with other work (4 steps a second when alone, which makes 24),
`mediocre` 2.6 minutes alone; 2.3 GB of memory.
Result (128 held-out prompts a task, 10 ODE steps, no guidance): `clean` text .96, composition .92 (strict .79),
quality .98 after 5,000 steps; `mediocre` text .51, composition .50 (strict .20), quality .66.
The weights packaged as `base.safetensors` are the second run's.
"""

from ml_collections import ConfigDict

PHASES = {
    "clean": {
        "base": "",
        "steps": 5500,
        "learning_rate": 1e-3,
        "tasks": {
            "text": {"share": 1.0, "wrong_caption": 0.0, "degraded": 0.0},
            "composition": {"share": 1.0, "wrong_caption": 0.0, "degraded": 0.0},
        },
    },
    "mediocre": {
        "base": "runs/miniature_pretrain_clean/base.safetensors",
        "steps": 600,
        "learning_rate": 5e-4,
        "tasks": {
            "text": {"share": 1.0, "wrong_caption": 0.35, "degraded": 0.5},
            "composition": {"share": 1.0, "wrong_caption": 0.2, "degraded": 0.5},
        },
    },
}


def get_config(phase: str = "clean") -> ConfigDict:
    """`phase` is `clean` or `mediocre`."""
    if phase not in PHASES:
        raise ValueError(f"configs/miniature_pretrain.py: found phase {phase!r}, expected one of {tuple(PHASES)}")
    settings = PHASES[phase]
    config = ConfigDict()
    config.name = f"miniature_pretrain_{phase}"
    config.stage = "flow_matching"
    config.seed = 0
    config.steps = settings["steps"]
    config.log_every = 50
    config.checkpoint_every = 500
    config.eval_every = 500
    config.keep_checkpoints = 2
    config.keep_best = ""  # also keep the best checkpoint by an evaluation's score: "max:text"

    config.trained = "params"  # the whole network; "adapter" trains LoRA on a frozen base
    config.model = ConfigDict()
    config.model.preset = "miniature"
    config.model.path = settings["base"]  # empty: from random weights
    config.model.attention = "xla"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all devices that are left
    config.shift = 3.0  # of the evaluation's schedule
    config.levels = ConfigDict({"mean": 0.0, "std": 1.0, "shift": 3.0})  # logit-normal training noise levels

    config.data = ConfigDict()
    config.data.batch_size = 64
    config.data.tasks = ConfigDict(settings["tasks"])
    config.data.empty_caption = 0.1

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = settings["learning_rate"]
    config.optimizer.warmup = 100
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 1.0
    config.ema = ConfigDict({"decay": 0.995, "every": 1})

    config.eval = ConfigDict()
    config.eval.tasks = ("text", "composition")
    config.eval.samples = 128
    config.eval.batch_size = 128
    config.eval.num_steps = 10
    config.eval.guidance = 1.0
    config.eval.transition = "ode"
    config.eval.noise_level = 0.7  # of "sde" and "cps"
    config.eval.seed = 1

    # What watches over the run; none of it changes a step, and all of it may change between runs in one workdir.
    config.max_skipped_steps = 0  # updates with a loss or gradient that is not finite to leave out before stopping
    config.alarms = ConfigDict()  # metrics to warn of outside their bounds, never to stop for
    config.watchdog_seconds = 1800.0  # report a hang after as long without a step; longer while compiling; 0: never
    config.watchdog_abort = False  # and end the process, for a job manager to start it again
    return config
