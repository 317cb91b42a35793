"""Teachers by Flow-GRPO-Fast without guidance: a few noisy steps of each rollout are trained, at a fifth of the cost.

    python tools/convert_sd35_weights.py --src stable-diffusion-3.5-medium --dst weights/sd35m
    python -m fopd_jax.main --config=configs/sd35m_fast.py:geneval --workdir=runs/sd35m_fast_geneval

Variants: `geneval`, `pickscore`, as released; `ocr`, the same for text; each with `:smoke` behind it in small.
Needs what `configs/sd35m_grpo.py` does, by skill.

Three neighbouring steps of the first five, drawn anew every step of training ([code]: for every batch that a GPU
makes), have coefficient-preserving noise and are trained; the others are Euler's. There is no reference and no
guidance, in training or in evaluation: **the teacher is to be used without guidance**, in OPD by
`tasks.NAME.guidance` of 1.

Cost, by arithmetic (36.8 TFLOP an image: 10 forwards of the rollout, 3 forwards and backwards): 42 PFLOP a step of
1,152 images and two updates. Decoding and rewards come on top, and weigh more here.
    1,000 steps       at 350 TFLOP/s a GPU, H100 or H200        34 GPU-hours       (256 px: 11)
                      at 25% of a chip's peak        v5e       239 chip-hours      (76)
                                                     v5p       103                 (33)
                                                     v6e        51                 (16)
Both rates are assumptions: nothing of this was timed on an accelerator. Published for Flow-GRPO itself: about 160
H100-hours a task. 256 px in training: --config.model.resolution=256
Cost on 2 CPU cores: none that is useful; `:smoke` runs the recipe on the embedded miniature.

Result: none is published in numbers; not reproduced by this project yet. Users of [code] report that with guidance 4.5
this recipe collapses, that GRPO-Guard's ratio on top is unstable for OCR, and that GenEval on 4 GPUs stalls at .9.

Where a value comes from: [code] the released PyTorch code of Flow-GRPO, [ours] decided here; what is not named here is
the schema's default.

Other recipes are settings:
    --config.window.size=2                                            two steps
    --config.window.moves=slide                                       MixGRPO's order: from noise to data
    --config.objective.kl_beta=0.001 --config.objective.kl_weighting=ode      held to the base
"""

from fopd_jax.config.learning import GRPO, NoiseWindow, PolicyGradient, Rollouts
from fopd_jax.config.schema import EMA, Evaluation, Model
from fopd_jax.config.skills import TESTED, rewards, tasks
from fopd_jax.config.variants import smoke, split_variant


def get_config(variant: str = "geneval") -> GRPO:
    """`variant` is `geneval`, `ocr` or `pickscore`, or one of them with `:smoke` behind it."""
    skill, small = split_variant(variant, ("geneval", "ocr", "pickscore"))
    config = GRPO(
        name=f"sd35m_fast_{skill}",
        model=Model(path="weights/sd35m"),
        tasks=tasks(skill),
        rewards=rewards(skill),
        images_per_prompt=18 if skill == "pickscore" else 24,  # [code] 64 groups of 18; 48 of 24
        guidance=1.0,  # [code]
        rollouts=Rollouts(transition="cps", noise_level=0.8),  # [code]
        window=NoiseWindow(within=(0, 5), size=3, moves="random"),  # [code]
        objective=PolicyGradient(clip=1e-5, kl_beta=0.0),  # [code]
        ema=EMA(every=4),  # [code] 8 updates, of which a step has two
        eval=Evaluation(samples=256, batch_size=64, guidance=1.0, final_samples=TESTED[skill]),  # [code] guidance
    )
    run = config.run
    run.steps, run.eval_every, run.max_failed_rewards = 1000, 60, 0.05  # [ours], [code], [ours]
    return smoke(config) if small else config
