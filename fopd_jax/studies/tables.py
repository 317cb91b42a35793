"""The paper's tables and those that nobody published: which students stand in each, after how much training.

What is not said of a student is its scale's main config. A student that stands in several tables is trained once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fopd_jax.studies.jobs import Job
from fopd_jax.studies.students import EVERYBODY, Student, config_flag

SKILLS = ("text", "composition", "composition_strict", "quality")
"""Of the miniature's scores."""


_ASSETS = "fopd_jax/worlds/miniature/assets"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Where tables are made. `main`: the config of stage 2, `variant` that of recipes; `sft`: the config of fine-tuning
    on what its teachers have drawn; `mix`: that of one policy on all rewards; `teachers`: adapters to merge; `noisy`: a
    task, and its adapter to spoil; `large`: the config of a larger teacher.

    `guidance`: the teachers', where it is folded; `budget`: what students change, all alike; `rewarded`: of policies on
    rewards, in its place; `mixed`: what lets a student see its tasks' rewards, too; `curves`: how often evaluations are
    made that are drawn, over the budget; `policies`: configs of policies whose curves stand beside a student's.
    """

    main: str
    variant: str
    sft: str
    tasks: tuple[str, ...]
    mix: str
    teachers: tuple[str, ...]
    noisy: tuple[str, str]
    large: str
    guidance: float
    budget: Mapping[str, Any]
    rewarded: Mapping[str, Any]
    mixed: Mapping[str, Any]
    curves: Mapping[str, Any]
    policies: tuple[str, ...]


MINIATURE = Scale(
    main="miniature",
    variant=":miniature",
    sft="miniature_sft",
    tasks=("text", "composition"),
    mix="miniature_rl:mix",
    teachers=tuple(f"{_ASSETS}/teacher_{name}.safetensors" for name in ("text", "composition", "quality")),
    noisy=("text", f"{_ASSETS}/teacher_text.safetensors"),
    large="miniature_large",
    guidance=1.25,
    budget={
        "run.steps": 40, "batch_size": 24, "run.eval_every": 0, "eval.final_samples": 192, "eval.alone": True,
        "health.fixed_states": 0, "health.noisy": "off",
    },
    rewarded={"run.steps": 24, "run.eval_every": 0, "eval.final_samples": 192, "eval.alone": True},
    mixed={
        "objective.name": "mixed", "images_per_prompt": 8, "tasks.text.rewards": {"text": 1.0},
        "tasks.composition.rewards": {"composition": 1.0},
    },
    curves={"run.eval_every": 5, "eval.samples": 128},
    policies=("miniature_rl:mix", "miniature_rl:mix-nft"),
)  # fmt: skip
TAUGHT_BY = tuple(f"miniature_rl:{name}-nft" for name in ("text", "composition", "quality"))
"""Configs that the miniature's packaged teachers were trained by."""
SD35M = Scale(
    main="sd35m_opd",
    variant="",
    sft="sd35m_sft:demonstrations",
    tasks=("geneval", "ocr", "pickscore"),
    mix="sd35m_grpo:mix",
    teachers=tuple(f"teachers/{name}" for name in ("geneval", "ocr", "pickscore", "deqa")),
    noisy=("ocr", "teachers/ocr"),
    large="sd35m_large",
    guidance=4.5,
    budget={"eval.alone": True},
    rewarded={"eval.alone": True},
    mixed={
        "objective.name": "mixed", "images_per_prompt": 16, "tasks.ocr.rewards": {"ocr": 1.0},
        "tasks.geneval.rewards": {"geneval": 1.0}, "rewards.geneval.weights": "weights/mask2former.safetensors",
        "rewards.geneval.options.clip": "weights/clip_l.safetensors",
        "tasks.pickscore.rewards": {"pickscore": 1.0}, "rewards.pickscore.weights": "weights/pickscore.safetensors",
        "rewards.pickscore.divide_by": 26.0,
    },
    curves={},
    policies=("sd35m_grpo:mix",),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Table:
    """Students by the names of their rows. `columns`: beside the skills, those of other settings of the sampler or
    evaluations, as `steps 4` or `rewritten`. `budget`: as a scale's, over it. `long`: made where it is named alone.
    `seeds`: how many by default. `curves`: periodic evaluations are drawn, too, against images and FLOPs.
    """

    title: str
    rows: Mapping[str, Student]
    columns: tuple[str, ...] = ()
    budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    long: bool = False
    seeds: int = 1
    curves: bool = False


PLAIN = Student()
REFERENCE = Student(scored=(EVERYBODY,))
"""The plain student, evaluated beside base, teachers and merge, too."""
RECIPES = {
    "Flow-OPD v1": "flow_opd_v1", "Flow-OPD v5": "flow_opd_v5", "Flow-OPD, its code": "flow_opd_code",
    "DiffusionOPD": "diffusion_opd", "DanceOPD": "dance_opd", "STEP-OPD": "step_opd", "GFD-OPD": "gfd_opd",
    "PDM": "pdm", "CapField-OPD": "capfield_opd", "Flow-DPPO + OPD": "flow_dppo_opd",
}  # fmt: skip
CLASSIFIER = {"routing.method": "classifier"}
COORDINATES = {"coordinates.rank": 32}
BEYOND = {"tasks.*.extrapolation": 0.25}


def _mix(task: str, tasks: Sequence[str]) -> dict[str, float]:
    """Four fifths the task's own teacher, the rest all others'."""
    return {each: 0.8 if each == task else round(0.2 / (len(tasks) - 1), 6) for each in sorted(tasks)}


SOFT = {"routing.method": "soft", "tasks.*.mix": _mix}


SPLITS = {"prompts": "train", "test": "test"}
"""Fields of a task whose prompts are files, and the split that each names."""


# ---- what has to be made first


def demonstrations(scale: Scale) -> Job:
    """The teachers' own images and trajectories."""
    return Job(
        "demonstrations",
        ("-m", "fopd_jax.demonstrate", config_flag(scale.main), "--out={work}/demonstrations",
         "--per-task=2048", "--trajectories"),
        "demonstrations/dataset_info.json",
        kind="demonstrations",
    )  # fmt: skip


def sft(scale: Scale) -> Job:
    """An adapter that has learned them."""
    images = (f"--config.tasks.{task}.images={{work}}/demonstrations" for task in scale.tasks)
    return Job(
        "sft",
        ("-m", "fopd_jax.main", config_flag(scale.sft), "--workdir={work}/sft", *images),
        "sft/samples.png",
        ("demonstrations",),
        "fine-tuning",
    )


def noisy(scale: Scale) -> Job:
    """A teacher that is not worth following."""
    _, source = scale.noisy
    return Job(
        "noisy",
        ("tools/noisy_adapter.py", f"--src={source}", "--dst={work}/noisy.safetensors", "--scale=4"),
        "noisy.safetensors",
        kind="preparation",
    )


def prompts() -> Job:
    """The miniature's, as files for tasks that are added to its own."""
    return Job(
        "prompts",
        ("tools/miniature_prompts.py", "--dst={work}/prompts"),
        "prompts/test.jsonl",
        kind="preparation",
    )


def large() -> Job:
    """The miniature's larger network, which no package brings; that of SD3.5 is published."""
    return Job(
        "large",
        ("-m", "fopd_jax.main", config_flag("miniature_pretrain:large"), "--workdir={work}/large"),
        "large/base.safetensors",
        kind="pretraining",
    )


def merge(scale: Scale) -> Job:
    """The teachers' average, to begin reinforcement learning from."""
    return Job(
        "merge",
        ("tools/merge_adapters.py", "--dst={work}/merge.safetensors", "--src", *scale.teachers),
        "merge.safetensors",
        kind="preparation",
    )


# ---- tables


def _main(scale: Scale) -> Table:
    """The paper's first: what one policy on all rewards reaches, and what distilling single-reward teachers does."""
    tuned = demonstrations(scale), sft(scale)
    starts: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Job, ...]]] = {
        "the base": ({}, {"cold_start.method": "none"}, ()),
        "SFT": ({"start": "{work}/sft"}, {"cold_start.method": "adapter", "cold_start.adapter": "{work}/sft"}, tuned),
        "merge": ({"start": "{work}/merge.safetensors"}, {}, (merge(scale),)),
    }
    rows = {
        f"GRPO-Mix from {name}": Student(scale.mix, begins, needs, model="policy", budget=scale.rewarded)
        for name, (begins, _, needs) in starts.items()
    }
    for objective in ("direct", "clipped"):
        for name, (_, begins, needs) in starts.items():
            own = needs if name == "SFT" else ()
            rows[f"OPD, {objective}, from {name}"] = Student(fields={**begins, "objective.name": objective}, needs=own)
    return Table("Reinforcement learning and distillation", rows, seeds=3)


