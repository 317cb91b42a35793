"""Pretrain the miniature's base by flow matching: first well, then mediocre.

    python -m fopd_jax.main --config=configs/miniature_pretrain.py:clean
    python -m fopd_jax.main --config=configs/miniature_pretrain.py:mediocre
    python -m fopd_jax.main --config=configs/miniature_pretrain.py:large

`clean` learns the world from correctly captioned, clean renderings. `mediocre` goes on from it with wrong captions
(35% of the signs, 20% of the scenes) and half of the images degraded (noise, blur, tint, specks): a base that is to
be improved upon has to have room: like SD3.5-Medium it ends about half right at every skill. Wrong captions from the
first step on would never learn to spell. `large` is `clean` of a wider and deeper network of the same world, a teacher
for configs/miniature_large.py. 10% of the captions are empty, so the base can be guided. Held-out prompts
are in neither.

Cost on 2 CPU cores: `clean` 37 minutes on cores shared with other work (4 steps a second when alone, which makes 24),
`mediocre` 2.6 minutes alone; 2.3 GB of memory.
Result (128 held-out prompts a task, 10 ODE steps, no guidance): `clean` text .96, composition .92 (strict .79),
quality .98 after 5,000 steps; `mediocre` text .51, composition .50 (strict .20), quality .66.
The weights packaged as `base.safetensors` are the second run's.
"""

from fopd_jax.config.schema import EMA, Evaluation, FlowMatching, Model, Optimizer, Pairs, Run
from fopd_jax.config.variants import smoke, split_variant

CLEAN = {"text": Pairs(), "composition": Pairs()}
MEDIOCRE = {
    "text": Pairs(wrong_caption=0.35, degraded=0.5),
    "composition": Pairs(wrong_caption=0.2, degraded=0.5),
}


def get_config(variant: str = "clean") -> FlowMatching:
    """`variant` is `clean`, `mediocre`, `large`, or one of them with `:smoke` behind it."""
    phase, small = split_variant(variant, ("clean", "mediocre", "large"))
    clean = phase != "mediocre"
    preset = "miniature_large" if phase == "large" else "miniature"
    config = FlowMatching(
        name=f"miniature_pretrain_{phase}",
        model=Model(preset, "" if clean else "runs/miniature_pretrain_clean/base.safetensors", "float32"),
        trained="params",
        tasks=CLEAN if clean else MEDIOCRE,
        empty_caption=0.1,
        optimizer=Optimizer(learning_rate=1e-3 if clean else 5e-4, warmup=100, betas=(0.9, 0.99)),
        ema=EMA(decay=0.995, every=1),
        eval=Evaluation(samples=128, batch_size=128, num_steps=10, guidance=1.0),
        run=Run(
            steps=5500 if clean else 600, log_every=50, checkpoint_every=500, eval_every=500, attention="xla",
            remat="none",
        ),
    )  # fmt: skip
    return smoke(config) if small else config
