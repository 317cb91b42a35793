"""The main job: Flow-OPD's second stage in miniature, end to end, on a laptop CPU with nothing to download.

    python -m fopd_jax.main --config=configs/miniature.py

Loads the packaged base and teachers, starts the student from their merge, distils it on-policy, and reports base,
teachers, merge and student on the same held-out (prompt, noise) pairs.

Cost on 2 CPU cores: 4.1-5.7 minutes, up to 1.9 GiB of memory.
Result: mean of seeds 0, 1, 2 over 1,024 pairs a task (quality: 2,048)
                        text  composition  strict  quality
    base                0.520        0.589   0.215    0.653
    teacher/text        0.876        0.119   0.002    0.612
    teacher/composition 0.145        0.848   0.637    0.617
    teacher/quality     0.556        0.588   0.213    0.818
    merge               0.454        0.506   0.138    0.680
    student             0.856        0.827   0.585    0.792

Other recipes are settings:
    --config.objective.weighting=kl                   the paper's: 77% of the weight on the last trained step
    --config.objective.weighting=ode                  DiffusionOPD's
    --config.objective.name=direct                    the loss itself instead of PPO's surrogate around it
    --config.objective.weighting=kl --config.objective.reward=log_ratio     the policy-gradient form
    --config.objective.reward=kl_detached             the paper's first text, which does not learn
    --config.objective.mar_beta=0                     without the anchor
    --config.cold_start.method=none                   from the base instead of the merge
    --config.updates_per_rollout=2 --config.minibatches=2
    --config.sampler.transition=ode --config.objective.name=direct

Cheaper updates, with time a sample, and strict composition after 60 updates (plain: 0.555; benchmarks/savings.py):
    --config.anchor.every=3 --config.batch_size=63                  0.81  0.547  the anchor about one sample in three
    --config.sampler.trained='(2,5)'                                0.71  0.562  the last three of five timesteps
    --config.one_timestep=True --config.objective.name=direct       0.41  0.510  one drawn timestep a rollout
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "miniature"
    config.stage = "opd"
    config.seed = 0
    config.steps = 120
    config.log_every = 1
    config.checkpoint_every = 20
    config.eval_every = 40
    config.keep_checkpoints = 2
    config.keep_best = ""  # also keep the best checkpoint by an evaluation's score: "max:text"

    config.model = ConfigDict()
    config.model.preset = "miniature"
    config.model.path = "packaged:base.safetensors"
    config.model.attention = "xla"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all devices that are left
    config.shift = 3.0

    # The routed tasks: weight among the prompts, teacher, and the teacher's guidance scale (1 = off: guidance would
    # undo the base's caption noise). Images per prompt beyond 1 form groups, which distillation does not need.
    config.tasks = ConfigDict()
    config.tasks.text = ConfigDict({"teacher": "packaged:teacher_text.safetensors", "guidance": 1.0, "weight": 1.0})
    config.tasks.composition = ConfigDict(
        {"teacher": "packaged:teacher_composition.safetensors", "guidance": 1.0, "weight": 1.0}
    )
    config.batch_size = 64
    config.images_per_prompt = 1

    config.whole_teachers = False  # True: teachers and anchor are weights of whole networks, like `model.path`
    # An empty anchor adapter makes the base the anchor.
    config.anchor = ConfigDict()
    config.anchor.name = "quality"
    config.anchor.adapter = "packaged:teacher_quality.safetensors"
    config.anchor.guidance = 1.0
    config.anchor.every = 1  # m: the anchor sees one random sample of every m a timestep, which counts m times
    config.guidance = 1.0  # of the student

    # The student: what trains, its adapter, and what it starts from. `reduce_once`: mesh axes over which gradients are
    # summed once an update instead of once a timestep, at the price of one float32 sum each (docs/running-at-scale.md).
    config.trained = "adapter"  # "params": all of the network
    config.reduce_once = ("data", "fsdp")
    config.adapter = ConfigDict({"rank": 32, "alpha": 64.0, "targets": ("attn",)})
    config.cold_start = ConfigDict()
    config.cold_start.method = "merge"  # or "none"
    config.cold_start.merge = "svd"  # "concatenate" keeps all ranks, "factors" averages a and b apart
    config.cold_start.weights = ConfigDict({"text": 1 / 3, "composition": 1 / 3, "quality": 1 / 3})

    # The rollout. All steps but the last are sampled and trained; `window = (start, stop)` limits the noise to some.
    config.sampler = ConfigDict()
    config.sampler.num_steps = 6
    config.sampler.transition = "sde"  # "cps", "ode"
    config.sampler.noise_level = 0.7
    config.sampler.window = config_dict.placeholder(tuple)
    config.sampler.trained = config_dict.placeholder(tuple)  # (start, stop): train these timesteps alone
    config.one_timestep = False  # True: one timestep of each rollout, drawn by weight; for objective "direct"

    config.objective = ConfigDict()
    config.objective.name = "clipped"  # "direct"
    config.objective.reward = "kl"  # "log_ratio", "kl_detached"
    config.objective.weighting = "uniform"  # "kl" (the paper's), "kl_no_dt", "ode"
    config.objective.clip = 1e-4
    config.objective.reward_limit = 5.0
    config.objective.mar_beta = 0.05
    config.objective.window_only = False
    config.updates_per_rollout = 1
    config.minibatches = 1

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup = 5
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 1.0
    config.ema = ConfigDict({"decay": 0.95, "every": 1})

    config.eval = ConfigDict()  # the periodic evaluation; the report uses `final_samples` pairs a task and fresh noise
    config.eval.tasks = ("text", "composition")
    config.eval.samples = 128
    config.eval.batch_size = 128
    config.eval.num_steps = 10
    config.eval.guidance = 1.0
    config.eval.transition = "ode"
    config.eval.noise_level = 0.7  # of "sde" and "cps"
    config.eval.seed = 1
    config.final_samples = 1024
    config.export = "ema"  # "raw"

    # What watches over the run; none of it changes a step, and all of it may change between runs in one workdir.
    config.max_skipped_steps = 0  # updates with a loss or gradient that is not finite to leave out before stopping
    config.alarms = ConfigDict({"ratio": (0.9, 1.1)})  # metrics to warn of outside their bounds, never to stop for
    config.watchdog_seconds = 1800.0  # report a hang after as long without a step; longer while compiling; 0: never
    config.watchdog_abort = False  # and end the process, for a job manager to start it again
    return config
