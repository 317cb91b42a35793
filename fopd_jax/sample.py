"""`python -m fopd_jax.sample --config=configs/miniature.py [--prompt=… --prompts-file=… --adapter=… --out=…]`.

Writes one PNG per image, with all that made it in its metadata, and `grid.png`, a labelled overview. The config names
network and sampler; its `eval` fields are the sampler's settings (`--config.eval.num_steps=40
--config.eval.guidance=4.5 --config.eval.transition=sde …`) and `eval.batch_size` is how many images are made at once.
`--config.model.resolution=768,512` makes images of height 768 and width 512.

Every image has a seed of its own: those of all prompts in turn have `--seed`, `--seed + 1`, …; with `--shared-seed`
those of each prompt do. An image is a function of prompt, seed and settings alone, whatever else is sampled beside it.
Several `--adapter`s draw the same, and so does the base: rows of the grid. Without prompts the first held-out ones of
the config's tasks are drawn. An adapter's file may say which guidance it is for, and of which base it is: that guidance
is taken unless `eval.guidance` is set, on the command line or in the config's file; what differs is told.

An adapter with capability coordinates has a dial for each of its skills: `--dial=text=1.5,composition=0.5` turns them,
1 being where nobody does. The base and adapters without any draw beside it as they do.

`--workdir=DIR` draws what a run trained, at its newest checkpoint or at `--step=N`; the config is the run's own, if
there is no `--config`.

Images of tasks with rewards (`--config.tasks.NAME.rewards.REWARD=1`), and all images with `--rewards=NAME,NAME`, are
scored: a table is printed, and scores, what they rest on and failures stand in the images' metadata and in
`scores.jsonl`.

`--provenance` adds metadata in terms that other tools know: PNG's `Software`, IPTC's digital source type
(`trainedAlgorithmicMedia`) in XMP, and under `provenance` what C2PA's assertion of an action holds, with the hashes of
base and adapter. It is metadata like C2PA's, no signed manifest: it proves nothing, and can be removed.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from fopd_jax import __version__
from fopd_jax.adapters.coordinates import coordinates_of, placed_at
from fopd_jax.adapters.lora import Adapter, effective
from fopd_jax.config.flags import config_source, is_chosen, membership, parse_flags, read_config, read_workdir
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import NOISELESS, OPD, FlowMatching
from fopd_jax.config.sizes import describe_size
from fopd_jax.config.stages import StageConfig
from fopd_jax.console import progress, say, speaks
from fopd_jax.evaluation.sample_scores import Row, Scored, Scoring, format_scores, to_lines
from fopd_jax.evaluation.sampler import Request, Sampler, generate
from fopd_jax.evaluation.samples import (
    GRID_FILE,
    SCORES_FILE,
    Asked,
    check_folder,
    file_name,
    name_policies,
    shown,
    write_grid,
    write_image,
)
from fopd_jax.exits import explained, naming
from fopd_jax.files import check_writable, local_path, write_text
from fopd_jax.models.coordinates import LAYER
from fopd_jax.parallel.distributed import initialize, is_main, warn
from fopd_jax.performance.kept_programs import keeping
from fopd_jax.policy.velocity import Tree
from fopd_jax.stages.cards import base_hash, content_hash, other_base, read_source
from fopd_jax.stages.coordinates import skills
from fopd_jax.stages.export import export_name
from fopd_jax.stages.pipeline import Pipeline, check_base, load_base, load_policy, make_pipeline, weight_path
from fopd_jax.stages.rewards import furnish
from fopd_jax.stages.setup import eval_sampler
from fopd_jax.stages.stored import find_step, load_stored
from fopd_jax.tasks.prompts import read_prompts, read_tasks
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World

_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
_PROMPTS_FILE = flags.DEFINE_string("prompts-file", None, "A file with one prompt a line.")
_NEGATIVE = flags.DEFINE_string("negative-prompt", "", "What guidance leads away from; by default the empty prompt.")
_ADAPTER = flags.DEFINE_multi_string(
    "adapter",
    [],
    "Adapter on the base: this project's file, a PEFT folder, a diffusers or ComfyUI file, packaged:NAME; empty: the "
    "base. May be given several times; then the base is drawn, too.",
)
_STEP = flags.DEFINE_integer("step", None, "Which of the workdir's checkpoints; default the newest.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "Folder for the images; default samples/<config.name>.")
_FORCE = flags.DEFINE_bool("force", False, "Write into a folder that holds other things than samples.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the first image.", lower_bound=0, upper_bound=2**31)
_SHARED = flags.DEFINE_bool("shared-seed", False, "The same seeds for every prompt, the first one's.")
_IMAGES = flags.DEFINE_integer("images-per-prompt", 1, "Images of each prompt.", lower_bound=1, upper_bound=2**20)
_DIAL = flags.DEFINE_list(
    "dial",
    [],
    "Coordinates of an adapter that has some, as SKILL=NUMBER,…, over those of --config.eval.coordinates.",
)
_PROVENANCE = flags.DEFINE_bool(
    "provenance", False, "Metadata like C2PA's assertions in every PNG: made by a model, which, by what; not signed."
)
_REWARDS = flags.DEFINE_list("rewards", [], "Names of rewards that score every image; by default those of its task.")

DEFAULT_PROMPTS, LARGEST_SEED = 8, 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Policy:
    """Who draws; `read(base)`: variables and effective adapter; `about`: source and hash of what is not the base."""

    name: str
    read: Callable[[Tree], tuple[Tree, Tree]]
    about: dict[str, Any]


def main(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    with explained(speaks=speaks):
        config = read_config()
        initialize(*membership())
        with keeping(config.run.compiled):
            run(config, local_path("out", f"samples/{config.name}" if _OUT.value is None else _OUT.value))


def run(config: StageConfig, out: Path) -> None:
    """Check everything, then sample and write.

    Raises:
      ValueError: names the flag, field, file or key that is wrong, before anything is compiled or written; or an image
        that is not finite, before it is written.
      OSError: `out` cannot be written.
    """
    config = _dialled(_guided(config))
    check_folder(out, _FORCE.value)
    if _STEP.value is not None and read_workdir() is None:
        raise ValueError(f"step: found {_STEP.value}, but no --workdir whose checkpoint it is")
    check_writable(out, "out")
    if _NEGATIVE.value and config.eval.guidance == 1:
        raise ValueError("negative-prompt: eval.guidance is 1, which leads away from nothing; expected another scale")
    given = _given_prompts()
    in_memory = override(config, {"run.encoding.cache": ""}).run  # what is drawn once needs no cache
    # With prompts given, the config's own prompt files need not be there.
    pipeline = make_pipeline(
        config.model, in_memory, partial(read_tasks, {} if given or isinstance(config, FlowMatching) else config.tasks)
    )
    sampler = dataclasses.replace(eval_sampler(config.eval, config.model.shift, pipeline), negative=_NEGATIVE.value)
    held_out = [] if given else _held_out(pipeline.world)
    prompts = given or [task.test[place] for task, place in held_out]
    asked = Asked(prompts, _IMAGES.value, _SEED.value, _SHARED.value, _NEGATIVE.value, _PROVENANCE.value)
    if (last := asked.seeds(len(asked.prompts) - 1)[-1]) > LARGEST_SEED:
        raise ValueError(f"seed: the last image would have {last}, expected at most {LARGEST_SEED}")
    policies = _load_policies(config, pipeline)
    check_base(config.model, pipeline)
    with contextlib.closing(_make_scoring(config, pipeline.world, asked, held_out)) as scoring:
        if is_main():
            out.mkdir(parents=True, exist_ok=True)
            (out / SCORES_FILE).unlink(missing_ok=True)  # of images that are about to be others
        # Before the base: text encoders need not be in memory with it.
        pipeline.world.prepare([*asked.prompts, asked.negative])
        variables = load_base(config.model, pipeline, config.seed)
        began = time.monotonic()
        settings, scores = _draw(config, out, pipeline, sampler, variables, policies, asked, scoring)
    if is_main():
        _tell(config, out, asked, policies, settings, time.monotonic() - began)
        if scores:
            write_text(out / SCORES_FILE, to_lines(scores))
            say(format_scores(scores))


def _draw(
    config: StageConfig,
    out: Path,
    pipeline: Pipeline,
    sampler: Sampler,
    variables: Tree,
    policies: list[Policy],
    asked: Asked,
    scoring: Scoring,
) -> tuple[dict[str, Any], list[Row]]:
    """Write every image and the grid; returns the settings that they were made with, and what rewards say of them."""
    requests, (columns, rows) = asked.requests(), shown(asked, len(policies))
    cells: list[list[np.ndarray]] = []
    settings: dict[str, Any] = {}
    scores: list[Row] = []
    with progress("images", len(policies) * len(requests), "images") as count:
        for policy in policies:
            kept: list[np.ndarray] = []
            made = generate(sampler, pipeline.world, *policy.read(variables), requests, config.eval.batch_size)
            for index, (request, image), found in _with_scores(made, asked, scoring, config.eval.batch_size):
                settings = settings or _settings(config, pipeline, image.shape)
                if is_main():
                    path = out / file_name(index, policy.name, len(policies) == 1)
                    write_image(path, image, request, asked, settings, policy.about, found)
                if found:
                    about = {"file": file_name(index, policy.name, len(policies) == 1), "policy": policy.name}
                    scores.append({**about, "prompt": request[0], "seed": request[1], "scores": found})
                if index < columns * asked.per_prompt and index % asked.per_prompt < rows:
                    kept.append(image)
                count(1)
            cells += [kept[r::rows] for r in range(rows)]
    if is_main():
        names, adapters = [policy.name for policy in policies], [policy.about for policy in policies]
        write_grid(out / GRID_FILE, np.stack([np.stack(row) for row in cells]), asked, names, settings, adapters)
    return settings, scores


def _with_scores(
    made: Iterator[tuple[Request, np.ndarray]], asked: Asked, scoring: Scoring, batch_size: int
) -> Iterator[tuple[int, tuple[Request, np.ndarray], Scored]]:
    """Images with their numbers and with what rewards say of them, which are asked about some at once, by process 0."""
    numbers = itertools.count()
    while batch := list(itertools.islice(made, batch_size)):
        index = list(itertools.islice(numbers, len(batch)))
        places = [each // asked.per_prompt for each in index]
        images, prompts = [image for _, image in batch], [prompt for (prompt, _), _ in batch]
        scored = scoring(images, prompts, places) if is_main() else [{}] * len(batch)
        yield from zip(index, batch, scored, strict=True)


def _make_scoring(config: StageConfig, world: World, asked: Asked, held_out: Sequence[tuple[Task, int]]) -> Scoring:
    """The rewards of --rewards for every prompt, else those that the config names for the task of each.

    Raises:
      ValueError: there is no such reward, its settings are wrong, or it can never score a prompt; names which.
    """
    chosen = tuple(dict.fromkeys(_REWARDS.value))
    of_tasks = {name: tuple(task.rewards) for name, task in config.tasks.items()}
    own = [of_tasks.get(task.name, ()) for task, _ in held_out]
    names = [chosen] * len(asked.prompts) if chosen or not held_out else own
    metadata = [task.beside("test")[place] for task, place in held_out] or [{}] * len(asked.prompts)
    wanted = list(dict.fromkeys(itertools.chain.from_iterable(names)))
    rewards = furnish(config, world, (), wanted).rewards
    scoring = Scoring({name: rewards[name] for name in wanted}, names, metadata)
    scoring.check(asked.prompts)
    return scoring


def _given_prompts() -> list[str]:
    given = list(_PROMPT.value)
    if _PROMPTS_FILE.value is not None:
        given += read_prompts(local_path("prompts-file", _PROMPTS_FILE.value), "prompts-file")
    return given


def _held_out(world: World) -> list[tuple[Task, int]]:
    """Tasks and places of the prompts that are drawn where none are given."""
    if not world.tasks:
        raise ValueError("--prompt: missing, expected one at least: this config's world has no prompts of its own")
    share = -(-DEFAULT_PROMPTS // len(world.tasks))
    return [(task, place) for task in world.tasks.values() for place in range(min(share, len(task.test)))]


def _guided(config: StageConfig) -> StageConfig:
    """The config with the guidance that the adapters are for, where nobody has chosen one and all are for the same."""
    cards = {source: read_source("adapter", source) for source in _ADAPTER.value}
    meant = {source: card.guidance for source, card in cards.items() if card is not None and card.guidance is not None}
    scale, own = config.eval.guidance, set(meant.values())
    if len(own) == 1 and own != {scale} and not is_chosen(config, "eval.guidance"):
        (scale,) = own
        say(f"guidance {scale:g}, which {', '.join(meant)} says to be for; --config.eval.guidance=… sets another")
    for source, guidance in meant.items():
        if guidance != scale:
            warn(f"adapter: {source} is for guidance {guidance:g}, but eval.guidance is {scale:g}")
    return resolve(override(config, {"eval.guidance": scale}))


def _dialled(config: StageConfig) -> StageConfig:
    """The config with the coordinates of --dial among those of its evaluation."""
    given = dict(config.eval.coordinates)
    for each in _DIAL.value:
        skill, _, number = each.partition("=")
        try:
            given[skill.strip()] = float(number)
        except ValueError as error:
            raise ValueError(f"dial: found {each!r}, expected SKILL=NUMBER, such as text=1.5") from error
    return resolve(override(config, {"eval.coordinates": given}))


def _turned(config: StageConfig, source: str, names: Sequence[str], policy: Tree) -> tuple[Tree, dict[str, Any]]:
    """An effective adapter at the coordinates that were chosen, and what is to be told of them; `names`: its skills.

    Raises:
      ValueError: some were chosen, and it has none, or none of that name, or does not say their names.
    """
    chosen = config.eval.coordinates
    if LAYER not in policy:
        if chosen:
            raise ValueError(f"dial: found {', '.join(chosen)}, but {source} has no coordinates")
        return policy, {}
    if len(names) != (skills := len(policy[LAYER]["a"])):
        raise ValueError(f"adapter: {source}: has {skills} coordinates, but its card names {len(names)}")
    at = coordinates_of(names, chosen, "dial")
    told = {name: float(number) for name, number in zip(names, at, strict=True)}
    say(
        f"coordinates of {source}: {', '.join(f'{name} {number:g}' for name, number in told.items())}"
        + ("" if chosen else ", where nobody turns them; --dial does")
    )
    return placed_at(policy, at), {"coordinates": told}


def _load_policies(config: StageConfig, pipeline: Pipeline) -> list[Policy]:
    """The base alone, what alone is given beside it, or several, the base among them; another base is told."""
    base = base_hash(config.model)
    trained = _stored_source(config)
    given = list(dict.fromkeys([*trained, *_ADAPTER.value]))
    sources = given if len(given) == 1 else list(dict.fromkeys(["", *given]))
    if config.eval.coordinates and not given:
        raise ValueError(f"dial: found {', '.join(config.eval.coordinates)}, but no --adapter that has coordinates")

    def load(name: str, source: str) -> Policy:
        if not source:
            return Policy(name, lambda base: (base, {}), {})
        if source in trained:
            stored = load_stored(config, pipeline, *trained[source])
            adapter = effective(stored.weights) if isinstance(stored.weights, Adapter) else {}
            adapter, told = _turned(config, source, skills(config), adapter)
            return Policy(
                name, lambda base: (stored.student.policy(base, stored.weights)[0], adapter), stored.about | told
            )
        local_path("adapter", source)
        card = read_source("adapter", source)
        if card is not None and (problem := other_base(card, base)):
            warn(f"adapter: {source}: {problem}")
        with naming("adapter"):
            adapter = effective(load_policy(source, pipeline))
        adapter, told = _turned(config, source, card.coordinates if card else (), adapter)
        about = {"source": source, "sha256": content_hash(weight_path(source)), **told}
        return Policy(name, lambda base: (base, adapter), about)

    return [load(name, source) for name, source in zip(name_policies(sources), sources, strict=True)]


def _stored_source(config: StageConfig) -> dict[str, tuple[Path, int]]:
    """The workdir and step that are to be drawn, if they are, by a path that names them."""
    if (given := read_workdir()) is None:
        return {}
    folder = local_path("--workdir", given)
    step = find_step(folder, _STEP.value)
    return {f"{folder}/{export_name(config)}_step_{step}": (folder, step)}


def _settings(config: StageConfig, pipeline: Pipeline, shape: tuple[int, ...]) -> dict[str, Any]:
    evaluation = config.eval
    return {
        "model": config.model.path or f"random {pipeline.preset}",
        "model_sha256": base_hash(config.model) or None,
        "steps": evaluation.num_steps,
        "guidance": evaluation.guidance,
        "transition": evaluation.transition,
        **({} if evaluation.transition in NOISELESS else {"noise_level": evaluation.noise_level}),
        "shift": config.model.shift,
        "dtype": config.model.dtype,
        "height": shape[0],
        "width": shape[1],
        "version": __version__,
    }


def _tell(
    config: StageConfig,
    out: Path,
    asked: Asked,
    policies: list[Policy],
    settings: dict[str, Any],
    seconds: float,
) -> None:
    columns, rows = shown(asked, len(policies))
    total, size = len(policies) * len(asked.requests()), describe_size((settings["height"], settings["width"]))
    say(
        f"{total} images of {size} pixels in {out} ({seconds:.1f} s); "
        f"{GRID_FILE} shows {columns} of {len(asked.prompts)} prompts, {rows} of {asked.per_prompt} seeds"
    )
    if not any(policy.about for policy in policies):
        say(_hint(config))


def _hint(config: StageConfig) -> str:
    """Where what draws better than the base is, or how it is made."""
    if not config.model.path:
        return "note: config.model.path is empty, so that random weights were drawn"
    if config.trained != "adapter":
        return "note: this is the network before training; config.model.path names another"
    student = Path(f"runs/{config.name}") / ("student" if isinstance(config, OPD) else "adapter")
    file = student.with_suffix(".safetensors")
    if file.exists():
        return f"note: this is the base alone; what was trained is drawn with --adapter={file}"
    return (
        f"note: this is the base alone; `python -m fopd_jax.main --config={config_source()}` trains {file}, "
        "which --adapter draws"
    )


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    app.run(main, flags_parser=parse_flags)
