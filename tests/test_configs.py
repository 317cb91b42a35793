"""Every config is a manual that runs: its docstring holds its command, its variants load, wrong ones are named."""

import operator
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.config.identity import config_hash, identity

FOLDER = Path(__file__).parents[1] / "configs"
VARIANTS = {
    "miniature": [()],
    "miniature_pretrain": [("clean",), ("mediocre",)],
    "miniature_teacher": [("text",), ("composition",), ("quality",)],
    "sd35m_opd": [()],
}


def load(name: str) -> dict[str, Any]:
    """What a config's file defines."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))


def test_every_config_file_is_covered():
    assert {path.stem for path in FOLDER.glob("*.py")} == VARIANTS.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_docstring_holds_command_cost_and_result(name: str):
    text = load(name)["__doc__"] or ""
    assert f"python -m fopd_jax.main --config=configs/{name}.py" in text
    assert "Cost on 2 CPU cores:" in text
    assert "Result" in text
    assert "@@" not in text  # an unfilled figure


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_load_under_names_of_their_own(name: str):
    configs = [load(name)["get_config"](*variant) for variant in VARIANTS[name]]
    assert len({config.name for config in configs}) == len(configs)


@pytest.mark.parametrize(("name", "variant"), [("miniature_pretrain", "dirty"), ("miniature_teacher", "music")])
def test_unknown_variants_are_named(name: str, variant: str):
    with pytest.raises(ValueError, match=f"found .* {variant!r}|found \\w+ '{variant}'"):
        load(name)["get_config"](variant)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_settings_that_a_docstring_names_exist(name: str):
    config = load(name)["get_config"](*VARIANTS[name][0])
    for field in re.findall(r"--config\.([\w.]+)=", load(name)["__doc__"] or ""):
        operator.attrgetter(field)(config)  # AttributeError where it does not


@pytest.mark.parametrize("name", VARIANTS)
def test_every_config_names_its_network_mesh_and_sampler_alike(name: str):
    config, reference = load(name)["get_config"](*VARIANTS[name][0]), load("miniature")["get_config"]()
    for group in ("model", "mesh", "eval", "optimizer", "ema"):
        assert config[group].keys() == reference[group].keys()


def test_identity_ignores_what_changes_no_step():
    config, changed = load("sd35m_opd")["get_config"](), load("sd35m_opd")["get_config"]()
    changed.steps, changed.log_every, changed.keep_checkpoints = 1000, 7, 9
    changed.mesh.fsdp, changed.conditioning_cache, changed.encode_batch_size = 4, "elsewhere", 8
    assert config_hash(changed) == config_hash(config)
    changed.objective.mar_beta = 0.5
    assert config_hash(changed) != config_hash(config)
    assert {k for k, v in identity(changed).items() if v != identity(config)[k]} == {"objective.mar_beta"}
