"""What tests of the program share: random weights, and programs that run."""

from pathlib import Path
from typing import Any

import jax
import pytest

from fopd_jax.adapters.lora import init_adapter
from fopd_jax.backbones.weights import init_variables
from fopd_jax.config.parse import assign
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.evaluation import sampler
from fopd_jax.interop.files.safetensors import save_adapter, save_tree
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.steps.opd import step as opd_step
from fopd_jax.worlds.miniature.world import make_world
from tests.configs import load
from tests.main.experiment import RANK, Program, experts, noisy, tiny_overrides
from tests.quick import environment


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random base and random experts: every teacher of the config, and its anchor."""
    folder, preset = tmp_path_factory.mktemp("weights"), {"preset": "miniature"}
    shape = make_world().latent_shape
    variables = noisy(0, jax.jit(lambda: init_variables(MMDiT(PRESETS["miniature"]), shape, 0))(), 0.05)
    save_tree(folder / "base.safetensors", variables, preset)
    for seed, name in enumerate(experts(), start=1):
        fresh = init_adapter(jax.random.key(seed), variables["params"], LoRAConfig(RANK, 2.0 * RANK), TARGETS)
        save_adapter(folder / f"{name}.safetensors", noisy(seed, fresh, 0.05), preset)
    return folder


@pytest.fixture(scope="session")
def program(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("runs"), environment(), tiny_overrides(weights))


@pytest.fixture
def config(weights: Path) -> Any:
    """The tiny experiment's config, to be changed."""
    config = load()
    assign(config, tiny_overrides(weights))
    return config


@pytest.fixture
def no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update and the sampler are not even traced."""

    def traced(*args: Any) -> None:
        raise AssertionError("traced before the input was checked")

    monkeypatch.setattr(opd_step, "fused", traced)
    monkeypatch.setattr(opd_step, "replay", traced)
    monkeypatch.setattr(sampler, "solve", traced)
