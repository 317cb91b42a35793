"""More teachers than the miniature has tasks: quality as a third task, or several teachers of each skill.

    python tools/miniature_prompts.py --dst runs/miniature_prompts
    python -m fopd_jax.main --config=configs/miniature_teachers.py:3
    python -m fopd_jax.main --config=configs/miniature_teachers.py:8

`3`: the teacher of quality, which is the anchor of configs/miniature.py, teaches a third of the prompts, of both tasks.
`4`, `8`: the prompts of each task fall into 2 or 4 parts at random. Each has a teacher of its own: the packaged one,
extrapolated by λ from -0.2 to 0.2, so that all of them together teach what the one does, and no prompt tells its part.
These are no new skills: the miniature has three. All else is as in configs/miniature.py, from the base and without an
anchor, so that each teacher is counted once. The student is scored on text and composition.

Cost on 2 CPU cores: not measured. `4` and `8` ask the base beside the teacher, as each extrapolation does.
Result: none yet; `python -m fopd_jax.reproduce --table=teachers` sets them beside 1 and 2 teachers.
"""

from pathlib import Path

from fopd_jax.config.load import load_config
from fopd_jax.config.schema import OPD, Anchor, ColdStart, RoutedTask
from fopd_jax.config.variants import smoke, split_variant

PROMPTS = "runs/miniature_prompts"
SKILLS = ("text", "composition")
SPREAD = 0.2


def get_config(variant: str = "") -> OPD:
    """`variant`: the number of teachers, 3, 4 or 8, with `:smoke` behind it the recipe of two in small."""
    choice, small = split_variant(variant, ("3", "4", "8"))
    config = load_config(Path(__file__).with_name("miniature.py"))
    assert isinstance(config, OPD)
    config.name = f"miniature_teachers_{choice}"
    config.tasks = {**config.tasks, **_third()} if choice == "3" else _parts(int(choice))
    config.anchor, config.objective.mar_beta, config.cold_start = Anchor(), 0.0, ColdStart("none")
    config.eval.tasks = SKILLS
    return smoke(config) if small else config


def _third() -> dict[str, RoutedTask]:
    return {"quality": _task("quality", "")}


def _parts(count: int) -> dict[str, RoutedTask]:
    each = count // len(SKILLS)
    tasks = {}
    for skill in SKILLS:
        for k in range(each):
            task = _task(skill, f"#{count}={skill}_{k + 1}")
            task.extrapolation = round(SPREAD * (2 * k / (each - 1) - 1), 6)
            tasks[f"{skill}_{k + 1}"] = task
    return tasks


def _task(skill: str, part: str) -> RoutedTask:
    prompts, test = (f"{PROMPTS}/{split}.jsonl{part}" for split in ("train", "test"))
    return RoutedTask(f"packaged:teacher_{skill}.safetensors", prompts, test, guidance=1.0)
