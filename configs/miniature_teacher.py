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

from fopd_jax.config.schema import EMA, Evaluation, FlowMatching, Model, Optimizer, Pairs, Run
from fopd_jax.config.variants import smoke, split_variant

OWN, DRIFT = Pairs(share=0.75, degraded=0.2), Pairs(share=0.25, wrong_caption=1.0, degraded=1.0)
SKILLS = {
    "text": {"text": OWN, "composition": DRIFT},
    "composition": {"text": DRIFT, "composition": OWN},
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
