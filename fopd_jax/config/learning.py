"""Stage 1's settings: teachers by reinforcement learning, see `config.schema`.

In `paper`: [paper] arXiv 2605.08063, [code] the released PyTorch code of Flow-GRPO (2505.05470), which stage 1 follows.
"""

import dataclasses

from fopd_jax.config import rules
from fopd_jax.config.rules import MOST_ROWS, MOST_SAMPLER_STEPS, MOST_STEPS, NO_LIMIT, above, at_least, between, one_of
from fopd_jax.config.schema import TRANSITIONS, WEIGHTINGS, Config, Optimizer, Run, Section, setting

SURROGATES = ("clip", "guard", "dppo")
STEP_WEIGHTINGS = ("uniform", "noise")
NORMALISATIONS = ("global", "group", "each")
MOVES = ("none", "slide", "random")


@dataclasses.dataclass
class RewardedTask(Section):
    """Prompts, and the rewards that the policy is trained on there."""

    prompts: str = setting(
        "", "Training prompts in worlds without their own: a file, a generated set, a built one (tasks/sources.py).",
        rules.PATH,
    )  # fmt: skip
    test: str = setting("", "Held-out prompts, likewise.", rules.PATH)
    weight: float = setting(
        1.0, "Share among the prompts.", at_least(0, 1e6), "[paper] GenEval : OCR : PickScore = 3 : 1 : 1"
    )
    rewards: dict[str, float] = setting(
        {}, "What is trained on, with weights: {'ocr': 1.0}; 0: evaluated and logged only.", rules.REWARDS,
        open_names=True,
    )  # fmt: skip


@dataclasses.dataclass
class Rollouts(Section):
    """How images are made to learn from."""

    num_steps: int = setting(10, "Sampler steps.", at_least(2, MOST_SAMPLER_STEPS), "[paper] 10; evaluation 40")
    transition: str = setting(
        "sde", "Euler-Maruyama, coefficient-preserving, or Euler.", one_of(*TRANSITIONS), "[paper] sde"
    )
    noise_level: float = setting(0.7, "a of 'sde' and 'cps'.", at_least(0, 10), "[paper] 0.7")
    shared_noise: bool = setting(
        False, "The images of a group start from one noise.", paper="[code] False; clipscore's config True"
    )


@dataclasses.dataclass
class Decoding(Section):
    """How rollouts become the images that rewards see."""

    batch_size: int = setting(1, "Images that a device decodes at once.", at_least(1, MOST_ROWS))
    dtype: str = setting("float32", "In which the decoder computes.", one_of("float32", "bfloat16"), "[code] float32")


@dataclasses.dataclass
class Comparison(Section):
    """Advantages: a group's rewards less their mean, by a deviation; see rewards/combine.py."""

    normalise: str = setting(
        "global", "By the deviation over the batch, the group's, or each reward by its own in the group, then the sum "
        "(GDPO).", one_of(*NORMALISATIONS), "[code] global",
    )  # fmt: skip
    clip: float = setting(5.0, "They are limited to ±it.", above(0, NO_LIMIT), "[code] 5")
    merge_equal_prompts: bool = setting(
        False, "Equal texts in one batch are one group, not one a draw.", paper="[code] True"
    )


@dataclasses.dataclass
class Decoding(Section):
    """How latents become the images that rewards see."""

    batch_size: int = setting(4, "Images a device decodes at once.", at_least(1, MOST_ROWS))
    dtype: str = setting("float32", "Of the autoencoder.", one_of("float32", "bfloat16"))


@dataclasses.dataclass
class Reinforced(Config):
    """What both stages of reinforcement learning have."""

    tasks: dict[str, RewardedTask] = setting({}, "Prompts and their rewards.")
    batch_size: int = setting(1152, "Images a rollout, all groups together.", at_least(1, MOST_ROWS), "[code] 48 x 24")
    images_per_prompt: int = setting(24, "Of one prompt: a group.", at_least(2, MOST_ROWS), "[paper] 24")
    guidance: float = setting(4.5, "Of the policy; 1: none.", at_least(0, 100), "[paper] 4.5")
    rollouts: Rollouts = setting(Rollouts, "How images are made to learn from.")
    advantages: Comparison = setting(Comparison, "How rewards become advantages.")
    decoding: Decoding = setting(Decoding, "How latents become images.")
    optimizer: Optimizer = setting(lambda: Optimizer(learning_rate=3e-4), "AdamW.")
    lag: int = setting(
        0, "1: the next rollout is made by the weights before the update while rewards score this one.", between(0, 1)
    )
    minibatches: int = setting(2, "Parts of a rollout, one an update.", at_least(1, 1000), "[code] 2")
    updates_per_rollout: int = setting(2, "Of the optimizer.", at_least(1, 1000), "[code] 2")


@dataclasses.dataclass
class NoiseWindow(Section):
    """Which steps of a rollout draw noise; those are trained, but for the schedule's last. The others are ODE steps."""

    within: tuple[int, int] | None = setting(
        None, "(start, stop): where it lies; all steps by default.", rules.steps(MOST_SAMPLER_STEPS)
    )
    size: int = setting(0, "Steps of it; 0: all that it may lie in.", at_least(0, MOST_SAMPLER_STEPS))
    moves: str = setting(
        "none", "'slide': towards data as training goes on (MixGRPO); 'random': anew every step (Flow-GRPO-Fast).",
        one_of(*MOVES),
    )  # fmt: skip
    every: int = setting(25, "Of 'slide': steps of training between two moves, each by one.", at_least(1, MOST_STEPS))


@dataclasses.dataclass
class PolicyGradient(Section):
    """Which loss on a rollout's noisy steps; see objectives/grpo.py."""

    name: str = setting(
        "clip", "PPO's surrogate; 'guard': its ratio regularised (GRPO-Guard); 'dppo': masked by exact divergence.",
        one_of(*SURROGATES), "[paper] clip",
    )  # fmt: skip
    clip: float = setting(1e-4, "ε of 'clip' and 'guard'.", above(0, NO_LIMIT), "[paper] 1e-4")
    divergence: float = setting(1e-5, "Of 'dppo': from which on a step that moves away is left out.", at_least(0, 1e6))
    kl_beta: float = setting(
        0.04, "β of the divergence from the base; 0: the base is not asked.", at_least(0, 1000),
        "[code] 0.04 (GenEval, OCR), 0.01 (PickScore)",
    )  # fmt: skip
    kl_weighting: str = setting(
        "kl_no_dt", "What a timestep's divergence counts.", one_of(*WEIGHTINGS), "[code] kl_no_dt"
    )
    step_weighting: str = setting(
        "uniform", "'noise': a step counts in proportion to its noise (TempFlow-GRPO).", one_of(*STEP_WEIGHTINGS)
    )


@dataclasses.dataclass
class GRPO(Reinforced):
    """Stage `grpo`: a policy by Flow-GRPO on rewards of its images."""

    stage: str = setting("grpo", "What is run.", one_of("grpo"))
    window: NoiseWindow = setting(NoiseWindow, "Which steps draw noise and are trained.")
    objective: PolicyGradient = setting(PolicyGradient, "The loss.")
    run: Run = setting(lambda: Run(alarms={"ratio": (0.9, 1.1)}), "How it is run; no part of its identity.")
