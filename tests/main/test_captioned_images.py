"""Stage `flow_matching` on a converted folder and a folder of captioned images, from files to what is left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from fopd_jax.config.identity import config_hash
from fopd_jax.config.parse import assign, resolve
from fopd_jax.interop.files.safetensors import load_adapter
from fopd_jax.running import loop
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.running.metrics import MetricWriter
from fopd_jax.stages import flow_matching as module
from fopd_jax.stages.flow_matching import FlowMatching
from fopd_jax.stages.pipeline import load_policy
from tests.configs import load, prepare
from tests.main.experiment import assert_refused

SIZE = (32, 48)
SETTINGS: dict[str, Any] = {
    "model.preset": "custom", "model.dtype": "float32", "model.resolution": SIZE, "model.t5_length": 8,
    "run.encoding.cache": "", "run.encoding.batch_size": 4, "run.attention": "xla", "run.steps": 2,
    "run.checkpoint_every": 1, "run.eval_every": 0, "run.reduce_once": (), "batch_size": 2, "adapter.rank": 2,
    "adapter.alpha": 4.0, "optimizer.learning_rate": 1e-2, "eval.batch_size": 2, "eval.num_steps": 2,
    "eval.guidance": 1.0, "tasks.style.wrong_caption": 0.25,
}  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images of several kinds, captioned in lines, and held-out prompts."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for name, shape in {
        "a.png": (40, 56, 3),
        "b.jpg": (64, 48, 3),
        "c.webp": (32, 32, 3),
        "d.png": (33, 70, 4),
    }.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"a picture called {name[0]}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "test.txt").write_text("a picture of nothing\nanother one\n", encoding="utf-8")
    return folder


@pytest.fixture
def config(converted_pipeline: Path, images: Path) -> Any:
    """The recipe, on a tiny network and few images."""
    config = load("sd35m_sft")
    files = {"images": str(images), "test": str(images.parent / "test.txt")}
    paths = {f"tasks.style.{name}": path for name, path in files.items()} | {"model.path": str(converted_pipeline)}
    assign(config, SETTINGS | paths)
    return config


def _train(config: Any, workdir: Path) -> FlowMatching:
    """What `main` does, in this process."""
    stage, settings = prepare(config, workdir), resolve(config)
    assert isinstance(stage, FlowMatching)
    checkpoints = Checkpoints(workdir, 2, config_hash=config_hash(settings))
    writer = MetricWriter(workdir, checkpoints.latest_step() or 0)
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
            state = loop.run(stage, settings.run, checkpoints, writer)
            stage.finish(state)
    finally:
        stage.close()
        checkpoints.close()
        writer.close()
    assert {path.name for path in workdir.iterdir()} >= stage.outputs.keys()
    return stage


def test_an_adapter_trains_on_images_and_goes_on_to_the_bit(config: Any, tmp_path: Path):
    stage = _train(config, tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["train/grad_norm"] > 0 for line in lines)
    assert stage.outputs.keys() == {"adapter.safetensors", "adapter_peft", "README.md", "samples.png"}
    with Image.open(tmp_path / "whole" / "samples.png") as picture:
        assert picture.width > picture.height > SIZE[0]
    assert stage.pipeline.world.latent_shape == (SIZE[0] // 8, SIZE[1] // 8, 16)

    config.run.steps = 1
    _train(config, tmp_path / "parts")
    config.run.steps = 2
    _train(config, tmp_path / "parts")
    found = (tmp_path / "parts" / "adapter.safetensors").read_bytes()
    assert found == (tmp_path / "whole" / "adapter.safetensors").read_bytes()

    written = (tmp_path / "whole" / "adapter_peft" / "README.md").read_text(encoding="utf-8")
    assert "library_name: diffusers" in written
    assert "load_lora_weights" in written
    assert "--src ../adapter.safetensors" in written
    assert str(tmp_path) not in written

    adapter, _ = load_adapter(tmp_path / "whole" / "adapter.safetensors")
    weights = flatten_dict(adapter.weights)
    assert any(np.abs(leaf).max() > 0 for path, leaf in weights.items() if path[-1] == "b")  # it moved
    published = load_policy(str(tmp_path / "whole" / "adapter_peft"), stage.pipeline)
    for path, leaf in flatten_dict(published.weights).items():
        np.testing.assert_array_equal(np.asarray(leaf), weights[path])


@pytest.mark.slow
def test_all_of_a_network_trains_on_images(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assign(config, {"trained": "params", "run.steps": 1})
    written: list[Path] = []
    monkeypatch.setattr(module, "draw_samples", lambda path, *_: written.append(path) or path.touch())
    stage = _train(config, tmp_path / "run")
    assert stage._start is None  # nothing of the start is kept
    assert stage.frozen.keys() == {"constants"}
    assert stage.outputs.keys() == {"base_diffusers", "README.md", "samples.png"}
    folder = tmp_path / "run" / "base_diffusers" / "transformer"
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert written == [tmp_path / "run" / "samples.png"]


def _break(images: Path, name: str) -> None:
    path = images / name
    path.write_bytes(path.read_bytes()[:-100])


BAD: dict[str, tuple[Callable[[Any, Path], object], tuple[str, ...]]] = {
    "no images": (lambda config, images: assign(config, {"tasks.style.images": ""}), ("tasks.style.images: found ''",)),
    "no prompts": (lambda config, images: assign(config, {"tasks.style.test": "x.txt"}), ("tasks.style.test", "x.txt")),
    "degraded": (lambda config, images: assign(config, {"tasks.style.degraded": 0.5}), ("tasks.style.degraded",)),
    "truncated": (lambda config, images: _break(images, "b.jpg"), ("tasks.style.images", "b.jpg", "truncated")),
    "no caption": (lambda config, images: (images / "a.png").rename(images / "e.png"), ("a.png: no such file",)),
    "batch": (lambda config, images: assign(config, {"run.mesh.fsdp": 3}), ("'fsdp': 3",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_anything_is_compiled(
    name: str, config: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def loaded(*args: Any) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(module, "load_base", loaded)
    spoil, fragments = BAD[name]
    spoil(config, images)
    assert_refused(config, tmp_path / "run", *fragments)