def _of(**fields: Any) -> Student:
    """With `__` for the dots of fields."""
    return Student(fields={name.replace("__", "."): value for name, value in fields.items()})


def _recipes(scale: Scale) -> Table:
    theirs = {name: Student(f"recipes/{file}{scale.variant}") for name, file in RECIPES.items()}
    return Table("Published recipes", {"ours": PLAIN, **theirs})


def _targets(scale: Scale) -> Table:
    folded = {"tasks.*.guidance": scale.guidance, "objective.match": "conditional", "guidance": 1.0}
    beside = {"offline.weight": 0.1, "offline.batch_size": 16, "offline.tasks.*.images": "{work}/demonstrations"}
    return Table(
        "What the student is held to",
        {
            "the teacher's velocity": PLAIN,
            "beyond the teachers (λ .25)": Student(fields=BEYOND),
            f"guidance {scale.guidance:g} folded": Student(fields=folded),
            f"guidance {scale.guidance:g} folded, λ .25": Student(fields={**folded, **BEYOND}),
            "branches apart": _of(objective__match="branches"),
            "normalised": _of(objective__normalise=True),
            "teachers' images beside": Student(fields=beside, needs=(demonstrations(scale),)),
            "coordinates": Student(fields=COORDINATES),
        },
    )


def _beyond(scale: Scale) -> Table:
    """Extrapolation gains the skills; an anchor of image quality or the other teachers' share are to keep the rest."""
    rows = {
        f"λ {far:g}, β {beta:g}": Student(fields={"tasks.*.extrapolation": far, "objective.mar_beta": beta})
        for far, beta in ((0.25, 0.02), (0.25, 0.2), (0.25, 0.5), (0.5, 0.2))
    }
    for far, beta in ((0.25, 0.02), (0.5, 0.02), (0.5, 0.2)):
        fields = {**SOFT, "tasks.*.extrapolation": far, "objective.mar_beta": beta}
        rows[f"λ {far:g}, β {beta:g}, a fifth from the others"] = Student(fields=fields)
    return Table("Above the teachers", rows)


