"""Stage 1's settings: teachers by reinforcement learning, see `config.schema`.

In `paper`: [paper] arXiv 2605.08063, [code] the released PyTorch code of Flow-GRPO (2505.05470), which stage 1 follows.
"""

import dataclasses

from fopd_jax.config import rules
from fopd_jax.config.rules import MOST_ROWS, MOST_SAMPLER_STEPS, MOST_STEPS, NO_LIMIT, above, at_least, between, one_of
from fopd_jax.config.schema import SAMPLERS, Comparison, Config, Decoding, Optimizer, Run
from fopd_jax.config.section import Section, setting
from fopd_jax.config.teaching import WEIGHTINGS

SURROGATES = ("clip", "guard", "dppo")
STEP_WEIGHTINGS = ("uniform", "noise")
MOVES = ("none", "slide", "random")
FORWARD_OBJECTIVES = ("nft", "awm", "crd")
LEVELS = ("schedule", "uniform", "logit_normal")


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
    schedule: dict[str, float] = setting(
        {}, "Other weights from a step on: {'100': 0.5}; a curriculum.", rules.SCHEDULE, open_names=True
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
        "sde", "Euler-Maruyama, coefficient-preserving, Euler; of `forward_rl` also 'dpm2', DPM-Solver++(2M).",
        one_of(*SAMPLERS), "[paper] sde; [DiffusionNFT] dpm2",
    )  # fmt: skip
    noise_level: float = setting(0.7, "a of 'sde' and 'cps'.", at_least(0, 10), "[paper] 0.7")
    shared_noise: bool = setting(
        False, "The images of a group start from one noise.", paper="[code] False; clipscore's config True"
    )


@dataclasses.dataclass
class Reinforced(Config):
    """What both stages of reinforcement learning have."""

    tasks: dict[str, RewardedTask] = setting({}, "Prompts and their rewards.")
    batch_size: int = setting(1152, "Images a rollout, all groups together.", at_least(1, MOST_ROWS), "[code] 48 x 24")
    images_per_prompt: int = setting(24, "Of one prompt: a group.", at_least(2, MOST_ROWS), "[paper] 24")
    alternate: int = setting(
        0, "So many steps of one task, then as many of the next, by the tasks' weights; 0: all tasks share each batch.",
        at_least(0, MOST_STEPS),
    )  # fmt: skip
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
    start: str = setting(
        "", "Adapter that training starts from, as of SFT or a merge: a file, or the folder of the run that trained "
        "it; empty: a fresh one. The base stays what the policy is held to.", rules.PATH,
    )  # fmt: skip


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


@dataclasses.dataclass
class TrainedLevels(Section):
    """The noise levels that a final latent is noised to, each with noise of its own, the same share of them each."""

    times: int = setting(
        0, "Levels a latent; 0: as many as the schedule's steps that may be drawn.", at_least(0, MOST_SAMPLER_STEPS),
        "[DiffusionNFT] all, [AWM] 6",
    )  # fmt: skip
    distribution: str = setting(
        "schedule", "The rollout's own levels, or continuous ones, with the model's shift.", one_of(*LEVELS),
        "[DiffusionNFT] schedule",
    )  # fmt: skip
    within: tuple[int, int] | None = setting(
        None, "(start, stop): which steps of 'schedule'; all but the last by default.",
        rules.steps(MOST_SAMPLER_STEPS), "[AWM] all but the first and the last tenth",
    )  # fmt: skip


@dataclasses.dataclass
class ForwardObjective(Section):
    """Which loss on noised final latents; see objectives/forward_rl.py."""

    name: str = setting(
        "nft", "DiffusionNFT; 'awm': advantage-weighted matching; 'crd': centred reward distillation.",
        one_of(*FORWARD_OBJECTIVES),
    )  # fmt: skip
    beta: float = setting(
        1.0, "b of 'nft', β of 'crd'; no part of 'awm'.", above(0, 1000),
        "[DiffusionNFT] 1 (GenEval, PickScore, HPS), 0.1 (OCR, many)",
    )  # fmt: skip
    kl_beta: float = setting(
        1e-4, "β of the distance to the base; 0: the base is not asked.", at_least(0, 1000),
        "[DiffusionNFT] 1e-4, [AWM] 1e-3 to 3e-3, [CRD] 0.1",
    )  # fmt: skip
    reference_guidance: float = setting(
        1.0, "Of the base in that distance; 1: none.", at_least(0, 100), "[CRD] 4.5, others 1"
    )
    old_beta: float = setting(0.0, "β of the distance to the old policy.", at_least(0, 1000), "[AWM] 1, others 0")
    clip: float = setting(1.0, "ε of the ratio of 'awm'.", above(0, NO_LIMIT), "[AWM] 1")


@dataclasses.dataclass
class OldDecay(Section):
    """The old policy, which rolls out: after step k it is d·old + (1 - d)·current,
    d = min(start + slope·max(k - wait, 0), limit). 0 all along: it is the current one."""

    start: float = setting(0.0, "d at first.", rules.PROBABILITY, "[DiffusionNFT] 0, [CRD] 0.25")
    slope: float = setting(
        0.001, "What d grows by a step.", rules.PROBABILITY, "[DiffusionNFT] 0.001, or 0.0075; [CRD] 0.005"
    )
    wait: int = setting(0, "Steps before it grows.", at_least(0, MOST_STEPS), "[DiffusionNFT] 0, or 75")
    limit: float = setting(0.5, "The largest d.", rules.PROBABILITY, "[DiffusionNFT] 0.5, or 0.999; [CRD] 0.999")


@dataclasses.dataclass
class ForwardRL(Reinforced):
    """Stage `forward_rl`: a policy by reinforcement on the forward process; `paper` is DiffusionNFT (2509.16117)."""

    stage: str = setting("forward_rl", "What is run.", one_of("forward_rl"))
    guidance: float = setting(1.0, "Of the policy; 1: none.", at_least(0, 100), "[DiffusionNFT] 1")
    rollouts: Rollouts = setting(lambda: Rollouts(transition="ode"), "How images are made to learn from.")
    minibatches: int = setting(1, "Parts of a rollout, one an update.", at_least(1, 1000), "[DiffusionNFT] 1, OCR 2")
    updates_per_rollout: int = setting(1, "Of the optimizer.", at_least(1, 1000), "[DiffusionNFT] 1, OCR 2")
    levels: TrainedLevels = setting(TrainedLevels, "What final latents are noised to.")
    objective: ForwardObjective = setting(ForwardObjective, "The loss.")
    old: OldDecay = setting(OldDecay, "The policy that rolls out.")

    @property
    def keeps_old(self) -> bool:
        """Whether the old policy is another than the one that trains, within an update or across updates."""
        never = self.old.limit == 0 or (self.old.start == 0 and self.old.slope == 0)
        return not never or self.updates_per_rollout > 1
