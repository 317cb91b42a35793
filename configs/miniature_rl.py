"""Teachers of the miniature by reinforcement learning.

python -m fopd_jax.main --config=configs/miniature_rl.py:text
python -m fopd_jax.main --config=configs/miniature_rl.py:text-nft

Without a suffix by Flow-GRPO; `-nft` by DiffusionNFT: 7,872 images from an on-policy sampler of 6 steps.
"""

from fopd_jax.config.learning import GRPO, ForwardRL, OldDecay, PolicyGradient, RewardedTask, Rollouts, TrainedLevels
from fopd_jax.config.learning import ForwardObjective as Forward
from fopd_jax.config.schema import EMA, Evaluation, LoRAConfig, Model, Optimizer, Run
from fopd_jax.config.variants import smoke, split_variant

TASKS = {
    "text": {"text": RewardedTask(rewards={"text": 1.0})},
    "composition": {"composition": RewardedTask(rewards={"composition": 1.0})},
    "quality": {"text": RewardedTask(rewards={"quality": 1.0}), "composition": RewardedTask(rewards={"quality": 1.0})},
}


def get_config(variant: str = "text") -> GRPO | ForwardRL:
    """`variant` is `text`, `composition`, `quality`, or one of them with `-nft`, perhaps with `:smoke` behind it."""
    choice, small = split_variant(variant, (*TASKS, *(f"{skill}-nft" for skill in TASKS)))
    skill, _, forward = choice.partition("-")
    config = nft(skill) if forward else grpo(skill)
    return smoke(config) if small else config


def grpo(skill: str) -> GRPO:
    """Flow-GRPO."""
    return GRPO(
        name=f"miniature_rl_{skill}",
        model=Model("miniature", "packaged:base.safetensors", "float32"),
        tasks=TASKS[skill],
        guidance=1.0,
        batch_size=192,
        images_per_prompt=16,
        rollouts=Rollouts(num_steps=6),
        objective=PolicyGradient(kl_beta=0.0, clip=1e-3),
        optimizer=Optimizer(learning_rate=1e-3, warmup=5, weight_decay=0.0),
        minibatches=1,
        updates_per_rollout=1,
        ema=EMA(decay=0.9, every=1),
        eval=Evaluation(samples=128, batch_size=128, num_steps=10, guidance=1.0, final_samples=1024),
        run=Run(steps=100, eval_every=50, attention="xla", remat="none", alarms={"ratio": (0.9, 1.1)}),
    )


def nft(skill: str) -> ForwardRL:
    """DiffusionNFT, on policy."""
    return ForwardRL(
        name=f"miniature_rl_{skill}_nft",
        model=Model("miniature", "packaged:base.safetensors", "float32"),
        adapter=LoRAConfig(rank=16, alpha=32.0),
        tasks=TASKS[skill],
        batch_size=192,
        images_per_prompt=16,
        rollouts=Rollouts(num_steps=6, transition="ode"),
        levels=TrainedLevels(times=2),
        objective=Forward("nft", kl_beta=0.0),
        old=OldDecay(slope=0.0),
        optimizer=Optimizer(learning_rate=1e-3, warmup=5, weight_decay=0.0),
        ema=EMA(decay=0.95, every=1),
        eval=Evaluation(samples=128, batch_size=128, num_steps=10, guidance=1.0, final_samples=256),
        run=Run(steps=41, eval_every=20, attention="xla", remat="none", micro_batches=3),
    )