def _cold_start(scale: Scale) -> Table:
    tuned = {"cold_start.method": "adapter", "cold_start.adapter": "{work}/sft"}
    return Table(
        "What the student starts from",
        {
            "the base": _of(cold_start__method="none"),
            "merge": PLAIN,
            "merge by TIES": _of(cold_start__merge="ties"),
            "merge by DARE": _of(cold_start__merge="dare", cold_start__density=0.5),
            "merge of factors": _of(cold_start__merge="factors"),
            "SFT": Student(fields=tuned, needs=(demonstrations(scale), sft(scale))),
        },
    )


def _few_steps(_: Scale) -> Table:
    steps = {"eval.also_steps": (4, 8)}
    four = {"sampler.num_steps": 4, **steps}
    return Table(
        "Few sampling steps",
        {
            "usual rollouts": Student(fields=steps),
            "4-step rollouts": Student(fields=four),
            "4-step rollouts, teachers at 4 times as many": Student(fields={**four, "sampler.teacher_steps": 4}),
            "8-step rollouts": Student(fields={"sampler.num_steps": 8, **steps}),
        },
        ("steps 4", "steps 8"),
    )


def _noisy_teacher(scale: Scale) -> Table:
    task, _ = scale.noisy
    spoiled = {f"tasks.{task}.teacher": "{work}/noisy.safetensors"}
    weighed = {**spoiled, "health.noisy": "weigh", "health.fixed_states": 16}
    return Table(
        f"A noisy teacher of {task}",
        {
            "clean": PLAIN,
            "noisy": Student(fields=spoiled, needs=(noisy(scale),)),
            "noisy, weighed less by the detector": Student(fields=weighed, needs=(noisy(scale),)),
        },
    )


def _routing(_: Scale) -> Table:
    ways: dict[str, dict[str, Any]] = {"hard": {}, "soft": SOFT, "classifier": CLASSIFIER}
    ways["one task a step, by turns"] = {"alternate": 1}
    rows = {name: Student(fields=fields) for name, fields in ways.items()}
    for wrong in (0.3, 0.5):
        for name in ("hard", "soft"):
            rows[f"{name}, {wrong:.0%} wrong"] = Student(fields={**ways[name], "routing.wrong": wrong})
    return Table("Who teaches", rows)


def _teachers(scale: Scale) -> Table:
    """All from the base without an anchor, where neither start nor anchor holds another teacher."""
    alone, rows = {"objective.mar_beta": 0.0, "cold_start.method": "none"}, dict[str, Student]()
    for count in range(1, len(scale.tasks) + 1):
        never = {f"tasks.{task}.weight": 0.0 for task in scale.tasks[count:]}
        rows[f"{count}: {', '.join(scale.tasks[:count])}"] = Student(fields={**alone, **never})
    if scale is MINIATURE:
        third = {f"tasks.quality.{field}": f"{{work}}/prompts/{split}.jsonl" for field, split in SPLITS.items()}
        rows["3: text, composition, quality"] = Student("miniature_teachers:3", third, (prompts(),))
        for count in (4, 8):
            fields = {f"tasks.*.{field}": _part(split, count) for field, split in SPLITS.items()}
            name = f"{count}: {count // 2} of text, {count // 2} of composition"
            rows[name] = Student(f"miniature_teachers:{count}", fields, (prompts(),))
    return Table("How many teachers", rows)


