"""Teachers for Flow-OPD by Flow-GRPO: Stable Diffusion 3.5 Medium at 512 px, on one reward each, or on a mix.

    python tools/convert_sd35_weights.py --src stable-diffusion-3.5-medium --dst weights/sd35m
    python -m fopd_jax.main --config=configs/sd35m_grpo.py:ocr --check
    python -m fopd_jax.main --config=configs/sd35m_grpo.py:ocr --workdir=runs/sd35m_grpo_ocr

Variants: `geneval`, `ocr`, `pickscore`, `deqa`; `mix` (GRPO-Mix: one policy on three tasks 3:1:1, each task's images by
its own reward, the baseline that distillation is held against); each with `:smoke` behind it in small.

Needs, by default in the working directory (any path can be set by its field); docs/weights-and-prompts.md and
docs/tasks-and-rewards.md get them:
    weights/sd35m                      the converted base
    geneval, mix     weights/mask2former.safetensors, weights/clip_l.safetensors   (tools/convert_reward_weights.py)
    ocr, mix         pip install 'fopd_jax[ocr]'
    pickscore, mix   weights/pickscore.safetensors, data/pickscore/{train,test}.txt
    deqa             data/pickscore/{train,test}.txt, and a judge: vLLM or SGLang with DeQA-Score, at
                     --config.run.servers.deqa.urls="('http://HOST:PORT',)"
GenEval's and OCR's prompts are generated. At the end the run writes `adapter.safetensors` and `adapter_peft/`, which
`tasks.NAME.teacher` of `configs/sd35m_opd.py` takes, and scores base and policy on held-out prompts.

Cost, by arithmetic (171 TFLOP an image: 20 forwards of the rollout, 18 of the reference, 18 forwards and backwards;
195 with what is recomputed): 197 PFLOP a step of 1,152 images and two updates. Decoding and rewards come on top.
    1,000 steps       at 350 TFLOP/s a GPU, H100 or H200       156 GPU-hours       (256 px: 50)
                      at 25% of a chip's peak        v5e     1,110 chip-hours     (353)
                                                     v5p       476                (152)
                                                     v6e       238                 (76)
Both rates are assumptions: nothing of this was timed on an accelerator. Published: about 160 H100-hours a task
(2609.39692). `geneval` runs 2,500 steps by default, 2.5 times that.
Cheaper: configs/sd35m_fast.py and configs/sd35m_nft.py; and 256 px in training, .32 of the FLOPs, which others found to
carry over to larger pictures (the evaluation is at 256, too): --config.model.resolution=256
Memory a chip: see benchmarks/results/pods.md; `python -m fopd_jax.compile_for --config=configs/sd35m_grpo.py:ocr
--topology=v5p:4x4x4`. `run.micro_batches` divides what a chip holds at once: 3 for 8 GPUs of 80 GB.
The batch must be a multiple of chips x minibatches x micro_batches: on 256 chips --config.batch_size=1536.
Cost on 2 CPU cores: none that is useful; `:smoke` runs the recipe on the embedded miniature.

Result, published for SD3.5-M at 512 px, 40 steps (2605.08063; not reproduced by this project yet):
                               GenEval   OCR   DeQA  PickScore
    base                           .63   .59   4.07      21.64
    teacher, on its own metric     .94   .92   4.23      23.19
    mix                            .73   .83   4.33      21.84
Flow-GRPO's authors: GenEval .95. Groups matter: 8 prompts of 8 images collapse, 16 of 16 on 4 GPUs are published.

Where a value comes from: [paper] arXiv 2505.05470 or 2605.08063, [code] the released PyTorch code of Flow-GRPO, [ours]
decided here. What is not named here is the schema's default, and its source stands there (--help, --print-config).
Other than [code]: bfloat16, not float16; RapidOCR, not PaddleOCR; equal prompts of one batch are groups of their own.

Other recipes are settings:
    --config.advantages.normalise=group                               by the group's own deviation
    --config.advantages.normalise=each                                each reward by its own (GDPO)
    --config.advantages.merge_equal_prompts=True                      as [code] has it
    --config.objective.name=guard                                     GRPO-Guard's ratio
    --config.objective.name=dppo --config.objective.kl_beta=0.001 --config.window.within="(0,5)" --config.window.size=3
        --config.window.moves=random --config.batch_size=768 --config.images_per_prompt=16         Flow-DPPO
    --config.objective.step_weighting=noise --config.objective.kl_beta=0.0001      TempFlow-GRPO's weights
    --config.window.size=4 --config.window.moves=slide                MixGRPO's window
    --config.rollouts.shared_noise=True                               a group starts from one noise
    --config.tasks.geneval.rewards.pickscore=0.2 --config.rewards.pickscore.weights=weights/pickscore.safetensors
        --config.rewards.pickscore.divide_by=26                       a second reward of one task
    --config.lag=1                                                    the next rollout while rewards score this one
    --config.batch_size=256 --config.images_per_prompt=16             [code]'s batch for 4 GPUs
"""

from fopd_jax.config.learning import GRPO, PolicyGradient
from fopd_jax.config.schema import EMA, Evaluation, Model
from fopd_jax.config.skills import TESTED, rewards, servers, tasks
from fopd_jax.config.variants import smoke, split_variant

MIX = ("geneval", "ocr", "pickscore")
KL_BETA = {  # of the divergence from the base
    "geneval": 0.04,  # [code]
    "ocr": 0.04,  # [code]
    "pickscore": 0.01,  # [code]
    "deqa": 0.01,  # [ours] as the other reward without a right answer
    "mix": 0.04,  # [ours]
}


def get_config(variant: str = "geneval") -> GRPO:
    """`variant` is `geneval`, `ocr`, `pickscore`, `deqa` or `mix`, or one of them with `:smoke` behind it."""
    skill, small = split_variant(variant, tuple(KL_BETA))
    skills = MIX if skill == "mix" else (skill,)
    config = GRPO(
        name=f"sd35m_grpo_{skill}",
        model=Model(path="weights/sd35m"),
        tasks=tasks(*skills, shares=(3.0, 1.0, 1.0) if skill == "mix" else ()),  # [paper] GRPO-Mix
        rewards=rewards(*skills),
        objective=PolicyGradient(kl_beta=KL_BETA[skill]),
        ema=EMA(every=4),  # [code] 8 updates, of which a step has two
        eval=Evaluation(
            samples=256,  # [ours] to see a trend; [code] the whole test set
            batch_size=64,  # [ours]
            final_samples=TESTED.get(skill, 2048),
        ),
    )
    run = config.run
    run.steps = 2500 if skill == "geneval" else 1000  # [ours] 5,000 updates and more (2509.16117); 160 GPU-hours
    run.eval_every = 60  # [code]
    run.max_failed_rewards = 0.05  # [ours]
    run.servers = servers(*skills)
    return smoke(config) if small else config
