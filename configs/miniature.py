"""The main job: Flow-OPD's second stage in miniature, end to end, on a laptop CPU with nothing to download.

    python -m fopd_jax.main --config=configs/miniature.py

Loads the packaged base and teachers, starts the student from their merge, distils it on-policy, and reports base,
teachers, merge and student on the same held-out (prompt, noise) pairs.

Cost on 2 CPU cores: 4.1-5.7 minutes, up to 1.9 GiB of memory.
Result: mean of seeds 0, 1, 2 over 1,024 pairs a task (quality: 2,048)
                        text  composition  strict  quality
    base                0.519        0.589   0.215    0.653
    teacher/text        0.858        0.652   0.305    0.929
    teacher/composition 0.622        0.808   0.464    0.925
    teacher/quality     0.519        0.645   0.280    0.935
    merge               0.723        0.744   0.406    0.943
    student             0.856        0.806   0.457    0.928
The packaged teachers come from reinforcement learning (configs/miniature_rl.py).

Other recipes are settings:
    --config.objective.weighting=kl                   the paper's: 77% of the weight on the last trained step
    --config.objective.weighting=ode                  DiffusionOPD's
    --config.objective.name=direct                    the loss itself instead of PPO's surrogate around it
    --config.objective.weighting=kl --config.objective.reward=log_ratio     the policy-gradient form
    --config.objective.reward=kl_detached             the paper's first text, which does not learn
    --config.objective.mar_beta=0                     without the anchor
    --config.cold_start.method=none                   from the base instead of the merge
    --config.cold_start.merge=ties --config.cold_start.density=0.3          or dare; from another merge
    --config.cold_start.method=adapter --config.cold_start.adapter=runs/miniature_sft     see configs/miniature_sft.py
    --config.updates_per_rollout=2 --config.minibatches=2
    --config.sampler.transition=ode --config.objective.name=direct

The tasks' rewards beside the teachers' (objectives/opd.py); `objective.task_weight` is λ:
    --config.objective.name=mixed --config.images_per_prompt=8 --config.tasks.text.rewards.text=1
    --config.tasks.composition.rewards.composition=1

Rewards that score a task's images beside the columns above, and with a weight sum up to `reward/TASK`; but by `mixed`
they are not trained on, and each is evaluated on the test prompts alone:
    --config.tasks.text.rewards="{'text': 1.0, 'quality': 0.2}"
    --config.tasks.text.rewards.mine=1 --config.rewards.mine.kind=my_module:my_function
A function of one's own, in any module that can be imported where the program runs:
    def my_function(images, prompts, metadata):  # uint8 [n, 24, 24, 3], RGB; larger is better
        return images.std((1, 2, 3)) / 128  # one number an image, NaN for one that cannot be scored
What is sampled is scored by
    python -m fopd_jax.sample --config=configs/miniature.py --prompt='sign "K7B"' --rewards=text,quality

Students of few steps: from each of the student's states the teachers go on by finer steps of their own, and it learns
where they end; the report at other numbers of steps and guidance scales, too:
    --config.sampler.num_steps=4 --config.sampler.teacher_steps=4 --config.eval.num_steps=4
    --config.eval.also_steps=8,10 --config.eval.also_guidance=1.5
After 40 updates, seed 0, 256 pairs a task (quality: 512), sampled with 4 steps | with 10:
                                  text  composition  quality |  text  composition  quality
    teacher of the skill         0.824        0.796    0.738 | 0.846        0.819    0.931
    merge                        0.681        0.722    0.856 | 0.699        0.739    0.941
    student, teacher_steps=4     0.780        0.772    0.905 | 0.753        0.781    0.918
    student, teacher_steps=1     0.812        0.800    0.876 | 0.839        0.822    0.928
So early, only quality gains by it: the merge is near what plain targets ask for (loss 0.004), and far from these (from
0.18 to 0.05, still falling).

Cheaper updates, with time a sample, and strict composition after 60 updates from teachers that were fine-tuned on pairs
(plain: 0.555; benchmarks/savings.py):
    --config.anchor.every=3 --config.batch_size=63                  0.81  0.547  the anchor about one sample in three
    --config.sampler.trained='(2,5)'                                0.71  0.562  the last three of five timesteps
    --config.one_timestep=True --config.objective.name=direct       0.41  0.510  one drawn timestep a rollout
"""

from fopd_jax.config.schema import (
    EMA,
    OPD,
    Anchor,
    ColdStart,
    Evaluation,
    Model,
    Objective,
    Optimizer,
    RoutedTask,
    Run,
    Sampler,
)
from fopd_jax.config.variants import smoke, split_variant


def get_config(variant: str = "") -> OPD:
    """`variant` may be `smoke`."""
    _, small = split_variant(variant)
    config = OPD(
        name="miniature",
        model=Model(preset="miniature", path="packaged:base.safetensors", dtype="float32"),
        # Guidance is off everywhere: it would undo the base's caption noise.
        tasks={
            "text": RoutedTask("packaged:teacher_text.safetensors", guidance=1.0),
            "composition": RoutedTask("packaged:teacher_composition.safetensors", guidance=1.0),
        },
        anchor=Anchor("quality", "packaged:teacher_quality.safetensors", guidance=1.0),
        guidance=1.0,
        batch_size=64,
        cold_start=ColdStart(weights={"text": 1 / 3, "composition": 1 / 3, "quality": 1 / 3}),
        sampler=Sampler(num_steps=6),
        objective=Objective(weighting="uniform"),
        optimizer=Optimizer(learning_rate=1e-3, warmup=5),
        ema=EMA(decay=0.95, every=1),
        eval=Evaluation(samples=128, batch_size=128, num_steps=10, guidance=1.0, final_samples=1024),
        run=Run(steps=120, eval_every=40, attention="xla", remat="none", alarms={"ratio": (0.9, 1.1)}),
    )
    return smoke(config) if small else config
