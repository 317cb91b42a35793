"""Teachers by DiffusionNFT: reinforcement on the forward process, without guidance, likelihoods or a stored trajectory.

    python tools/convert_sd35_weights.py --src stable-diffusion-3.5-medium --dst weights/sd35m
    python -m fopd_jax.main --config=configs/sd35m_nft.py:geneval --workdir=runs/sd35m_nft_geneval

Variants: `geneval`, `ocr`, `pickscore`; `multi` (PickScore, HPSv2.1 and CLIPScore at once); each with `:smoke` behind
it in small. Needs what `configs/sd35m_grpo.py` does, by skill; `multi` besides pickscore's
weights/hpsv2.safetensors and weights/clip_l.safetensors.

An old policy, which follows the new one more and more slowly, makes images by an ODE; they are noised afresh at every
level of the schedule but the last, and the new policy moves towards what the better images say and away from the worse.
Guidance is 1 in training and evaluation: **the teacher is to be used without guidance**, in OPD by
`tasks.NAME.guidance` of 1.

Cost, by arithmetic (106 TFLOP an image: 10 forwards of the rollout; at 9 levels the policy forward and backward, the
old policy and the base): 122 PFLOP a step of 1,152 images. Decoding and rewards come on top. `multi`: 278 TFLOP.
    1,000 steps       at 350 TFLOP/s a GPU, H100 or H200        97 GPU-hours       (256 px: 31)
                      at 25% of a chip's peak        v5e       686 chip-hours     (219)
                                                     v5p       295                 (94)
                                                     v6e       147                 (47)
Both rates are assumptions: nothing of this was timed on an accelerator. Published: GenEval .98 within 1,000 steps,
where Flow-GRPO (about 160 H100-hours a task) takes more than 5,000 to .95.
256 px in training: --config.model.resolution=256
Cost on 2 CPU cores: none that is useful; `:smoke` runs the recipe on the embedded miniature.

Result, published for SD3.5-M (2509.16117; not reproduced by this project yet, and others had trouble to): GenEval .63 →
.98. It fails on networks that are distilled to few steps.

Where a value comes from: [NFT] DiffusionNFT's released PyTorch code, [ours] decided here; what is not named here is the
schema's default.

Other recipes are settings:
    --config.objective.name=awm --config.objective.kl_beta=0.001 --config.objective.old_beta=1.0 --config.levels.times=6
        --config.rollouts.num_steps=14 --config.advantages.clip=1.0 --config.batch_size=576      AWM (2509.25050)
    --config.objective.name=crd --config.objective.kl_beta=0.1 --config.objective.reference_guidance=4.5
        --config.old.start=0.25 --config.old.slope=0.005 --config.old.limit=0.999 --config.minibatches=2
        --config.updates_per_rollout=2                                CRD (2603.14128)
    --config.old.slope=0.0                                            on policy: the old policy is the new one
    --config.batch_size=256 --config.images_per_prompt=16             16 groups of 16
"""

from fopd_jax.config.learning import ForwardObjective, ForwardRL, OldDecay, Rollouts
from fopd_jax.config.schema import EMA, Evaluation, Model
from fopd_jax.config.skills import TESTED, rewards, task, tasks
from fopd_jax.config.variants import smoke, split_variant

MANY = ("pickscore", "hpsv2", "clipscore")  # [NFT] weights of 1
SLOW = OldDecay(slope=0.0075, wait=75, limit=0.999)  # [NFT] on policy for 75 steps, then ever more behind


def get_config(variant: str = "geneval") -> ForwardRL:
    """`variant` is `geneval`, `ocr`, `pickscore` or `multi`, or one of them with `:smoke` behind it."""
    skill, small = split_variant(variant, ("geneval", "ocr", "pickscore", "multi"))
    many, text = skill == "multi", skill == "ocr"
    config = ForwardRL(
        name=f"sd35m_nft_{skill}",
        model=Model(path="weights/sd35m"),
        tasks={"multi": task("pickscore", 1.0, *MANY)} if many else tasks(skill),
        rewards=rewards(*(MANY if many else (skill,))),
        rollouts=Rollouts(num_steps=25 if many else 10, transition="dpm2"),  # [NFT]
        objective=ForwardObjective(beta=0.1 if many or text else 1.0),  # [NFT]
        old=SLOW if text else OldDecay(),  # [NFT]
        minibatches=2 if text else 1,  # [NFT]
        updates_per_rollout=2 if text else 1,  # [NFT]
        ema=EMA(every=4 if text else 8),
        eval=Evaluation(samples=256, batch_size=64, guidance=1.0, final_samples=TESTED.get(skill, 2048)),  # [NFT]: 1
    )
    if many:
        config.rewards["clipscore"].options = {"unit": "diffusion_nft"}  # [NFT] a hundredth of the logits
    run = config.run
    run.steps, run.eval_every, run.max_failed_rewards = 1000, 60, 0.05  # [NFT] GenEval, [ours] others; [ours]
    return smoke(config) if small else config
