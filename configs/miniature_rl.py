"""Teachers of the miniature by reinforcement learning: from the packaged base, by their own reward alone.

    python -m fopd_jax.main --config=configs/miniature_rl.py:text-nft           DiffusionNFT
    python -m fopd_jax.main --config=configs/miniature_rl.py:text               Flow-GRPO

and so for `composition`, `quality` and `mix`, which is GRPO-Mix: one policy on both tasks, each with its own reward and
half of quality's. No clean image, no caption that goes with one: prompts, and what a reader says of the images. The
packaged `teacher_*.safetensors` are the `adapter.safetensors` of the three `-nft` runs.

From what was trained before, the base being what the policy is still held to:
    --config.start=runs/miniature_sft                 SFT (configs/miniature_sft.py)
    python tools/merge_adapters.py --dst merge.safetensors --src TEXT.safetensors COMPOSITION.safetensors …
    --config.start=merge.safetensors                  a merge of teachers

`quality` alone is earned best by an empty canvas: its policies are held to the base (`objective.kl_beta`) and end
early. Without that (`quality-nft` with --config.objective.kl_beta=0 --config.run.steps=30) pictures empty themselves:
quality .947, text .169, composition .363 of 128 pairs, and from step 28 on the monitors say so.

Cost on 2 CPU cores: 2.2 to 2.8 seconds a step of 192 images, so 85 s of steps for `text-nft` and 170 s for `text`; with
evaluations every 5 steps and the report of 8,192 images 3 to 5 minutes; up to 1.4 GiB of memory.
Result, held out (1,024 pairs a task, 2,048 of quality; standard errors of the lead over the base at most .010):
                     text  composition  strict  quality   images
    base            0.519        0.589   0.215    0.653
    text            0.887        0.659   0.235    0.787   11,520
    text-nft        0.858        0.652   0.305    0.929    7,680
    composition     0.629        0.798   0.411    0.936    7,680
    composition-nft 0.622        0.808   0.464    0.925    7,680
    quality         0.554        0.616   0.242    0.912    3,072
    quality-nft     0.519        0.645   0.280    0.935    4,800
    mix             0.859        0.802   0.476    0.920   11,520
    mix-nft         0.872        0.805   0.542    0.885   11,520
benchmarks/reinforcement.py runs them all and draws their curves (docs/stage1.md).
"""

from fopd_jax.config.learning import (
    GRPO,
    ForwardRL,
    NoiseWindow,
    OldDecay,
    PolicyGradient,
    RewardedTask,
    Rollouts,
    TrainedLevels,
)
from fopd_jax.config.learning import ForwardObjective as Forward
from fopd_jax.config.schema import EMA, Evaluation, LoRAConfig, Model, Optimizer, Run
from fopd_jax.config.variants import smoke, split_variant

TASKS = {
    "text": {"text": RewardedTask(rewards={"text": 1.0})},
    "composition": {"composition": RewardedTask(rewards={"composition": 1.0})},
    "quality": {"text": RewardedTask(rewards={"quality": 1.0}), "composition": RewardedTask(rewards={"quality": 1.0})},
    "mix": {
        "text": RewardedTask(rewards={"text": 1.0, "quality": 0.5}),
        "composition": RewardedTask(rewards={"composition": 1.0, "quality": 0.5}),
    },
}


def get_config(variant: str = "text-nft") -> GRPO | ForwardRL:
    """`variant` is `text`, `composition`, `quality` or `mix`, perhaps with `-nft` and `:smoke` behind it."""
    choice, small = split_variant(variant, tuple(f"{skill}{kind}" for kind in ("-nft", "") for skill in TASKS))
    skill, _, forward = choice.partition("-")
    config = nft(skill) if forward else grpo(skill)
    config.model = Model("miniature", "packaged:base.safetensors", "float32")
    config.adapter = LoRAConfig(rank=16, alpha=32.0)
    config.tasks = TASKS[skill]
    config.batch_size, config.images_per_prompt, config.guidance = 192, 16, 1.0
    config.ema = EMA(every=1)
    config.eval = Evaluation(samples=128, batch_size=128, num_steps=10, guidance=1.0, final_samples=1024)
    return smoke(config) if small else config


def grpo(skill: str) -> GRPO:
    """Flow-GRPO: noise in the first steps alone, which are those that are trained; one update a rollout."""
    steps = {"text": 60, "composition": 40, "quality": 16, "mix": 60}[skill]
    return GRPO(
        name=f"miniature_rl_{skill}",
        rollouts=Rollouts(num_steps=6),
        window=NoiseWindow((0, 2) if skill == "quality" else (0, 3)),
        objective=PolicyGradient(kl_beta=0.5 if skill == "quality" else 0.0, kl_weighting="kl", clip=1e-3),
        optimizer=Optimizer(learning_rate=1.5e-3, warmup=5, weight_decay=0.0),
        minibatches=1,
        updates_per_rollout=1,
        run=Run(steps=steps, eval_every=20, attention="xla", remat="none", alarms={"ratio": (0.9, 1.1)}),
    )


def nft(skill: str) -> ForwardRL:
    """DiffusionNFT, on policy: the old policy is the current one."""
    held = skill == "quality"
    return ForwardRL(
        name=f"miniature_rl_{skill}_nft",
        rollouts=Rollouts(num_steps=6, transition="ode"),
        levels=TrainedLevels(times=2),
        objective=Forward(kl_beta=0.75 if held else 0.0),
        old=OldDecay(slope=0.0),
        optimizer=Optimizer(learning_rate=7e-4 if held else 1e-3, warmup=5, weight_decay=0.0),
        run=Run(
            steps={"text": 40, "composition": 40, "quality": 25, "mix": 60}[skill],
            eval_every=20,
            attention="xla",
            remat="none",
        ),
    )
