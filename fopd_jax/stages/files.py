"""Which files a run depends on, by the fields that name them."""

from pathlib import Path

from fopd_jax.config.learning import Reinforced
from fopd_jax.config.schema import OPD, Config, FlowMatching
from fopd_jax.interop.files.converted import is_converted
from fopd_jax.rewards.registry import files_of
from fopd_jax.stages.cold_start import START, source_of
from fopd_jax.stages.pipeline import weight_path
from fopd_jax.tasks.demonstrations import is_set
from fopd_jax.tasks.sources import file_of
from fopd_jax.worlds.embedded import EMBEDDED


def input_files(config: Config) -> dict[str, Path]:
    """Base, teachers, anchor, what the world's tasks are read from, and what rewards read; fields that are empty, and
    sets that are generated, name none.

    A folder in place of a whole network that no conversion wrote is left out: it is refused, and may be large.
    """
    weights = {"model.path": config.model.path}
    texts: dict[str, str] = {}
    if isinstance(config, OPD):
        weights |= {f"tasks.{name}.teacher": task.teacher for name, task in config.tasks.items()}
        weights |= {"anchor.adapter": config.anchor.adapter, "cold_start.adapter": source_of(config.cold_start.adapter)}
        weights |= {f"networks.{name}.path": network.path for name, network in config.networks.items()}
        texts |= {f"offline.tasks.{name}.images": pairs.images for name, pairs in config.offline.tasks.items()}
    if isinstance(config, Reinforced):
        weights |= {START: source_of(config.start)}
    if isinstance(config, OPD | Reinforced):
        texts |= {f"tasks.{name}.prompts": task.prompts for name, task in config.tasks.items()}
        texts |= {f"tasks.{name}.test": task.test for name, task in config.tasks.items()}
    elif isinstance(config, FlowMatching):
        texts |= {f"tasks.{name}.images": task.images for name, task in config.tasks.items()}
        texts |= {f"tasks.{name}.test": task.test for name, task in config.tasks.items()}
    if config.model.preset in EMBEDDED:  # of tasks that are its own no file is read but what teachers drew for them
        own = EMBEDDED[config.model.preset]().tasks
        texts = {
            field: name
            for field, name in texts.items()
            if field.split(".")[-2] not in own or (name and is_set(Path(name)))
        }
    paths = {field: weight_path(name) for field, name in weights.items() if name}
    found = {field: path for field, path in paths.items() if not _is_refused(config, field, path)}
    read = {field: file_of(name, field) for field, name in texts.items() if name}
    return found | {field: path for field, path in read.items() if path is not None} | files_of(config.rewards)


def _is_refused(config: Config, field: str, path: Path) -> bool:
    teaches = isinstance(config, OPD) and config.whole_teachers and field != "cold_start.adapter"
    whole = field == "model.path" or field.startswith("networks.") or teaches
    return whole and path.is_dir() and not is_converted(path)
