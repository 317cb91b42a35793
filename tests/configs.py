"""Configs of the repository in tests: loaded, changed in place, checked as the program checks them."""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fopd_jax import main
from fopd_jax.config.parse import assign, resolve
from fopd_jax.stages.pipeline import Pipeline, make_pipeline
from fopd_jax.tasks.prompts import read_tasks

FOLDER = Path(__file__).parents[1] / "configs"
RECIPES = (
    "capfield_opd", "dance_opd", "diffusion_opd", "flow_dppo_opd", "flow_opd_code", "flow_opd_v1", "flow_opd_v5",
    "gfd_opd", "pdm", "step_opd",
)  # fmt: skip
VARIANTS: dict[str, list[str]] = {
    "miniature": [""],
    "miniature_large": [""],
    "miniature_pretrain": ["clean", "mediocre", "large"],
    "miniature_rl": [f"{name}{kind}" for name in ("text", "composition", "quality", "mix") for kind in ("-nft", "")],
    "miniature_sft": ["both", "text", "composition"],
    "miniature_teacher": ["text", "composition", "quality"],
    "miniature_teachers": ["3", "4", "8"],
    **{f"recipes/{name}": ["", "miniature"] for name in RECIPES},
    "sd35m_fast": ["geneval", "ocr", "pickscore"],
    "sd35m_large": [""],
    "sd35m_grpo": ["geneval", "ocr", "pickscore", "deqa", "mix"],
    "sd35m_nft": ["geneval", "ocr", "pickscore", "multi"],
    "sd35m_opd": [""],
    "sd35m_sft": ["images", "demonstrations"],
}
EVERY = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def smoke_variant(variant: str) -> str:
    """The same in small."""
    return f"{variant}:smoke".removeprefix(":")


def load(name: str = "miniature", *variant: str, **changes: Any) -> Any:
    """The config of a file, not frozen; `changes`: see `assign`."""
    config = runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](*variant)
    assign(config, changes)
    return config


def prepare(config: Any, folder: Path) -> Any:
    """The stage, as the program makes it."""
    return main.prepare(resolve(config), folder)


def pipeline(config: Any) -> Pipeline:
    """Network and world, as every program makes them."""
    config = resolve(config)
    return make_pipeline(config.model, config.run, lambda: read_tasks(config.tasks))


def options(changes: Mapping[str, Any]) -> list[str]:
    """Changes as command-line flags."""
    return [f"--config.{name}={value}" for name, value in changes.items()]
