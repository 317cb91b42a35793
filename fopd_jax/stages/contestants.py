"""Models to evaluate side by side, each from wherever it is: `--models NAME=SOURCE`.

base                      the config's own network
WORKDIR                   what a run trained, at its newest checkpoint, or what it exported where it keeps none
FILE or FOLDER            an adapter in any format that is read; a whole network, as a file of this project's own or a
                          converted folder
FOLDER of pictures        images made elsewhere, in the layouts of the suites (`evaluation.layouts`)
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter, effective
from fopd_jax.config.parse import resolve
from fopd_jax.config.recorded import RECORD_FILE, recorded_config
from fopd_jax.config.stages import StageConfig
from fopd_jax.evaluation.layouts import FORMATS
from fopd_jax.evaluation.samples import BASE
from fopd_jax.exits import naming
from fopd_jax.files import local_path
from fopd_jax.interop.files.converted import is_converted
from fopd_jax.interop.files.safetensors import is_own_file, read_header
from fopd_jax.interop.lora.files import DIFFUSERS_TENSORS, PEFT_TENSORS
from fopd_jax.models.coordinates import LAYER
from fopd_jax.policy.velocity import Tree
from fopd_jax.running.checkpoints import kept_steps
from fopd_jax.stages.cards import base_hash, check_card, content_hash, read_source
from fopd_jax.stages.coordinates import skills, turned
from fopd_jax.stages.export import export_name
from fopd_jax.stages.pipeline import (
    PACKAGED,
    Pipeline,
    check_base,
    check_network,
    load_network,
    load_policy,
    weight_path,
)
from fopd_jax.stages.registry import find_stage
from fopd_jax.stages.stored import load_stored

FIELD = "--models"
Base = Callable[[], Tree]
"""Gives the base's variables, which are loaded when they are first asked for."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One model: `load(base)` gives variables and effective adapter; or `pictures` are its images, made elsewhere.

    `about`: its source and hash. `guidance`: the scale that it is for, None where nobody says.
    """

    name: str
    about: Mapping[str, Any]
    load: Callable[[Base], tuple[Tree, Tree]] | None = None
    pictures: Path | None = None
    guidance: float | None = None


def named_sources(given: Sequence[str], field: str) -> dict[str, str]:
    """`NAME=SOURCE` each; `base` alone is the base under that name. Names become folders.

    Raises:
      ValueError: one is no such pair, or a name is no folder's, or there twice; names the field.
    """
    found: dict[str, str] = {}
    for each in given:
        name, equals, source = (BASE, "=", BASE) if each == BASE else each.partition("=")
        if not equals or not source or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"{field}: found {each!r}, expected NAME=SOURCE, the name of letters, digits and _ . + -")
        if name in found:
            raise ValueError(f"{field}: found the name {name!r} twice, expected different ones")
        found[name] = source
    return found


def find_contestants(config: StageConfig, pipeline: Pipeline, sources: Mapping[str, str]) -> list[Contestant]:
    """The models that sources name, checked; adapters are read, networks are not.

    Raises:
      ValueError: a source is none of what a model can be, is damaged, or is of another network; names it.
    """
    base = base_hash(config.model)
    return [_find(config, pipeline, base, name, source) for name, source in sources.items()]


def _find(config: StageConfig, pipeline: Pipeline, base: str, name: str, source: str) -> Contestant:
    field = f"{FIELD} {name}"
    if source == BASE:
        source_of = config.model.path or f"random {pipeline.preset}, seed {config.seed}"
        return Contestant(name, {"source": source_of, "sha256": base}, lambda given: (given(), {}))
    path = weight_path(source) if source.startswith(PACKAGED) else local_path(field, source)
    if not path.exists():
        raise ValueError(f"{field}: {path}: no such file or folder")
    if path.is_dir() and (path / RECORD_FILE).is_file():
        return _of_run(config, pipeline, base, name, path)
    if is_converted(path) or (is_own_file(path) and "scale" not in read_header(path)):
        return _network(config, pipeline, name, source)
    if path.is_file() or any((path / each).is_file() for each in (PEFT_TENSORS, DIFFUSERS_TENSORS)):
        return _adapter(config, pipeline, base, name, source)
    if any(each.suffix.lower() in FORMATS for each in path.rglob("*")):
        return Contestant(name, {"source": str(path), "pictures": True}, pictures=path)
    raise ValueError(f"{field}: {path}: found no run, adapter, converted network or pictures in it")


def _adapter(config: StageConfig, pipeline: Pipeline, base: str, name: str, source: str) -> Contestant:
    field = f"{FIELD} {name}"
    card = read_source(field, source)
    check_card(field, source, card, pipeline, base)
    with naming(field):
        found = effective(load_policy(source, pipeline))
    names = card.coordinates if card else ()
    if LAYER in found and len(names) != (count := len(found[LAYER]["a"])):
        raise ValueError(f"{field}: {source}: has {count} coordinates, but its card names {len(names)}")
    adapter = turned(names, config.eval, found)
    about = {"source": source, "sha256": content_hash(weight_path(source)), **_dials(config, found)}
    return Contestant(name, about, lambda given: (given(), adapter), guidance=card.guidance if card else None)


def _network(config: StageConfig, pipeline: Pipeline, name: str, source: str) -> Contestant:
    field, own = f"{FIELD} {name}", dataclasses.replace(config.model, path=source)
    check_network(field, source, pipeline)
    check_base(own, pipeline, field)
    about = {"source": source, "sha256": base_hash(own)}
    return Contestant(name, about, lambda _: (load_network(source, pipeline, config.model.dtype), {}))


def _of_run(config: StageConfig, pipeline: Pipeline, base: str, name: str, folder: Path) -> Contestant:
    field = f"{FIELD} {name}"
    with naming(field):
        run = resolve(recorded_config(folder / RECORD_FILE))
        kept = kept_steps(folder)
    card = AdapterCard(preset=run.model.preset, base=base_hash(run.model) if run.trained == "adapter" else "")
    check_card(field, str(folder), card, pipeline, base)
    guidance = find_stage(run).origin(run).guidance
    if not kept:
        file = folder / f"{export_name(run)}.safetensors"
        if not file.is_file():
            raise ValueError(f"{field}: {folder}: holds neither a checkpoint nor {file.name}: nothing is saved yet")
        whole, source = run.trained == "params", str(file)
        found = _network(config, pipeline, name, source) if whole else _adapter(config, pipeline, base, name, source)
        return dataclasses.replace(found, guidance=guidance if found.guidance is None else found.guidance)
    with naming(field):
        stored = load_stored(run, pipeline, folder, kept[-1])
    adapter: Tree = {}
    if isinstance(stored.weights, Adapter):
        adapter = turned(skills(run), config.eval, effective(stored.weights))

    def load(given: Base) -> tuple[Tree, Tree]:
        return stored.student.policy(given(), stored.weights)[0], adapter

    about = {**stored.about, **_dials(config, adapter)}
    return Contestant(name, about, load, guidance=guidance)


def _dials(config: StageConfig, adapter: Tree) -> dict[str, Any]:
    chosen = dict(config.eval.coordinates)
    return {"coordinates": chosen} if chosen and LAYER in adapter else {}
