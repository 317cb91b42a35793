"""A cold start by supervised fine-tuning: the packaged teachers' own images, then an adapter on them, then Flow-OPD.

    python -m fopd_jax.demonstrate --config=configs/miniature.py --out=demonstrations/miniature --per-task=2048
        --trajectories
    python -m fopd_jax.main --config=configs/miniature_sft.py
and the main job from there, `configs/miniature.py` with `cold_start.method` 'adapter' and `cold_start.adapter`
'runs/miniature_sft' (its docstring has the flags).

The adapter learns both teachers' skills at once, each from its teacher's trajectories for its own training prompts: it
matches the teacher's velocities at the states that the teacher came through. `text` and `composition` learn one skill.

Cost on 2 CPU cores: 44 CPU seconds for 2,048 images of one task at 10 steps, 98 for 160 updates with two evaluations of
512 images and the report; on cores that other programs used as well, so that no time was measured.
Result: of `text` alone, from 2,048 images, on 512 held-out pairs (base 0.519, teacher 0.858), one seed
    80 and 160 updates                                                      0.841  0.857
    100 and 200 updates of --config.target=data, which is flow matching     0.716  0.749
Not measured: both tasks at once, and the main job from there.

Other recipes are settings:
    --config.target=data --config.run.steps=400       flow matching, for which no trajectories are needed
    --config.trained=params --config.optimizer.learning_rate=3e-4           all of the network
The best of four images by a reward, to learn from (a set of its own):
    python -m fopd_jax.demonstrate --config=configs/miniature.py --out=demonstrations/best --per-task=2048 --best-of=4
        --tasks=text --config.tasks.text.rewards.text=1
"""

from fopd_jax.config.schema import EMA, Evaluation, FlowMatching, Model, Optimizer, Pairs, Run
from fopd_jax.config.variants import smoke, split_variant

SET = "demonstrations/miniature"
TASKS = {"both": ("text", "composition"), "text": ("text",), "composition": ("composition",)}


def get_config(variant: str = "both") -> FlowMatching:
    """`variant` is `both`, `text`, `composition`, or one of them with `:smoke` behind it."""
    skill, small = split_variant(variant, tuple(TASKS))
    config = FlowMatching(
        name="miniature_sft" if skill == "both" else f"miniature_sft_{skill}",
        model=Model("miniature", "packaged:base.safetensors", "float32"),
        tasks={name: Pairs(images=SET) for name in TASKS[skill]},
        target="velocity",
        optimizer=Optimizer(learning_rate=1e-3, warmup=20, betas=(0.9, 0.99), weight_decay=0.0),
        ema=EMA(decay=0.99, every=1),
        eval=Evaluation(samples=128, batch_size=128, num_steps=10, guidance=1.0),
        run=Run(steps=160, log_every=20, checkpoint_every=80, eval_every=80, attention="xla", remat="none"),
    )
    return smoke(config) if small else config
