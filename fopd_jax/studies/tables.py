"""The miniature's tables: which students stand in each, after how much training.

All students of the ablations have the same budget; what is not said is `configs/miniature.py`'s. A student that stands
in several tables is trained once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fopd_jax.studies.jobs import Job
from fopd_jax.studies.students import Student

UPDATES, SAMPLES = 40, 48
BUDGET: dict[str, Any] = {
    "run.steps": UPDATES, "batch_size": SAMPLES, "run.eval_every": 0, "eval.final_samples": 256, "eval.alone": True,
    "health.fixed_states": 0, "health.noisy": "off",
}  # fmt: skip
"""Of a student; the main table has its own length."""
FULL = {"run.steps": 120, "batch_size": 64, "eval.final_samples": 1024}
"""`configs/miniature.py`'s."""
SKILLS = ("text", "composition", "composition_strict", "quality")


@dataclasses.dataclass(frozen=True)
class Table:
    """Students by the names of their rows. `columns`: beside the skills, those of other settings of the sampler or
    evaluations, as `steps 4` or `rewritten`. `budget`: as `BUDGET`, over it.
    """

    title: str
    rows: Mapping[str, Student]
    columns: tuple[str, ...] = ()
    budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _of(**fields: Any) -> Student:
    """With `__` for the dots of fields."""
    return Student(fields={name.replace("__", "."): value for name, value in fields.items()})


PLAIN = Student()
REFERENCE = _of(eval__alone=False)
"""The plain student beside base, teachers and merge."""

RECIPES = {
    "Flow-OPD v1": "flow_opd_v1", "Flow-OPD v5": "flow_opd_v5", "Flow-OPD, its code": "flow_opd_code",
    "DiffusionOPD": "diffusion_opd", "DanceOPD": "dance_opd", "STEP-OPD": "step_opd", "GFD-OPD": "gfd_opd",
    "PDM": "pdm", "CapField-OPD": "capfield_opd",
}  # fmt: skip
NOISY_TEXT = "noisy_text.safetensors"
_NOISY = Job(
    "noisy_text",
    ("tools/noisy_adapter.py", "--src=fopd_jax/worlds/miniature/assets/teacher_text.safetensors",
     f"--dst={{work}}/{NOISY_TEXT}", "--scale=4"),
    NOISY_TEXT,
    kind="preparation",
)  # fmt: skip
_DEMONSTRATIONS = Job(
    "demonstrations",
    ("-m", "fopd_jax.demonstrate", "--config=configs/miniature.py", "--out={work}/demonstrations", "--per-task=2048",
     "--trajectories"),
    "demonstrations/dataset_info.json",
    kind="demonstrations",
)  # fmt: skip
_SFT = Job(
    "sft",
    ("-m", "fopd_jax.main", "--config=configs/miniature_sft.py", "--workdir={work}/sft",
     "--config.tasks.text.images={work}/demonstrations", "--config.tasks.composition.images={work}/demonstrations"),
    "sft/results.json",
    ("demonstrations",),
    "fine-tuning",
)  # fmt: skip


def _mix(task: str, tasks: Sequence[str]) -> dict[str, float]:
    """Four fifths the task's own teacher, the rest all others'."""
    return {each: 0.8 if each == task else round(0.2 / (len(tasks) - 1), 6) for each in sorted(tasks)}


SOFT = {"routing.method": "soft", "tasks.*.mix": _mix}
CLASSIFIER = {"routing.method": "classifier"}
COORDINATES = {"coordinates.rank": 32}
FOLDED = {"tasks.*.guidance": 1.25, "objective.match": "conditional"}
BEYOND = {"tasks.*.extrapolation": 0.25}
BESIDE = {"offline.weight": 0.1, "offline.batch_size": 16, "offline.tasks.*.images": "{work}/demonstrations"}


def _routing() -> dict[str, Student]:
    ways = {"hard": {}, "soft": SOFT, "classifier": CLASSIFIER}
    rows = {"hard": PLAIN, "soft": Student(fields=SOFT), "classifier": Student(fields=CLASSIFIER)}
    for wrong in (0.1, 0.3, 0.5):
        for name in ("hard", "soft"):
            rows[f"{name}, {wrong:.0%} wrong"] = Student(fields={**ways[name], "routing.wrong": wrong})
    return rows


