"""Who teaches what, and which loss is taken of it: the sections of stage `opd` that are about its teachers.

In `paper`: as in `config.schema`.
"""

import dataclasses
from typing import Annotated

from fopd_jax.config import rules
from fopd_jax.config.rules import MOST_ROWS, NO_LIMIT, above, at_least, between, one_of
from fopd_jax.config.section import Section, setting

OBJECTIVES, REWARDS = ("direct", "clipped", "mixed"), ("kl", "log_ratio", "kl_detached")
RATIO_LIMITS = ("clip", "dppo")
WEIGHTINGS = ("kl", "kl_no_dt", "ode", "uniform", "x0", "x_next")
MATCHES = ("guided", "conditional", "branches")
NETWORK_DTYPES = ("float32", "bfloat16", "float8_e4m3")
ANCHOR_MOVES = ("none", "ema", "slow")
ROUTINGS = ("hard", "soft", "classifier")
MERGES = ("svd", "concatenate", "factors", "ties", "dare")
DENSE_MERGES = ("ties", "dare")
"""Those that look at single elements of updates."""
COLD_STARTS = ("merge", "adapter", "none")
NOISY = ("warn", "weigh", "off")
STATISTICS = ("size", "anchor", "apart", "spread")
JOINT_TARGETS = ("sum", "routed")
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
    rewritten: float = setting(
        0.0, "Share of its training prompts that the networks read in other words (tasks/paraphrase.py), the same ones "
        "all along; rewards go by the prompts as they were.", rules.PROBABILITY,
    )  # fmt: skip
    network: str = setting(
        "", "The one of `networks` that the teacher is, or is an adapter on; empty: an adapter on the student's base."
    )


@dataclasses.dataclass
class Routing(Section):
    """Which teachers a prompt is taught by; see policy/routing.py."""

    method: str = setting(
        "hard", "'hard': its task's; 'soft': several by the weights in `tasks.NAME.mix`; 'classifier': by the "
        "probabilities of a classifier that is trained at the start on the prompts of all tasks with a teacher; tasks "
        "may then have none.", one_of(*ROUTINGS), "[paper] hard",
    )  # fmt: skip
    temperature: float = setting(
        1.0, "Of 'classifier': of its probabilities; towards 0 the likeliest teacher alone.", between(0.001, 1000)
    )
    top: int = setting(
        0, "Of 'classifier': the m likeliest teachers alone, in proportion, at m forwards a sample; 0: all of them.",
        at_least(0, MOST_ROWS),
    )  # fmt: skip
    wrong: float = setting(
        0.0, "Share of the prompts that are taken for another task's, the same ones all along: to study mistakes.",
        rules.PROBABILITY,
    )  # fmt: skip


@dataclasses.dataclass
class Anchor(Section):
    """Manifold anchor regularisation (MAR) towards a frozen teacher of quality, or one that follows the student.

    With a `bound` the weight β learns, by dual ascent after every step: β ← β·exp(η·(gap/bound - 1)) within its limits,
    from `objective.mar_beta` on.
    """

    name: str = setting("anchor", "Its name in the report.", rules.NAME, "[paper] deqa")
    adapter: str = setting("", "Its weights; empty: the base is the anchor.", rules.PATH)
    guidance: TeacherGuidance = setting(None, _GUIDANCE_DOC, rules.GUIDANCE, "[paper] 4.5")
    every: int = setting(
        1, "m: it sees one random sample of every m a timestep, which counts m times.", at_least(1, MOST_ROWS)
    )
    moves: str = setting(
        "none", "'ema': the anchor is the student's own average, section `ema`; 'slow': another one, of `decay`. Then "
        "`adapter` is there for the merge and the report alone.", one_of(*ANCHOR_MOVES),
    )  # fmt: skip
    decay: float = setting(0.99, "Of 'slow': what of it stays at each step.", rules.PROBABILITY)
    bound: float = setting(0.0, "The largest `anchor_gap` that β should leave; 0: β stays.", at_least(0, NO_LIMIT))
    bound_rate: float = setting(0.05, "η: twice the bound multiplies β by e^η a step.", above(0, 10))
    bound_limits: tuple[float, float] = setting((1e-4, 10.0), "Of β.", rules.RANGE)
    network: str = setting("", "As of a task; then an empty `adapter` is that network itself.")


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
    weighting: str = setting(
        "kl", "What a timestep counts; 'uniform', 'x0', 'x_next': distances of velocities, clean latents, next states.",
        one_of(*WEIGHTINGS), "[paper] kl; [code] kl_no_dt",
    )  # fmt: skip
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
    normalise: bool = setting(False, "Divide squared distances by their roots: all gaps pull alike.")
    surrogate: str = setting(
        "clip", "Of 'clipped' and 'mixed', what limits the ratio: a clip; 'dppo': steps that move away are left out by "
        "exact divergence (Flow-DPPO).", one_of(*RATIO_LIMITS), "[paper] clip",
    )  # fmt: skip
    divergence: float = setting(1e-5, "Of 'dppo': from which on a step that moves away is left out.", at_least(0, 1e6))


