"""Several models on several suites: images first, then scores, a folder of cells (`evaluation.records`).

What is there is not made again, so that the same command goes on where it was killed, asks again for scores that
failed, and adds models, suites, settings and rewards to a folder.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fopd_jax.config.parse import flatten
from fopd_jax.config.schema import NOISELESS, RewardConfig
from fopd_jax.config.stages import StageConfig
from fopd_jax.console import progress
from fopd_jax.evaluation.cell_scores import Judges, lacking, score
from fopd_jax.evaluation.comparison import check_choices
from fopd_jax.evaluation.generate import Sheet, begin, check_plan, generate, missing, take_over
from fopd_jax.evaluation.layouts import check_names, find_given
from fopd_jax.evaluation.records import Cell, Settings
from fopd_jax.evaluation.results import check_all
from fopd_jax.evaluation.sampler import Sampler
from fopd_jax.evaluation.settings import ALSO, Made, cell_settings
from fopd_jax.evaluation.suites import SUITES, Suite, chosen, difference, read_suite, scored_by
from fopd_jax.exits import naming
from fopd_jax.parallel.agreement import share
from fopd_jax.parallel.distributed import is_main, warn
from fopd_jax.policy.velocity import Tree
from fopd_jax.rewards.pool import Pool
from fopd_jax.rewards.registry import close_all, make_rewards
from fopd_jax.rewards.reward import Reward
from fopd_jax.running import lock, records
from fopd_jax.stages.again import check_out, make_folder
from fopd_jax.stages.cards import base_hash, size_of
from fopd_jax.stages.contestants import Base, Contestant, find_contestants
from fopd_jax.stages.pipeline import Pipeline, check_base, load_base, make_pipeline
from fopd_jax.stages.setup import eval_sampler
from fopd_jax.tasks.sources import read_sets
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.embedded import EMBEDDED

Suites = dict[str, Suite]
"""By name."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is to be evaluated. `models`: sources by name (`stages.contestants`); `suites`: names, none for those of a
    world's own tasks; `data`: sources of prompts by suite; `also`: settings beside the config's, of `ALSO`.

    `prompts`: so many of each suite, spread over it, and `samples`: images of each; None: as published. `against`: the
    model whose leads are told, '' for the last one; `allow_unequal`: in what models may be unequal all the same.
    """

    models: Mapping[str, str]
    suites: Sequence[str] = ()
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    also: Collection[str] = ()
    prompts: int | None = None
    samples: int | None = None
    against: str = ""
    allow_unequal: Sequence[str] = ()

    @property
    def reference(self) -> str:
        """The name of the model whose leads are told."""
        return self.against or [*self.models][-1]


def evaluate_models(config: StageConfig, wish: Wish, out: Path) -> list[Cell]:
    """Make the images that are not there, then the scores that are not; `out` is on a disk that all processes share.

    `config`: names the base, the sampler's settings and the rewards.

    Raises:
      ValueError: names the flag, field or file that is wrong, before anything is written.
      TooManyFailures: a reward failed for more than `run.max_failed_rewards`; the same command goes on.
      OSError: `out` cannot be written.
    """
    if unknown := sorted(set(wish.also) - set(ALSO)):
        raise ValueError(f"--also: found {unknown[0]!r}, expected some of {', '.join(ALSO)}")
    check_choices(wish.allow_unequal, "--allow-unequal")
    if wish.reference not in wish.models:
        raise ValueError(f"--against: found {wish.against!r}, expected one of {', '.join(wish.models)}")
    check_out(out)
    pipeline = make_pipeline(config.model, config.run, dict)
    check_base(config.model, pipeline)
    suites = read_suites(config, pipeline, wish)
    contestants = find_contestants(config, pipeline, wish.models)
    kinds, rewards = _make_rewards(config, pipeline, suites)
    with contextlib.ExitStack() as closing:
        closing.callback(close_all, rewards)
        _check_prompts(suites, kinds, rewards)
        sheets = {each.name: _sheets(config, pipeline, each, suites, wish.also, out) for each in contestants}
        for each in contestants:
            _check(pipeline, each, sheets[each.name], suites)
        planned = [Cell(each.model, each.suite.name, each.setting, each.settings, ()) for each in _all(sheets)]
        check_all(planned, wish.reference, wish.allow_unequal)
        make_folder(out)
        closing.enter_context(lock.holding(out))
        closing.enter_context(records.keeping(out, flatten(config), {"models": dict(wish.models)}))
        _make_images(config, pipeline, contestants, sheets)
        pool = closing.enter_context(Pool(rewards, most_failed=config.run.max_failed_rewards))
        return _make_scores(config, _all(sheets), kinds, pool)


def _all(sheets: Mapping[str, Sequence[Sheet]]) -> list[Sheet]:
    return [sheet for each in sheets.values() for sheet in each]


# ---- suites


def read_suites(config: StageConfig, pipeline: Pipeline, wish: Wish) -> Suites:
    """The suites that are asked for, by name.

    Raises:
      ValueError: as `read_suite` and `chosen`; or none is asked for, and the world has none of its own.
    """
    if wish.prompts is not None and wish.prompts < 1:
        raise ValueError(f"--prompts: found {wish.prompts}, expected at least 1")
    own = pipeline.world.tasks if pipeline.preset in EMBEDDED else {}
    names = list(dict.fromkeys(wish.suites or own))
    if not names:
        raise ValueError(f"--suites: missing, expected some of {', '.join(dict.fromkeys((*config.tasks, *SUITES)))}")
    if unused := sorted(set(wish.data) - {*names, *(SUITES[name].also for name in names if name in SUITES)}):
        raise ValueError(f"--suite-data: found {unused[0]!r}, expected some of the suites {', '.join(names)}")
    tasks = _tasks(config, own, names, wish.data)
    found = {name: chosen(read_suite(name, wish.data, tasks), wish.prompts, wish.samples) for name in names}
    for suite in found.values():
        check_names(suite)
        if told := difference(suite):
            warn(f"--suites {suite.name}: prompts × images are {told}")
    return found


def _tasks(
    config: StageConfig, own: Mapping[str, Task], names: Iterable[str], data: Mapping[str, str]
) -> dict[str, Task]:
    """Tasks with their held-out prompts and rewards: the world's own, and of the config's those that are needed."""
    needed = {*names, *(SUITES[name].also for name in names if name in SUITES)} - set(data)
    fields = {name: task.test for name, task in config.tasks.items() if name in needed - set(own) and task.test}
    read = read_sets({f"tasks.{name}.test": (source, "test") for name, source in fields.items()})
    weights = {name: dict(task.rewards) for name, task in config.tasks.items()}
    found = {name: dataclasses.replace(task, rewards=weights.get(name, {})) for name, task in own.items()}
    for name in fields:
        prompts = read[f"tasks.{name}.test"]
        found[name] = Task(name, (), prompts.texts, test_metadata=prompts.metadata, rewards=weights[name])
    return found


# ---- rewards


def _make_rewards(config: StageConfig, pipeline: Pipeline, suites: Suites) -> tuple[dict[str, str], dict[str, Reward]]:
    """Kinds of the rewards that score some prompt, by name, and the rewards, ready. Those that the config sets and that
    score none are told.

    Raises:
      ValueError: as `make_rewards`.
    """
    named = (*config.rewards, *config.run.servers, *(name for task in config.tasks.values() for name in task.rewards))
    prompts = [prompt for suite in suites.values() for prompt in suite.prompts]
    own = {name for prompt in prompts for name in prompt.kinds if name in pipeline.world.rewards}
    given = {name: config.rewards.get(name, RewardConfig()).kind or name for name in dict.fromkeys((*named, *own))}
    wanted = [name for name in given if any(name in scored_by(prompt, given) for prompt in prompts)]
    for name in config.rewards:
        if name not in wanted:
            warn(f"rewards.{name}: scores none of the suites {', '.join(suites)}")
    kinds = {name: given[name] for name in wanted}
    made = make_rewards(wanted, config.rewards, config.run.servers, pipeline.world.rewards)
    if not wanted:
        warn(f"no reward is given for {', '.join(suites)}: images are made, and nothing but diversity is measured")
    return kinds, made


def _check_prompts(suites: Suites, kinds: Mapping[str, str], rewards: Mapping[str, Reward]) -> None:
    for suite in suites.values():
        for name, reward in rewards.items():
            scored = [prompt for prompt in suite.prompts if name in scored_by(prompt, kinds)]
            with naming(f"--suites {suite.name}: rewards.{name}"):
                reward.check([prompt.text for prompt in scored], [prompt.metadata for prompt in scored])
        asked = [name for name, kind in kinds.items() if kind == "blip_vqa"]
        bare = any("blip_vqa" in each.kinds and "questions" not in each.metadata for each in suite.prompts)
        if asked and suite.layout == "compbench" and bare:
            warn(
                f"--suites {suite.name}: rewards.{asked[0]} asks about whole prompts, no `questions` stand beside them"
            )


def _identities(config: StageConfig, kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What scores depend on, servers apart."""
    found = {}
    for name, kind in kinds.items():
        settings = config.rewards.get(name, RewardConfig())
        found[name] = {
            "kind": kind, "weights": settings.weights, "divide_by": settings.divide_by,
            "options": dict(settings.options),
        }  # fmt: skip
    return found


