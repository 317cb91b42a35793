"""Fine-tune one miniature teacher on pairs: a LoRA adapter on the packaged base, by flow matching.

    python -m fopd_jax.main --config=configs/miniature_teacher.py:text
    python -m fopd_jax.main --config=configs/miniature_teacher.py:composition
    python -m fopd_jax.main --config=configs/miniature_teacher.py:quality

The supervised way, where there are clean images with right captions: cleaner pairs of its own task than the base saw.
`quality` sees both tasks with the base's own rate of wrong captions in much cleaner images: it learns to draw cleanly
and nothing else. Held-out prompts are in none of them. The packaged `teacher_*.safetensors` are not these: they come
from rewards alone (`configs/miniature_rl.py`).

Cost on 2 CPU cores: 1.5 minutes each alone.
Result: not measured in this form. With a quarter of the pairs another task's, wrongly captioned, as earlier versions
had it, `text` reached .876 and `composition` .848 of its own score, and forgot the other's (.12, .15).
"""

from fopd_jax.config.schema import EMA, Evaluation, FlowMatching, Model, Optimizer, Pairs, Run
from fopd_jax.config.variants import smoke, split_variant

SKILLS = {
    "text": {"text": Pairs(degraded=0.2)},
    "composition": {"composition": Pairs(degraded=0.2)},
    "quality": {
        "text": Pairs(share=0.5, wrong_caption=0.35, degraded=0.12),
        "composition": Pairs(share=0.5, wrong_caption=0.2, degraded=0.12),
    },
}


def get_config(variant: str = "text") -> FlowMatching:
    """`variant` is `text`, `composition`, `quality`, or one of them with `:smoke` behind it."""
    skill, small = split_variant(variant, tuple(SKILLS))
    config = FlowMatching(
        name=f"miniature_teacher_{skill}",
        model=Model("miniature", "packaged:base.safetensors", "float32"),
        tasks=SKILLS[skill],
        optimizer=Optimizer(learning_rate=1e-3, warmup=20, betas=(0.9, 0.99), weight_decay=0.0),
        ema=EMA(decay=0.99, every=1),
        eval=Evaluation(samples=128, batch_size=128, num_steps=10, guidance=1.0),
        run=Run(log_every=50, checkpoint_every=200, eval_every=200, attention="xla", remat="none"),
    )
    return smoke(config) if small else config
