"""The model card of a run: gathered from what it has left, and written beside its weights."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.config.identity import config_hash, identity, left_out
from fopd_jax.config.recorded import RECORD_FILE, read_starts
from fopd_jax.config.schema import OPD, Config
from fopd_jax.evaluation.model_card import CARD_FILE, PUBLISHED, Facts, Inputs, render, shortened
from fopd_jax.evaluation.report import RESULTS_FILE, SAMPLES_FILE, TABLE_FILE
from fopd_jax.files import write_text
from fopd_jax.interop.files.tensor_files import read_json
from fopd_jax.interop.sd3.diffusers import CLASS_NAME
from fopd_jax.parallel.distributed import is_main
from fopd_jax.running import inputs
from fopd_jax.stages.cards import content_hash, run_config
from fopd_jax.stages.export import export_name
from fopd_jax.stages.pipeline import Pipeline
from fopd_jax.worlds.embedded import EMBEDDED

_FLAG = re.compile(r"--?(config[^=\s]*)(?:=(.*))?", re.DOTALL)
Start = Mapping[str, Any]


def write_model_card(folder: Path, run: Path, config: Config, pipeline: Pipeline, card: AdapterCard) -> None:
    """Write `README.md` beside what was exported into a folder, and into its PEFT folder; process 0 does.

    `run`: the folder of the run, whose record and config it tells; `config`: that of what stands in `folder`, which an
    evaluation may have changed. `card`: what was exported says of itself.
    """
    if not is_main():
        return
    facts = gather(folder, run, config, pipeline, card)
    write_text(folder / CARD_FILE, render(facts))
    if facts.peft:
        write_text(folder / facts.peft / CARD_FILE, render(facts, up="../"))


def gather(folder: Path, run: Path, config: Config, pipeline: Pipeline, card: AdapterCard) -> Facts:
    """What the files of `write_model_card` tell."""
    own, name, whole = run_config(config, run), export_name(config), config.trained == "params"
    published = pipeline.manifest is not None
    files = pipeline.family.files if published else None
    weights = f"{name}_diffusers" if whole and published else f"{name}.safetensors"
    peft = f"{name}_peft" if published and not whole and (folder / f"{name}_peft").is_dir() else ""
    starts, (scores, table) = _starts(run, own), _report(folder, config, card)
    text_length = config.model.t5_length if published else None
    newest = starts[-1] if starts else {}
    return Facts(
        name=own.name, stage=own.stage, card=card, weights=weights, whole=whole,
        base=PUBLISHED.get(pipeline.preset) if published else None,
        own=not published and pipeline.preset in EMBEDDED,
        source=shortened(own.model.path), diffusers=files is not None and files.class_name == CLASS_NAME, peft=peft,
        sampler={"sampler": own.eval.transition, "timestep shift": float(own.model.shift)},
        text_length=text_length, fields=_fields(own), scores=scores, table=table, measured=_measured(config),
        pictures=[SAMPLES_FILE] if (folder / SAMPLES_FILE).is_file() else [],
        inputs=_inputs(run, own), sha256="" if whole else content_hash(folder / weights),
        commit=str(newest.get("commit") or ""), versions=dict(newest.get("versions") or {}),
        command=_command(starts, card.updates or 0),
    )  # fmt: skip


def _report(folder: Path, config: Config, card: AdapterCard) -> tuple[dict[str, float], str]:
    """The scores of what was trained, and the report's table; nothing where no report of these weights is there."""
    path = folder / RESULTS_FILE
    if not path.is_file() or not (folder / TABLE_FILE).is_file():
        return {}, ""
    results = read_json(path)
    if (results.get("steps"), results.get("config_hash")) != (card.updates, config_hash(config)):
        return {}, ""
    scores = results["models"]["student" if isinstance(config, OPD) else "policy"]
    return dict(scores), (folder / TABLE_FILE).read_text(encoding="utf-8")


def _measured(config: Config) -> str:
    """How a report's images are drawn; teachers may have guidance scales of their own."""
    return f"{config.eval.num_steps} steps, guidance {config.eval.guidance:g}, sampler {config.eval.transition}"


def _fields(config: Config) -> list[tuple[str, str, str]]:
    """Of the config's identity, which has neither defaults nor what changes no number."""
    found = identity(config)
    return [
        (name, _plain(value), _plain(left_out(config.stage, name)))
        for name, value in found.items()
        if name not in ("stage", "name")
    ]


def _plain(value: Any) -> str:
    """As JSON; of what has no default, a dash."""
    try:
        return shortened(json.dumps(value, ensure_ascii=False))
    except TypeError:
        return "–"


def _inputs(run: Path, config: Config) -> Inputs:
    """Other weights and files that the run read, by field; the base has a hash of its own."""
    path = run / inputs.INPUTS_FILE
    noted = read_json(path) if path.is_file() else {}
    return {
        field: (shortened(each["path"]), each["sha256"])
        for field, each in sorted(noted.items())
        if field != "model.path"
    }


def _starts(run: Path, config: Config) -> list[Start]:
    """Those of the run's record that began with this config; none where there is no record."""
    try:
        starts = read_starts(run / RECORD_FILE)
    except (OSError, ValueError):
        return []
    return [each for each in starts if each.get("config_hash") == config_hash(config)]


def _command(starts: Sequence[Start], updates: int) -> list[str]:
    """What does the same anew: the first start's that names a config, without what is the machine's. Later ones may
    say the same in other words.

    Fields of section `run` change no number but that of the updates.
    """
    for start in starts:
        flags = _config_flags([str(each) for each in start.get("command") or ()])
        if any(name == "config" for name, _ in flags):
            kept = [f"--{name}={shortened(value)}" for name, value in flags]
            return ["python", "-m", "fopd_jax.main", *kept, f"--config.run.steps={updates}"]
    return []


def _config_flags(command: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values of the flags that choose a config, those of section `run` left out."""
    found = []
    for place, argument in enumerate(command):
        if (match := _FLAG.fullmatch(argument)) is None:
            continue
        name, value = match.groups()
        after = command[place + 1] if place + 1 < len(command) else ""
        if not name.startswith("config.run.") and name != "config.run":
            found.append((name, after if value is None else value))
    return found