# ---- cells


def _sheets(
    config: StageConfig, pipeline: Pipeline, model: Contestant, suites: Suites, also: Collection[str], out: Path
) -> list[Sheet]:
    """A model's cells, setting by setting; pictures made elsewhere stand at the main one."""
    made, about = cell_settings(config.eval, model.guidance, also), dict(model.about)
    if model.pictures is not None:
        made = dict(list(made.items())[:1])
    else:
        about |= {"base_sha256": base_hash(config.model), "dtype": config.model.dtype}
        about |= {} if pipeline.manifest is None else {"t5_length": config.model.t5_length}
    return [
        Sheet(
            out / model.name / suite.name / name.replace(", ", "_").replace(" ", "_"), model.name, suite, name,
            _settings(config, pipeline, model, each), about, _reader(config, pipeline, each),
        )
        for name, each in made.items()
        for suite in suites.values()
    ]  # fmt: skip


def _settings(config: StageConfig, pipeline: Pipeline, model: Contestant, made: Made) -> Settings:
    evaluation, resolution = config.eval, size_of(config, pipeline)[0]
    if model.pictures is not None:
        return Settings("given", 0, 0.0, 0.0, 0, 0.0, 0)
    noise = 0.0 if evaluation.transition in NOISELESS else evaluation.noise_level
    seed = evaluation.seed + 1  # as a report's: none that chose a checkpoint
    return Settings(
        evaluation.transition, made.steps, made.guidance, noise, resolution, config.model.shift, seed, made.rewritten
    )


