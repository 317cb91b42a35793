"""Cards of adapters: what a stage writes of what it trained, and what it takes from a teacher's or refuses it for."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fopd_jax import __version__
from fopd_jax.adapters.card import AdapterCard
from fopd_jax.config.identity import config_hash
from fopd_jax.config.parse import AnyConfig, override, resolve
from fopd_jax.config.recorded import RECORD_FILE, recorded_config
from fopd_jax.config.schema import OPD, Config, Model
from fopd_jax.config.teaching import PAPER_GUIDANCE
from fopd_jax.exits import naming
from fopd_jax.interop.files.converted import weights_hash
from fopd_jax.interop.files.tensor_files import hash_file
from fopd_jax.interop.lora.cards import read_card
from fopd_jax.parallel.distributed import warn
from fopd_jax.rewards.monitors import PREFIX
from fopd_jax.running.metrics import EVALUATION, all_logged
from fopd_jax.running.stage import ASIDE
from fopd_jax.stages.coordinates import skills
from fopd_jax.stages.pipeline import Pipeline, weight_path

_SHOWN = 12  # digits of a hash in a message


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a stage's config says of what it trains.

    `guidance`: the scale to use it under, which is the one it was trained under, or where training knows none that of
    its evaluations. `rewards`: with their weights. `train_steps`: of the sampler that rolls out, None where none does.
    """

    algorithm: str
    guidance: float
    rewards: Mapping[str, float] = dataclasses.field(default_factory=dict)
    train_steps: int | None = None


def make_card(
    config: Config, pipeline: Pipeline, base: str, origin: Callable[[Any], Origin], step: int, run: Path
) -> AdapterCard:
    """Of what trained, after `step` updates; `base`: as `base_hash` found it when the run began.

    `run`: the folder of the run, whose metrics tell the newest scores, and whose record its config: that of an
    evaluation made later may differ. Rank and alpha are the adapter's own, see `export`.
    """
    config = run_config(config, run)
    scored_at, scores = _newest_scores(run, step)
    said = origin(config)
    return AdapterCard(
        algorithm=said.algorithm,
        rewards=dict(said.rewards),
        guidance=said.guidance,
        resolution=size_of(config, pipeline),
        train_steps=said.train_steps,
        eval_steps=config.eval.num_steps,
        preset=pipeline.preset,
        base=base,
        targets=config.adapter.targets,
        updates=step,
        scores=scores,
        scored_at=scored_at,
        config=config.name,
        config_hash=config_hash(config),
        version=__version__,
        coordinates=skills(config),
        coordinates_high=config.coordinates.high if isinstance(config, OPD) and skills(config) else None,
    )


def run_config(config: Config, run: Path) -> Config:
    """A run's own, where its folder still holds it."""
    try:
        return resolve(recorded_config(run / RECORD_FILE))
    except ValueError:
        return config


def _newest_scores(run: Path, step: int) -> tuple[int | None, dict[str, float]]:
    """Those of the newest evaluation up to a step, without what monitors see."""
    found: tuple[int | None, dict[str, float]] = (None, {})
    for at, scores in all_logged(run, EVALUATION):
        kept = {name: value for name, value in scores.items() if not name.startswith((PREFIX, *ASIDE))}
        if at <= step and kept:
            found = at, kept
    return found


def size_of(config: Config, pipeline: Pipeline) -> tuple[int, int]:
    """Of images in pixels; embedded worlds have one of their own, and no autoencoder."""
    return config.model.size if pipeline.manifest is not None else pipeline.world.latent_shape[:2]


def base_hash(model: Model) -> str:
    """Which weights the base is, see `weights_hash`; '' for random ones."""
    return weights_hash(weight_path(model.path)) if model.path else ""


def content_hash(path: Path) -> str:
    """Of a file, or of a folder's tensor files."""
    if path.is_file():
        return hash_file(path)
    parts = [f"{each.name} {hash_file(each)}" for each in sorted(path.glob("*.safetensors"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# ---- what teachers' cards say


def read_source(field: str, source: str) -> AdapterCard | None:
    """The card of an adapter that a field names; None where it has none, or nothing is there.

    Raises:
      ValueError: as `read_card`; names the field.
    """
    with naming(field):
        return read_card(weight_path(source)) if source else None


def settled(config: AnyConfig) -> AnyConfig:
    """The config with the guidance of every teacher: where it does not say it, what the teacher's file says.

    This is done before a run's identity is taken, so that a run is known by what it does: one that goes on does so
    under the scales that it began with, or is refused by name. Where the file is silent, the paper's scale is assumed,
    with a line; where it is not there, nothing is, which whoever needs it says.

    Raises:
      ValueError: a card is damaged; names field and file.
    """
    if not isinstance(config, OPD):
        return config
    sources = {f"tasks.{name}": task.teacher for name, task in config.tasks.items() if task.guidance is None}
    if config.anchor.guidance is None and config.objective.mar_beta > 0 and config.anchor.moves == "none":
        sources["anchor"] = config.anchor.adapter
    found: dict[str, float] = {}
    for name, source in sources.items():
        field = f"{name}.{'adapter' if name == 'anchor' else 'teacher'}"
        if not source or not weight_path(source).exists():
            continue
        card = read_source(field, source)
        if card is None or card.guidance is None:
            assumed = f"{PAPER_GUIDANCE:g} is assumed; set {name}.guidance"
            warn(f"{field}: {source} does not say its guidance; {assumed}")
        found[f"{name}.guidance"] = PAPER_GUIDANCE if card is None or card.guidance is None else card.guidance
    return resolve(override(config, found)) if found else config


def check_card(field: str, source: str, card: AdapterCard | None, pipeline: Pipeline, base: str) -> None:
    """Refuse an adapter of another base; one that does not say its base is taken as it is.

    Raises:
      ValueError: names field, file, what was found and what would be right.
    """
    if card is None:
        return
    if card.preset and card.preset != pipeline.preset:
        raise ValueError(
            f"{field}: {source}: trained on preset {card.preset!r}, but model.preset is {pipeline.preset!r}"
        )
    if problem := other_base(card, base):
        raise ValueError(f"{field}: {source}: {problem}")


def other_base(card: AdapterCard, base: str) -> str:
    """What is wrong where a card names another base than this; empty where it does not."""
    if not card.base or not base or card.base == base:
        return ""
    found, expected = (f"{digest[:_SHOWN]}…" for digest in (card.base, base))
    return (
        f"trained on another base (SHA-256 of its weights {found}, that of model.path is {expected}); expected an "
        "adapter of this base, or its own base in model.path; where the same network is in other files, "
        "tools/convert_adapter.py --base says so in a new file of the adapter's"
    )
