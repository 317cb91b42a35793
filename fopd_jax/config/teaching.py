"""Who teaches what, and which loss is taken of it: the sections of stage `opd` that are about its teachers.

In `paper`: as in `config.schema`.
"""

import dataclasses
from typing import Annotated

from fopd_jax.config import rules
from fopd_jax.config.rules import MOST_ROWS, NO_LIMIT, above, at_least, between, one_of
from fopd_jax.config.section import Section, setting

OBJECTIVES, REWARDS = ("direct", "clipped", "mixed"), ("kl", "log_ratio", "kl_detached")
WEIGHTINGS = ("kl", "kl_no_dt", "ode", "uniform")
MATCHES = ("guided", "conditional", "branches")
MERGES = ("svd", "concatenate", "factors", "ties", "dare")
DENSE_MERGES = ("ties", "dare")
"""Those that look at single elements of updates."""
COLD_STARTS = ("merge", "adapter", "none")
TeacherGuidance = Annotated[float | None, "guidance"]
"""The field's type; annotated as `Pixels` is."""
PAPER_GUIDANCE = 4.5
"""The scale of the paper's teachers: of one that neither config nor file gives another."""
_GUIDANCE_DOC = "The scale under which the teacher is asked; 1: none; None: what its file says, else the paper's."
REWARDS_DOC = (
    "Rewards that score its images, with their weights: {'ocr': 1.0}. They are evaluated, and trained on by objective "
    "'mixed' alone; 0: beside the weighted sum."
)


@dataclasses.dataclass
class RoutedTask(Section):
    """Prompts and the teacher that they are routed to."""

    teacher: str = setting(
        "", "Adapter (ours, PEFT, diffusers, ComfyUI), or a whole network if `whole_teachers`.", rules.PATH
    )
    prompts: str = setting(
        "", "Training prompts in worlds without their own: a file, a generated set, a built one (tasks/sources.py).",
        rules.PATH,
    )  # fmt: skip
    test: str = setting("", "Held-out prompts, likewise.", rules.PATH)
    guidance: TeacherGuidance = setting(None, _GUIDANCE_DOC, rules.GUIDANCE, "[paper] 4.5")
    weight: float = setting(
        1.0, "Share among the prompts.", at_least(0, 1e6), "[paper] GenEval : OCR : PickScore = 3 : 1 : 1"
    )
    rewards: dict[str, float] = setting({}, REWARDS_DOC, rules.REWARDS, open_names=True)
    schedule: dict[str, float] = setting(
        {}, "Other weights from a step on: {'100': 0.5}; a curriculum.", rules.SCHEDULE, open_names=True
    )
    extrapolation: float = setting(
        0.0, "λ: beyond the teacher, away from the base: v_k + λ·(v_k - v_base); -1: the base.", between(-1, 10)
    )
    mix: dict[str, float] = setting(
        {}, "Soft routing: weights of the tasks' teachers at this task's prompts, {}: its own alone. In proportion.",
        rules.WEIGHTS, open_names=True,
    )  # fmt: skip
    noisy_mix: dict[str, float] = setting(
        {}, "The same at pure noise, `mix` being at the image, linear in t between them; {}: `mix` at all levels.",
        rules.WEIGHTS, open_names=True,
    )  # fmt: skip


@dataclasses.dataclass
class Anchor(Section):
    """Manifold anchor regularisation (MAR) towards a frozen teacher of quality."""

    name: str = setting("anchor", "Its name in the report.", rules.NAME, "[paper] deqa")
    adapter: str = setting("", "Its weights; empty: the base is the anchor.", rules.PATH)
    guidance: TeacherGuidance = setting(None, _GUIDANCE_DOC, rules.GUIDANCE, "[paper] 4.5")
    every: int = setting(
        1, "m: it sees one random sample of every m a timestep, which counts m times.", at_least(1, MOST_ROWS)
    )


@dataclasses.dataclass
class ColdStart(Section):
    """What the student starts from."""

    method: str = setting(
        "merge", "'none': the base; 'adapter': one that was trained before, such as by stage flow_matching.",
        one_of(*COLD_STARTS), "[paper] merge",
    )  # fmt: skip
    merge: str = setting(
        "svd", "'svd': the exact sum at the student's rank; 'concatenate': at the sum of the ranks; 'factors': a and b "
        "apart; 'ties', 'dare': by elements, see adapters/merging.py. Whole networks: their sum, 'ties' or 'dare'.",
        one_of(*MERGES), "[code] factors",
    )  # fmt: skip
    weights: dict[str, float] = setting(
        {},
        "Of teachers or anchor by name; they may sum to anything: a sum of 1 averages, others scale (task arithmetic). "
        "{}: equal ones of all routed teachers, which sum to 1.",
        rules.WEIGHTS,
        "[paper] the average",
    )
    density: float = setting(0.2, "Of 'ties' and 'dare': the share of each layer's elements that stays.", above(0, 1))
    adapter: str = setting(
        "", "Of 'adapter': its file, as teachers may have it, or the folder of the run that trained it.", rules.PATH
    )


@dataclasses.dataclass
class Objective(Section):
    """Which loss, on which steps; see objectives/opd.py."""

    name: str = setting(
        "clipped", "'direct' is the loss itself, 'clipped' PPO's surrogate; 'mixed': of the teachers' reward and the "
        "advantage by the tasks' rewards together.", one_of(*OBJECTIVES), "[paper] clipped",
    )  # fmt: skip
    reward: str = setting(
        "kl", "The teachers'; 'kl_detached' does not learn.", one_of(*REWARDS), "[code] kl; [paper] kl_detached"
    )
    weighting: str = setting("kl", "What a timestep counts.", one_of(*WEIGHTINGS), "[paper] kl; [code] kl_no_dt")
    clip: float = setting(1e-4, "ε of the ratio's clipping.", above(0, NO_LIMIT), "[paper] 1e-4")
    reward_limit: float = setting(5.0, "Detached rewards are clamped to ±it.", above(0, NO_LIMIT), "[code] 5")
    mar_beta: float = setting(0.02, "β of the anchor; 0: no anchor.", at_least(0, 1000), "[paper] 0.02; [code] 0.04")
    window_only: bool = setting(False, "'direct' trains noisy steps only, as 'clipped' always does.")
    teacher_weight: float = setting(1.0, "Of 'mixed': what the teachers' reward counts.", at_least(0, 1e6))
    task_weight: float = setting(1.0, "Of 'mixed': λ, what the tasks' advantage counts.", at_least(0, 1e6))
    match: str = setting(
        "guided", "The student's guided velocity and the targets', its 'conditional' one and their guided one, which "
        "folds their guidance into it, or 'branches': conditional ones, and the differences to the empty prompt.",
        one_of(*MATCHES),
    )  # fmt: skip
    branch_weight: float = setting(1.0, "Of 'branches': what the difference counts.", at_least(0, 1000))