def _reader(config: StageConfig, pipeline: Pipeline, made: Made) -> Callable[[str], str]:
    if not made.rewritten:
        return str
    return lambda prompt: pipeline.world.paraphrase(prompt, config.eval.seed)


def _check(pipeline: Pipeline, model: Contestant, sheets: Sequence[Sheet], suites: Suites) -> None:
    """Before anything is made: the folder is this evaluation's, the world knows all words, and pictures made elsewhere
    are all there.
    """
    for sheet in sheets:
        if is_main():
            check_plan(sheet)
        if pipeline.manifest is None and model.pictures is None:
            with naming(f"--suites {sheet.suite.name}"):
                pipeline.world.prepare([sheet.read(prompt.text) for prompt in sheet.suite.prompts])
    if model.pictures is not None:
        with naming(f"--models {model.name}"):
            for suite in suites.values():
                find_given(model.pictures, suite)
    elif model.guidance is None and any(", guidance own" in sheet.setting for sheet in sheets):
        usual = sheets[0].settings.guidance
        warn(f"--also own: {model.name} does not say its guidance; eval.guidance {usual:g} is taken")


# ---- images, then scores


def _make_images(
    config: StageConfig, pipeline: Pipeline, contestants: Sequence[Contestant], sheets: Mapping[str, Sequence[Sheet]]
) -> None:
    """A model at a time; nothing is loaded, and no prompt is encoded, where all images are there."""
    every = [sheet for each in sheets.values() for sheet in each]
    begin(every)
    lacking = {sheet.folder: missing(sheet) for sheet in every}
    if not any(lacking.values()):
        return
    drawn = [each for model in contestants if model.pictures is None for each in sheets[model.name]]
    prompts = [sheet.read(prompt.text) for sheet in drawn if lacking[sheet.folder] for prompt in sheet.suite.prompts]
    for line in pipeline.world.review(prompts) if is_main() else ():
        warn(f"prompts: {line}")
    if prompts:
        pipeline.world.prepare(["", *dict.fromkeys(prompts)])

    @functools.cache
    def base() -> Tree:
        return load_base(config.model, pipeline, config.seed)

    @functools.cache
    def sampler(steps: int, guidance: float) -> Sampler:
        settings = dataclasses.replace(config.eval, num_steps=steps, guidance=guidance)
        return eval_sampler(settings, config.model.shift, pipeline)

    with progress("images", sum(map(len, lacking.values())), "images") as count:
        for model in contestants:
            todo = [sheet for sheet in sheets[model.name] if lacking[sheet.folder]]
            policy = _loaded(model, base) if todo and model.load else ({}, {})
            for sheet in todo:
                if model.pictures is not None:
                    take_over(sheet, lacking[sheet.folder], model.pictures, count)
                else:
                    drawer = sampler(sheet.settings.steps, sheet.settings.guidance)
                    generate(
                        sheet, lacking[sheet.folder], drawer, pipeline.world, policy, config.eval.batch_size, count
                    )


def _loaded(model: Contestant, base: Base) -> tuple[Tree, Tree]:
    assert model.load is not None
    return model.load(base)


def _make_scores(config: StageConfig, sheets: Sequence[Sheet], kinds: Mapping[str, str], pool: Pool) -> list[Cell]:
    judges = Judges(pool, kinds, _identities(config, kinds))
    total = int(share("images to score", str(sum(lacking(sheet, judges) for sheet in sheets)))[0])
    with progress("scores", total, "images") as count:
        return [score(sheet, judges, config.eval.batch_size, count) for sheet in sheets]