def _part(split: str, count: int) -> Callable[[str, Sequence[str]], str]:
    return lambda task, _: f"{{work}}/prompts/{split}.jsonl#{count}={task}"


def _rewritten(_: Scale) -> Table:
    ways: dict[str, dict[str, Any]] = {
        "hard": {}, "hard, half of the training prompts rewritten": {"tasks.*.rewritten": 0.5},
        "classifier": CLASSIFIER, "coordinates": COORDINATES,
    }  # fmt: skip
    rows = {name: Student(fields=fields, scored=("rewritten",)) for name, fields in ways.items()}
    return Table("Rewritten prompts", rows, ("rewritten",))


def _anchor(scale: Scale) -> Table:
    weights = dict.fromkeys(scale.tasks, round(1 / len(scale.tasks), 6))
    base = {"anchor.adapter": "", "anchor.name": "base", "cold_start.weights": weights, "objective.mar_beta": 0.2}
    return Table(
        "The anchor",
        {
            "none": _of(objective__mar_beta=0.0),
            "β .02": PLAIN,
            "β .2": _of(objective__mar_beta=0.2),
            "β learned, gap ≤ .02": _of(anchor__bound=0.02),
            "the student's average, β .2": _of(anchor__moves="ema", objective__mar_beta=0.2),
            "a slow copy, β .2": _of(anchor__moves="slow", objective__mar_beta=0.2),
            "the base, β .2": Student(fields=base),
        },
    )


def _objective(scale: Scale) -> Table:
    return Table(
        "The objective",
        {
            "clipped": PLAIN,
            "direct": _of(objective__name="direct"),
            "clipped, log ratio, kl": _of(objective__reward="log_ratio", objective__weighting="kl"),
            "clipped, detached kl": _of(objective__reward="kl_detached"),
            "mixed: the tasks' rewards beside": Student(fields=scale.mixed),
        },
    )


def _weighting(_: Scale) -> Table:
    names = {"velocities": "uniform", "clean latents": "x0", "next states": "x_next", "divergence": "kl",
             "divergence, dt forgotten": "kl_no_dt", "ODE steps": "ode"}  # fmt: skip
    return Table(
        "What weighs a timestep", {name: _of(objective__weighting=weighting) for name, weighting in names.items()}
    )


def _larger_teacher(scale: Scale) -> Table:
    at, needs = (
        ({"networks.large.path": "{work}/large/base.safetensors"}, (large(),)) if scale is MINIATURE else ({}, ())
    )
    both = {
        **{f"tasks.{task}.network": "large" for task in scale.tasks},
        **{f"tasks.{task}.teacher": "" for task in scale.tasks},
        "cold_start.method": "none",
    }
    return Table(
        "A larger teacher",
        {
            "teachers on the student's base": _of(cold_start__method="none"),
            "as the config of the larger has it": Student(scale.large, {**at, "cold_start.method": "none"}, needs),
            "the larger itself for every task": Student(scale.large, {**at, **both}, needs),
        },
        long=True,
    )


def _noise(_: Scale) -> Table:
    return Table(
        "Noise of the rollout",
        {
            "ODE, direct": _of(sampler__transition="ode", objective__name="direct"),
            "SDE .3": _of(sampler__noise_level=0.3),
            "SDE .7": PLAIN,
            "SDE 1": _of(sampler__noise_level=1.0),
            "CPS .7": _of(sampler__transition="cps"),
        },
    )


def _efficiency(scale: Scale) -> Table:
    """What a score costs."""
    rows = {"OPD": PLAIN, "OPD from the base": _of(cold_start__method="none"), "mixed": Student(fields=scale.mixed)}
    for name in scale.policies:
        rows[name] = Student(name, model="policy", budget={**scale.rewarded, **scale.curves})
    return Table("What a score costs", rows, budget=scale.curves, curves=True)


# ---- all of them


def tables(scale: Scale) -> dict[str, Table]:
    """By name."""
    makers: dict[str, Callable[[Scale], Table]] = {
        "main": _main, "recipes": _recipes, "targets": _targets, "beyond": _beyond, "cold_start": _cold_start,
        "few_steps": _few_steps, "noisy_teacher": _noisy_teacher, "routing": _routing, "teachers": _teachers,
        "rewritten": _rewritten, "anchor": _anchor, "objective": _objective, "weighting": _weighting, "noise": _noise,
        "efficiency": _efficiency, "larger_teacher": _larger_teacher,
    }  # fmt: skip
    return {name: make(scale) for name, make in makers.items()}


NAMES = tuple(tables(MINIATURE))
