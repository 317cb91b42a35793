"""Flow-OPD of Stable Diffusion 3.5 Medium at 512 px: three task teachers and an anchor into one student.

    python tools/convert_sd35_weights.py --src stable-diffusion-3.5-medium --dst weights/sd35m
    python -m fopd_jax.main --config=configs/sd35m_opd.py --workdir=runs/sd35m_opd

Needs, by default in the working directory (any path can be set by its field); docs/weights-and-prompts.md gets them:
    weights/sd35m                     the converted base (tools/convert_sd35_weights.py)
    teachers/{geneval,ocr,pickscore,deqa}   single-skill LoRA adapters: PEFT folders, diffusers or ComfyUI files, ours;
                                      each is asked under the guidance that its file says, 4.5 where it says none
    data/{geneval,ocr,pickscore}/{train,test}.txt     prompts, one a line or as GenEval's

First the run encodes every prompt that it will draw, once, and keeps the encodings in `run.encoding.cache` for itself
and later runs: at most 1.7 MB a prompt with 77 + 128 text tokens, so up to 86 GB for 51,200 distinct prompts, less what
compression saves, about a third. With `run.encoding.resident` nothing is encoded beforehand and nothing kept. Then it
trains, draws student pictures every `run.eval_every` updates, and at the end writes `student.safetensors`,
`student_peft/` (which diffusers and PEFT load; tools/convert_adapter.py writes ComfyUI's form) and `samples.png`: base,
teachers, merge and student on the same held-out prompts and noise.

Nothing scores the tasks by default. Their rewards are settings, evaluated beside the pictures and in the report's table
(fopd_jax/rewards; converted weights where a network scores):
    --config.tasks.ocr.rewards.ocr=1
    --config.tasks.pickscore.rewards.pickscore=1 --config.rewards.pickscore.divide_by=26
        --config.rewards.pickscore.weights=weights/pickscore.safetensors
    --config.tasks.geneval.rewards.geneval=1 --config.tasks.geneval.test=geneval:test
        --config.rewards.geneval.weights=weights/mask2former.safetensors
        --config.rewards.geneval.options.clip=weights/clip_l.safetensors
A reward that is served elsewhere has its server's address, and a score that fails is left out, counted and told:
    --config.run.servers.pickscore.urls=http://127.0.0.1:18085 --config.run.max_failed_rewards=0.05

Cost, by arithmetic (fopd_jax/performance/flops.py: 167 TFLOP an image with guidance and anchor, 191 with what is
recomputed): 24 PFLOP an update of 128 images, so 400 updates take about 8 hours at 350 TFLOP/s. Not yet measured on an
accelerator.
Memory a chip, by the TPU compiler (v5p, 4 teachers and an anchor, 4 images of 512 px): 4.6 GiB and, for each image,
    --config.run.remat=full          0.7 GiB    18% more FLOPs than the mathematics needs
    --config.run.remat=attention     1.5 GiB    14%; the default
    --config.run.remat=dots          4.8 GiB    none but elementwise work: best where it fits
    --config.run.remat=none         12.7 GiB    none
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
    --config.tasks.geneval.guidance=1.0                               a teacher without guidance whose file is silent
    --config.model.preset=sd35_large --config.model.path=weights/sd35l        another network of the family
    --config.trained=params --config.run.mesh.data=8 --config.run.mesh.fsdp=8 --config.run.reduce_once="('data',)"
        --config.optimizer.learning_rate=1e-5                         all of the network trains, sharded (64 chips)
    --config.whole_teachers=true --config.cold_start.method=none      teachers are converted folders, not adapters
    --config.sampler.trained="(6,9)"                                  the last three timesteps alone train
    --config.anchor.every=4                                           the anchor sees one sample in four, unbiased
    --config.one_timestep=true --config.objective.name=direct         one timestep of each rollout trains, unbiased
    --config.guidance=1.0                                             a student that needs no guidance
    --config.run.mesh.data=1 --config.run.mesh.fsdp=-1                        base weights sharded over all devices
"""

from fopd_jax.config.schema import OPD, Anchor, Model, RoutedTask
from fopd_jax.config.variants import smoke, split_variant

WEIGHTS = {"geneval": 3.0, "ocr": 1.0, "pickscore": 1.0}  # [paper] GRPO-Mix's ratio


def get_config(variant: str = "") -> OPD:
    """`variant` may be `smoke`: this recipe on the embedded miniature."""
    _, small = split_variant(variant)
    config = OPD(
        name="sd35m_opd",
        model=Model(path="weights/sd35m"),
        tasks={
            name: RoutedTask(f"teachers/{name}", f"data/{name}/train.txt", f"data/{name}/test.txt", weight=weight)
            for name, weight in WEIGHTS.items()
        },
        anchor=Anchor("deqa", "teachers/deqa"),
    )
    return smoke(config) if small else config
