"""`python -m fopd_jax.tasks describe --config=FILE.py [--json=FILE]`, or `build --config=FILE.py [--data-dir=DIR]`.

`describe` prints what a run of the config trains and tests on: counts, tags, overlaps of any two sets, lengths in
CLIP's tokens (where `model.path` is a converted folder; else in words), quotes, examples, and how often each task's
prompts come. `build` writes every task's prompts, read or generated, as a tensorflow-datasets folder (extra
`prompt-sets`, without TensorFlow) and prints the flags that read them from there.

Any field of the config can be set. No device is used, and no weights are read.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from fopd_jax.config.flags import config_source, membership, parse_flags, read_config
from fopd_jax.config.schema import FlowMatching
from fopd_jax.config.stages import StageConfig
from fopd_jax.console import say, speaks
from fopd_jax.exits import explained, refuse
from fopd_jax.files import local_path, write_json
from fopd_jax.interop.files.converted import TOKENIZERS, is_converted, parse_manifest
from fopd_jax.interop.files.tokenizers import open_tokenizer
from fopd_jax.parallel.distributed import failing_together, initialize, is_main
from fopd_jax.tasks.builders import build
from fopd_jax.tasks.describe import WORDS, Measure, Turn, as_text, overlaps, profile, schedule
from fopd_jax.tasks.images import read_pairs
from fopd_jax.tasks.prompt_set import PromptSet
from fopd_jax.tasks.sampling import Curriculum, Shares
from fopd_jax.tasks.sources import read_sets
from fopd_jax.worlds.embedded import EMBEDDED

_JSON = flags.DEFINE_string("json", None, "Of describe: a file for the figures.")
_DATA_DIR = flags.DEFINE_string("data-dir", "data", "Of build: the folder for the sets' folders.")

TOWER = "text_encoder"
"""The encoder whose tokens are counted; SD3's two CLIP towers have one vocabulary."""


def main(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # tensorflow-datasets warns of every config that is not its own
    jax.config.update("jax_platforms", "cpu")  # a run may hold the accelerator
    with explained(speaks=speaks):
        config = read_config()
        initialize(*membership())
        with failing_together():
            _COMMANDS[argv[1]](config)


def describe(config: StageConfig) -> None:
    """Print the figures, and write them where asked.

    Raises:
      ValueError: a source is wrong, or `--json`; names field and file.
      OSError: the file cannot be written.
    """
    out = None if _JSON.value is None else local_path("--json", _JSON.value)
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"--json: {out.parent} is no folder")
    sets, measure = read(config), measure_of(config.model.path)
    profiles = {name: profile(prompts, measure) for name, prompts in sets.items()}
    shared, turns = overlaps(sets), turns_of(config, sets)
    say(as_text(profiles, shared, turns, measure, config.run.steps))
    if measure is WORDS:
        say("\nno tokenizer, since model.path is no converted folder: lengths are words, and what CLIP cuts is unknown")
    if out is not None and is_main():
        figures = {"unit": measure.unit, "steps": config.run.steps}
        figures |= {"sets": {name: dataclasses.asdict(each) for name, each in profiles.items()}}
        figures |= {"overlaps": [dataclasses.asdict(each) for each in shared]}
        write_json(out, figures | {"schedule": [dataclasses.asdict(each) for each in turns]})


def materialise(config: StageConfig) -> None:
    """Write every task's set, and print the flags that read it.

    Raises:
      ValueError: a source is wrong, or the config's training prompts are captions of images; names field and file.
      OSError: the folder cannot be written.
    """
    if isinstance(config, FlowMatching):
        raise ValueError(f"stage: found {config.stage!r}, expected another: captions stay beside their images")
    folder, sets, options = local_path("--data-dir", _DATA_DIR.value), read(config), []
    for name in config.tasks:
        splits = {"train": sets[f"{name}.prompts"], "test": sets[f"{name}.test"]}
        made = build(name, splits, folder, "; ".join(prompts.form for prompts in splits.values()))
        say(f"{name}: {len(splits['train'])} and {len(splits['test'])} prompts in {made}")
        options += [f"--config.tasks.{name}.{field}={shlex.quote(str(made))}" for field in ("prompts", "test")]
    if config.model.preset not in EMBEDDED:
        say(f"read them by --config={config_source()} {' '.join(options)}")


_COMMANDS = {"describe": describe, "build": materialise}


def read(config: StageConfig) -> dict[str, PromptSet]:
    """Every set of a config, `TASK.prompts` (of images their captions) and `TASK.test`.

    Raises:
      ValueError: as `read_sets` and `read_pairs`; the world lacks a task; names the field.
    """
    if config.model.preset in EMBEDDED:
        return _own(config)
    if not isinstance(config, FlowMatching):
        sources = {f"tasks.{name}.prompts": (task.prompts, "train") for name, task in config.tasks.items()}
    else:
        sources = {}
    sources |= {f"tasks.{name}.test": (task.test, "test") for name, task in config.tasks.items()}
    found = {field.removeprefix("tasks."): prompts for field, prompts in read_sets(sources).items()}
    if isinstance(config, FlowMatching):
        for name, pairs in config.tasks.items():
            captions, images = read_pairs(name, pairs)
            form = "captions of images" if images else "prompts of demonstrations"
            found[f"{name}.prompts"] = PromptSet(captions, (), form)
    return {f"{name}.{field}": found[f"{name}.{field}"] for name in config.tasks for field in ("prompts", "test")}


def _own(config: StageConfig) -> dict[str, PromptSet]:
    world, found = EMBEDDED[config.model.preset](), {}
    for name in config.tasks:
        if name not in world.tasks:
            raise ValueError(f"tasks: found {name!r}, expected some of {tuple(world.tasks)}")
        task, form = world.tasks[name], f"{config.model.preset}'s own"
        found[f"{name}.prompts"] = PromptSet(task.train, task.train_metadata, form)
        found[f"{name}.test"] = PromptSet(task.test, task.test_metadata, form)
    return found


def turns_of(config: StageConfig, sets: dict[str, PromptSet]) -> list[Turn]:
    """The schedule of a config's tasks.

    Raises:
      ValueError: as `Shares`.
    """
    sizes = {name: len(sets[f"{name}.prompts"]) for name in config.tasks}
    if not isinstance(config, FlowMatching):
        draws = config.batch_size // config.images_per_prompt
        curriculum = Curriculum.of(list(config.tasks.values()), config.alternate)
        return schedule(sizes, curriculum, draws, config.run.steps)
    shares = Shares(tuple(float(pairs.share) for pairs in config.tasks.values()))
    return schedule(sizes, Curriculum(((0, shares),)), config.batch_size, config.run.steps)


def measure_of(path: str) -> Measure:
    """CLIP's tokens, by the tokenizer of a converted folder; words, where `model.path` is none.

    Raises:
      ValueError: the folder's tokenizer is damaged; names it.
    """
    folder = Path(path)
    if not path or not is_converted(folder) or TOWER not in (manifest := parse_manifest(folder)).components:
        return WORDS
    tokenizer = open_tokenizer(folder / TOKENIZERS[TOWER], manifest.components[TOWER].config)

    def lengths(prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]

    return Measure("CLIP tokens", lengths, manifest.component(TOWER).config.max_length)


def _parse(argv: list[str]) -> list[str]:
    """The command, then flags as in every program."""
    command = argv[1] if len(argv) > 1 else ""
    if command not in _COMMANDS:
        refuse(f"found {command!r}, expected one of {', '.join(_COMMANDS)}, then flags; --help says more")
    return [*parse_flags([argv[0], *argv[2:]]), command]


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    app.run(main, flags_parser=_parse)