@dataclasses.dataclass
class Health(Section):
    """How distillation goes beside its loss, and which teacher is not worth following: evaluation/teacher_health.py.

    Looking on changes no number of a run, and is no part of its identity; 'weigh' does, and is.
    """

    gaps: bool = setting(True, "Log the plain gap by task and timestep: `gap/TASK/t00`.")
    fixed_states: int = setting(
        8, "Prompts a task whose fixed states evaluations measure the gap at; 0: none.", at_least(0, MOST_ROWS)
    )
    noisy: str = setting(
        "warn", "A teacher outside of a band is named at the run's start; 'weigh': and counts `weight`.", one_of(*NOISY)
    )
    weight: float = setting(0.1, "Of 'weigh': what such a teacher's part of the loss counts.", rules.PROBABILITY)
    bands: dict[str, tuple[float, float]] = setting(
        {"size": (0.0, 0.6), "anchor": (0.0, 0.6), "apart": (0.0, 0.35), "spread": (0.5, 2.0)},
        "(low, high) of what is known of teachers; {}: none.", rules.bands(STATISTICS),
    )  # fmt: skip


@dataclasses.dataclass
class Coordinates(Section):
    """Capability coordinates: a dial per skill, as in CapField-OPD (policy/coordinates.py).

    Each prompt is drawn with its own skill alone at 1, with others at 1 together, with all at 0, or else at a point of
    the simplex of skills and base; all of it times a number around 1.
    """

    rank: int = setting(
        0,
        "Features between the coordinates and the embedding that they are added to; 0: none.",
        between(0, 2**14),
    )
    alone: float = setting(0.4, "Share of prompts at their own skill alone.", rules.PROBABILITY)
    joint: float = setting(0.25, "Share at several skills together.", rules.PROBABILITY)
    base: float = setting(
        0.1, "Share at 0, the base; what is left of 1 is drawn between skills and base.", rules.PROBABILITY
    )
    joint_target: str = setting(
        "routed", "What is taught there: the prompt's own teacher, as by a teacher of all skills, or 'sum': v_base + "
        "Σ c_k·(v_k - v_base) as elsewhere, which doubles what teachers have in common.", one_of(*JOINT_TARGETS),
    )  # fmt: skip
    high: float = setting(
        1.25, "Coordinates are drawn times a number in [2 - high, high]: beyond 1 the target is beyond the teacher.",
        between(1, 2),
    )  # fmt: skip


@dataclasses.dataclass
class TeacherNetwork(Section):
    """A network beside the student's base in the same latent space, that is a teacher or carries some."""

    preset: str = setting("sd35_large", "Shape of the network, by its published name.")
    path: str = setting("", "Its weights, as `model.path`; empty: random ones, of the seed.", rules.PATH)
    dtype: str = setting(
        "bfloat16", "Of its weights; 'float8_e4m3': those of dense layers, with a float32 scale an output channel.",
        one_of(*NETWORK_DTYPES),
    )  # fmt: skip
