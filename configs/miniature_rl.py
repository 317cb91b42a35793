"""Teachers of the miniature by reinforcement learning.

python -m fopd_jax.main --config=configs/miniature_rl.py:text
"""

from fopd_jax.config.learning import GRPO, PolicyGradient, RewardedTask, Rollouts
from fopd_jax.config.schema import EMA, Evaluation, Model, Optimizer, Run
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


def get_config(variant: str = "text") -> GRPO:
    """`variant` is `text`, `composition`, `quality`, `mix` (GRPO-Mix), or one of them with `:smoke` behind it."""
    skill, small = split_variant(variant, tuple(TASKS))
    config = GRPO(
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
    return smoke(config) if small else config
