"""What a model can be: each source is known for what it is, and what is wrong with it is told by name."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.config.load import load_config
from fopd_jax.config.parse import flatten, override, resolve
from fopd_jax.config.stages import StageConfig
from fopd_jax.files import write_json
from fopd_jax.interop.files.safetensors import load_adapter, load_tree, save_adapter, save_tree
from fopd_jax.stages.cards import base_hash
from fopd_jax.stages.contestants import Contestant, find_contestants
from fopd_jax.stages.pipeline import Pipeline, load_base, make_pipeline
from tests import test_sample
from tests.test_sample import CONFIG

pytestmark = test_sample.pytestmark
small_network, weights = test_sample.small_network, test_sample.weights


@pytest.fixture(scope="module")
def config(weights: Path) -> StageConfig:
    return resolve(override(load_config(CONFIG), {"model.path": f"{weights}/base.safetensors"}))


@pytest.fixture(scope="module")
def pipeline(config: StageConfig) -> Pipeline:
    return make_pipeline(config.model, config.run, dict)


def _one(config: StageConfig, pipeline: Pipeline, source: Path | str) -> Contestant:
    (found,) = find_contestants(config, pipeline, {"it": str(source)})
    return found


def _run(folder: Path, config: StageConfig, weights: Path, guidance: float | None) -> Path:
    """A run's folder without checkpoints: its record, and what it exported."""
    folder.mkdir()
    adapter, _ = load_adapter(weights / "adapter.safetensors")
    save_adapter(folder / "student.safetensors", adapter, {"preset": "miniature"}, AdapterCard(guidance=guidance))
    write_json(folder / "run.json", {"starts": [{"config": flatten(config)}]})
    return folder


def test_a_network_is_the_base_or_a_file_of_its_own(
    config: StageConfig, pipeline: Pipeline, weights: Path, tmp_path: Path
):
    variables, _ = load_tree(weights / "base.safetensors")
    save_tree(tmp_path / "other.safetensors", jax.tree.map(lambda leaf: 2 * leaf, variables), {"preset": "miniature"})
    base, other = (_one(config, pipeline, each) for each in ("base", tmp_path / "other.safetensors"))
    assert base.about["sha256"] == base_hash(config.model) != other.about["sha256"]
    assert base.load is not None
    assert other.load is not None
    (mine, none), (theirs, nothing) = (each.load(lambda: load_base(config.model, pipeline)) for each in (base, other))
    assert none == nothing == {}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(2 * a, b), mine["params"], theirs["params"])


def test_an_adapter_says_its_guidance_and_a_run_knows_its_own(
    config: StageConfig, pipeline: Pipeline, weights: Path, tmp_path: Path
):
    plain = _one(config, pipeline, weights / "adapter.safetensors")
    assert plain.guidance is None
    run = _one(config, pipeline, _run(tmp_path / "run", config, weights, None))
    assert run.guidance == config.guidance == 1.0
    assert run.about["source"] == str(tmp_path / "run" / "student.safetensors")
    assert _one(config, pipeline, _run(tmp_path / "carded", config, weights, 3.0)).guidance == 3.0
    assert plain.load is not None
    variables, adapter = plain.load(lambda: "the base")
    assert variables == "the base"
    assert adapter


def test_a_folder_of_pictures_is_no_model_to_load(config: StageConfig, pipeline: Pipeline, tmp_path: Path):
    (tmp_path / "text" / "images").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "text" / "images" / "00000_00.png")
    found = _one(config, pipeline, tmp_path)
    assert (found.pictures, found.load) == (tmp_path, None)


def test_what_is_none_of_them_is_told(config: StageConfig, pipeline: Pipeline, weights: Path, tmp_path: Path):
    def refused(source: Path | str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            _one(config, pipeline, source)

    refused(tmp_path, "--models it: .*: found no run, adapter, converted network or pictures in it")
    refused(tmp_path / "away", "--models it: .*away: no such file or folder")
    refused("gs://bucket/x", "--models it: found 'gs://bucket/x', expected a path on this machine")
    adapter, _ = load_adapter(weights / "adapter.safetensors")
    save_adapter(tmp_path / "a.safetensors", adapter, {"preset": "miniature"}, AdapterCard(base="0" * 64))
    refused(tmp_path / "a.safetensors", "--models it: .*trained on another base")
    elsewhere = resolve(override(config, {"model.path": "packaged:base.safetensors"}))
    refused(_run(tmp_path / "run", elsewhere, weights, None), "--models it: .*trained on another base")
    (tmp_path / "run" / "student.safetensors").unlink()
    here = resolve(override(config, {"seed": 1}))
    write_json(tmp_path / "run" / "run.json", {"starts": [{"config": flatten(here)}]})
    refused(tmp_path / "run", "holds neither a checkpoint nor student.safetensors: nothing is saved yet")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    refused(tmp_path / "broken.safetensors", r"--models it: .*broken\.safetensors")