def _rewritten() -> dict[str, Student]:
    rows = {"hard": {}, "hard, half of the prompts rewritten in training": {"tasks.*.rewritten": 0.5},
        "classifier": CLASSIFIER, "coordinates": COORDINATES}  # fmt: skip
    return {name: Student(fields=fields, scored=("rewritten",)) for name, fields in rows.items()}


_STEPS = {"eval.also_steps": (4, 8)}
TABLES: dict[str, Table] = {
    "recipes": Table("Published recipes", {
        "ours": PLAIN, **{name: Student(f"recipes/{file}:miniature") for name, file in RECIPES.items()},
    }),
    "targets": Table("What the student is held to", {
        "ours": PLAIN,
        "beyond the teachers (λ .25)": Student(fields=BEYOND),
        "guidance 1.25 folded": Student(fields=FOLDED),
        "guidance 1.25 folded, λ .25": Student(fields={**FOLDED, **BEYOND}),
        "branches apart": _of(objective__match="branches"),
        "clean latents (x0)": _of(objective__weighting="x0"),
        "next states": _of(objective__weighting="x_next"),
        "divergence (kl)": _of(objective__weighting="kl"),
        "ODE steps": _of(objective__weighting="ode"),
        "normalised": _of(objective__normalise=True),
        "teachers' images beside": Student(fields=BESIDE, needs=(_DEMONSTRATIONS,)),
        "coordinates": Student(fields=COORDINATES),
    }),
    "anchor": Table("The anchor", {
        "none": _of(objective__mar_beta=0.0),
        "β .02": PLAIN,
        "β .2": _of(objective__mar_beta=0.2),
        "β learned, gap ≤ .02": _of(anchor__bound=0.02),
        "the student's average, β .2": _of(anchor__moves="ema", objective__mar_beta=0.2),
        "a slow copy, β .2": _of(anchor__moves="slow", objective__mar_beta=0.2),
        "the base, β .2": _of(anchor__adapter="", anchor__name="base", cold_start__weights={
            "text": 0.5, "composition": 0.5}, objective__mar_beta=0.2),
    }),
    "cold_start": Table("What the student starts from", {
        "the base": _of(cold_start__method="none"),
        "merge": PLAIN,
        "merge by TIES": _of(cold_start__merge="ties"),
        "merge by DARE": _of(cold_start__merge="dare", cold_start__density=0.5),
        "merge of factors": _of(cold_start__merge="factors"),
        "SFT": Student(fields={"cold_start.method": "adapter", "cold_start.adapter": "{work}/sft"},
                       needs=(_DEMONSTRATIONS, _SFT)),
    }),
    "objective": Table("The objective", {
        "direct": _of(objective__name="direct"),
        "clipped": PLAIN,
        "clipped, log ratio, kl": _of(objective__reward="log_ratio", objective__weighting="kl"),
        "clipped, detached kl": _of(objective__reward="kl_detached"),
    }),
    "noise": Table("Noise of the rollout", {
        "ODE, direct": _of(sampler__transition="ode", objective__name="direct"),
        "SDE .3": _of(sampler__noise_level=0.3),
        "SDE .7": PLAIN,
        "SDE 1": _of(sampler__noise_level=1.0),
        "CPS .7": _of(sampler__transition="cps"),
    }),
    "routing": Table("Who teaches", _routing()),
    "rewritten": Table("Rewritten prompts", _rewritten(), ("rewritten",)),
    "few_steps": Table("Few sampling steps", {
        "6-step rollouts": Student(fields=_STEPS),
        "4-step rollouts": Student(fields={"sampler.num_steps": 4, **_STEPS}),
        "4-step rollouts, teachers at 4 times as many": Student(
            fields={"sampler.num_steps": 4, "sampler.teacher_steps": 4, **_STEPS}),
        "8-step rollouts": Student(fields={"sampler.num_steps": 8, **_STEPS}),
    }, ("steps 4", "steps 8")),
    "noisy_teacher": Table("A noisy teacher of text", {
        "clean": PLAIN,
        "noisy": Student(fields={"tasks.text.teacher": f"{{work}}/{NOISY_TEXT}"}, needs=(_NOISY,)),
        "noisy, weighed less by the detector": Student(fields={
            "tasks.text.teacher": f"{{work}}/{NOISY_TEXT}", "health.noisy": "weigh", "health.fixed_states": 16,
        }, needs=(_NOISY,)),
    }),
}  # fmt: skip
