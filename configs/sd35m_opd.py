"""Flow-OPD of Stable Diffusion 3.5 Medium at 512 px: three task teachers and an anchor into one student.

    python tools/convert_sd35_weights.py --src stable-diffusion-3.5-medium --dst weights/sd35m
    python -m fopd_jax.main --config=configs/sd35m_opd.py --workdir=runs/sd35m_opd

Needs, by default in the working directory (any path can be set by its field):
    weights/sd35m                     the converted base (tools/convert_sd35_weights.py)
    teachers/{geneval,ocr,pickscore,deqa}   single-skill LoRA adapters: PEFT folders, diffusers or ComfyUI files, ours
    data/{geneval,ocr,pickscore}/{train,test}.txt     prompts, one a line

First the run encodes every prompt that it will draw, once, and keeps the encodings in `conditioning_cache` for itself
and later runs: at most 1.7 MB a prompt with 77 + 128 text tokens, so up to 86 GB for 51,200 distinct prompts, less
what compression saves, about a third. With `resident_encoders` nothing is encoded beforehand and nothing kept. Then it
trains, draws student pictures every `eval_every` updates, and at the end writes `student.safetensors`, `student_peft/` (which
diffusers and PEFT load; tools/convert_adapter.py writes ComfyUI's form) and `samples.png`: base, teachers, merge and
student on the same held-out prompts and noise.

Cost, by arithmetic (fopd_jax/performance/flops.py: 167 TFLOP an image with guidance and anchor, 191 with what is
recomputed): 24 PFLOP an update of 128 images, so 400 updates take about 8 hours at 350 TFLOP/s. Not yet measured on an
accelerator.
Memory a chip, by the TPU compiler (v5p, 4 teachers and an anchor, 4 images of 512 px): 4.6 GiB and, for each image,
    --config.model.remat=full          0.7 GiB    18% more FLOPs than the mathematics needs
    --config.model.remat=attention     1.5 GiB    14%; the default
    --config.model.remat=dots          4.8 GiB    none but elementwise work: best where it fits
    --config.model.remat=none         12.7 GiB    none
Cost on 2 CPU cores: none that is useful; the miniature (configs/miniature.py) is for that.

Result, published (the method's paper, SD3.5-M, 512 px, 40 steps; not reproduced by this project yet):
                        GenEval   OCR   DeQA  PickScore
    base                    .63   .59   4.07      21.64
    teachers, own metric    .94   .92   4.23      23.19
    student, merge start    .92   .94   4.35      23.08

Where a value comes from: [paper] arXiv 2605.08063, [code] the authors' released PyTorch code, [ours] decided here.

Other recipes are settings:
    --config.objective.name=direct                                    the paper's later text: the loss itself
    --config.objective.weighting=ode --config.sampler.transition=ode --config.objective.name=direct
        --config.objective.mar_beta=0 --config.cold_start.method=none         DiffusionOPD's
    --config.batch_size=256 --config.images_per_prompt=16 --config.updates_per_rollout=2 --config.minibatches=2
        --config.objective.mar_beta=0.04                                      the authors' code's batch and anchor
    --config.tasks.geneval.guidance=1.0                               a teacher that was trained without guidance
    --config.model.preset=sd35_large --config.model.path=weights/sd35l        another network of the family
    --config.trained=params --config.mesh.data=8 --config.mesh.fsdp=8 --config.reduce_once="('data',)"
        --config.optimizer.learning_rate=1e-5                         all of the network trains, sharded (64 chips)
    --config.whole_teachers=true --config.cold_start.method=none      teachers are converted folders, not adapters
    --config.sampler.trained="(6,9)"                                  the last three timesteps alone train
    --config.anchor.every=4                                           the anchor sees one sample in four, unbiased
    --config.one_timestep=true --config.objective.name=direct         one timestep of each rollout trains, unbiased
    --config.guidance=1.0                                             a student that needs no guidance
    --config.mesh.data=1 --config.mesh.fsdp=-1                        base weights sharded over all devices
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "sd35m_opd"
    config.stage = "opd"
    config.seed = 0  # [ours]
    config.steps = 400  # [code] the curve flattens there
    config.log_every = 1
    config.checkpoint_every = 20
    config.eval_every = 50
    config.keep_checkpoints = 2
    config.keep_best = ""  # also keep the best checkpoint by an evaluation's score: "max:text"

    config.model = ConfigDict()
    config.model.preset = "sd35_medium"  # [paper]
    config.model.path = "weights/sd35m"
    config.model.attention = "auto"  # [ours] cuDNN's flash attention on NVIDIA GPUs, splash on TPUs, else "xla"
    config.model.dtype = "bfloat16"  # [code] base and activations; what trains is float32
    config.model.remat = "attention"  # [ours] 4 images fit a v5e chip; see Memory above
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all devices that are left
    config.resolution = 512  # [paper] pixels a side
    config.t5_length = 128  # [code] T5 tokens in training; 256 at inference
    config.encode_batch_size = 64
    config.conditioning_cache = "runs/conditioning"
    config.resident_encoders = False  # True: text encoders stay on the devices instead, nothing is encoded beforehand
    config.shift = 3.0  # SD3.5's own schedule

    # The routed tasks; a teacher keeps the guidance scale under which it was trained.
    config.tasks = ConfigDict()
    for name, weight in (("geneval", 3.0), ("ocr", 1.0), ("pickscore", 1.0)):  # [paper] GRPO-Mix's ratio
        config.tasks[name] = ConfigDict(
            {
                "prompts": f"data/{name}/train.txt",
                "test": f"data/{name}/test.txt",
                "teacher": f"teachers/{name}",
                "guidance": 4.5,  # [paper]
                "weight": weight,
            }
        )
    config.batch_size = 128  # [code] 256 samples an epoch in two updates; [ours] one update, in the fused step
    config.images_per_prompt = 1  # [ours] distillation needs no groups: 16 times the prompts at equal cost; [code] 16

    config.whole_teachers = False  # True: teachers and anchor are converted folders, like `model.path`
    # Manifold anchor regularisation; an empty adapter makes the base the anchor.
    config.anchor = ConfigDict()
    config.anchor.name = "deqa"  # [paper]
    config.anchor.adapter = "teachers/deqa"
    config.anchor.guidance = 4.5  # [paper]
    config.anchor.every = 1  # m: the anchor sees one random sample of every m a timestep, which counts m times
    config.guidance = 4.5  # [paper] of the student; the empty prompt is the negative one

    # The student: what trains, its adapter, and what it starts from. `reduce_once`: mesh axes over which gradients are
    # summed once an update instead of once a timestep, at the price of one float32 sum each (docs/running-at-scale.md).
    config.trained = "adapter"  # "params": all of the network
    config.reduce_once = ("data", "fsdp")
    config.adapter = ConfigDict({"rank": 32, "alpha": 64.0, "targets": ("attn",)})  # [code]
    config.cold_start = ConfigDict()
    config.cold_start.method = "merge"  # [paper]
    config.cold_start.merge = "svd"  # [ours] the exact average at the student's rank; [code] "factors"
    config.cold_start.weights = ConfigDict({"geneval": 1 / 3, "ocr": 1 / 3, "pickscore": 1 / 3})  # [paper] the average

    # The rollout. All steps but the last are sampled and trained; `window = (start, stop)` limits the noise to some.
    config.sampler = ConfigDict()
    config.sampler.num_steps = 10  # [paper]
    config.sampler.transition = "sde"  # [paper]
    config.sampler.noise_level = 0.7  # [paper]
    config.sampler.window = config_dict.placeholder(tuple)
    config.sampler.trained = config_dict.placeholder(tuple)  # (start, stop): train these timesteps alone
    config.one_timestep = False  # True: one timestep of each rollout, drawn by weight; for objective "direct"

    config.objective = ConfigDict()
    config.objective.name = "clipped"  # [paper]
    config.objective.reward = "kl"  # [code] attached; the paper's text detaches it, which does not learn
    config.objective.weighting = "kl"  # [paper]
    config.objective.clip = 1e-4  # [paper]
    config.objective.reward_limit = 5.0  # [code]
    config.objective.mar_beta = 0.02  # [paper]; [code] .04
    config.objective.window_only = False
    config.updates_per_rollout = 1  # [ours]; [code] 2 updates an epoch, each on half of it
    config.minibatches = 1

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-4  # [code]
    config.optimizer.warmup = 1  # [code] none
    config.optimizer.betas = (0.9, 0.999)  # [code]
    config.optimizer.weight_decay = 1e-4  # [code]
    config.optimizer.clip_norm = 1.0  # [code]
    config.ema = ConfigDict({"decay": 0.9, "every": 8})  # [code]

    config.eval = ConfigDict()  # pictures of held-out prompts; scores of these tasks need their reward models
    config.eval.tasks = ("geneval", "ocr", "pickscore")
    config.eval.samples = 16
    config.eval.batch_size = 16
    config.eval.num_steps = 40  # [paper]
    config.eval.guidance = 4.5  # [paper]
    config.eval.transition = "ode"
    config.eval.noise_level = 0.7  # of "sde" and "cps"
    config.eval.seed = 1
    config.final_samples = 16
    config.export = "ema"  # [code]; "raw"

    # What watches over the run; none of it changes a step, and all of it may change between runs in one workdir.
    config.max_skipped_steps = 0  # updates with a loss or gradient that is not finite to leave out before stopping
    config.alarms = ConfigDict({"ratio": (0.9, 1.1)})  # metrics to warn of outside their bounds, never to stop for
    config.watchdog_seconds = 1800.0  # report a hang after as long without a step; longer while compiling; 0: never
    config.watchdog_abort = False  # and end the process, for a job manager to start it again
    return config
