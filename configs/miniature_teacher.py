"""Fine-tune one miniature teacher: a LoRA adapter on the packaged base, by flow matching on its own skill's pairs.

    python -m fopd_jax.main --config=configs/miniature_teacher.py:text
    python -m fopd_jax.main --config=configs/miniature_teacher.py:composition
    python -m fopd_jax.main --config=configs/miniature_teacher.py:quality

Three quarters of the pairs of `text` and `composition` are their own task's, correctly captioned and cleaner than the
base saw them. The last quarter is the other task's, wrongly captioned and degraded: it stands in for the drift that
teachers of a single reward show off their task. So each learns its skill, forgets the other's, and loses quality on
the whole. `quality` sees both tasks with the base's own rate of wrong captions in much cleaner images: it learns to
draw cleanly and nothing else. Held-out prompts are in none of them.

Cost on 2 CPU cores: 1.5 minutes each alone.
Result: each teacher's row in the table of `configs/miniature.py`.
The packaged `teacher_*.safetensors` are these runs' `adapter.safetensors`.
"""

from ml_collections import ConfigDict

OWN = {"share": 0.75, "wrong_caption": 0.0, "degraded": 0.2}
DRIFT = {"share": 0.25, "wrong_caption": 1.0, "degraded": 1.0}
SKILLS = {
    "text": {"text": OWN, "composition": DRIFT},
    "composition": {"text": DRIFT, "composition": OWN},
    "quality": {
        "text": {"share": 0.5, "wrong_caption": 0.35, "degraded": 0.12},
        "composition": {"share": 0.5, "wrong_caption": 0.2, "degraded": 0.12},
    },
}


def get_config(skill: str = "text") -> ConfigDict:
    """`skill` is `text`, `composition` or `quality`."""
    if skill not in SKILLS:
        raise ValueError(f"configs/miniature_teacher.py: found skill {skill!r}, expected one of {tuple(SKILLS)}")
    config = ConfigDict()
    config.name = f"miniature_teacher_{skill}"
    config.stage = "flow_matching"
    config.seed = 0
    config.steps = 400
    config.log_every = 50
    config.checkpoint_every = 200
    config.eval_every = 200
    config.keep_checkpoints = 2
    config.keep_best = ""  # also keep the best checkpoint by an evaluation's score: "max:text"

    config.trained = "adapter"
    config.model = ConfigDict()
    config.model.preset = "miniature"
    config.model.path = "packaged:base.safetensors"
    config.model.attention = "xla"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all devices that are left
    config.adapter = ConfigDict({"rank": 32, "alpha": 64.0, "targets": ("attn",)})
    config.shift = 3.0  # of the evaluation's schedule
    config.levels = ConfigDict({"mean": 0.0, "std": 1.0, "shift": 3.0})  # logit-normal training noise levels

    config.data = ConfigDict()
    config.data.batch_size = 64
    config.data.tasks = ConfigDict(SKILLS[skill])
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
    config.eval.transition = "ode"
    config.eval.noise_level = 0.7  # of "sde" and "cps"
    config.eval.seed = 1

    # What watches over the run; none of it changes a step, and all of it may change between runs in one workdir.
    config.max_skipped_steps = 0  # updates with a loss or gradient that is not finite to leave out before stopping
    config.alarms = ConfigDict()  # metrics to warn of outside their bounds, never to stop for
    config.watchdog_seconds = 1800.0  # report a hang after as long without a step; longer while compiling; 0: never
    config.watchdog_abort = False  # and end the process, for a job manager to start it again
    return config
