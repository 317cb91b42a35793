"""What the student starts from: another run's adapter at any rank and scale, and merges of whole networks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter, delta, init_adapter, rank_of
from fopd_jax.adapters.merging import combine, layer_key
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.parse import assign, resolve
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.files.safetensors import save_adapter
from fopd_jax.stages import cold_start
from fopd_jax.stages.cold_start import given_adapter, merge_networks, source_of, tell_start
from fopd_jax.stages.opd import plan_opd
from tests.configs import load, pipeline

CHANGES: dict[str, Any] = {"adapter.rank": 4, "adapter.alpha": 8.0, "cold_start.method": "adapter"}
WEIGHTS = {0: 0.5, 2: 0.75}


def _config(**changes: Any) -> Any:
    config = load()
    assign(config, CHANGES | changes)
    return resolve(config)


def _saved(folder: Path, rank: int, alpha: float, **about: str) -> tuple[Path, Adapter]:
    made = pipeline(_config())
    params = boxed_variables(made.model, made.world.latent_shape)["params"]
    params = _plain(params)
    fresh = jax.eval_shape(
        lambda: init_adapter(jax.random.key(0), params, LoRAConfig(rank, alpha), made.family.targets)
    )
    rng = np.random.default_rng(rank)
    adapter = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), fresh)
    save_adapter(folder / "adapter.safetensors", adapter, {"preset": "miniature", **about})
    return folder / "adapter.safetensors", adapter


def _updates(adapter: Adapter) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(delta(adapter), sep="/").items()}


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (2, 1.0), (6, 12.0)])
def test_an_adapter_starts_at_the_students_rank_and_scale(rank: int, alpha: float, tmp_path: Path):
    path, adapter = _saved(tmp_path, rank, alpha)
    config = _config(**{"cold_start.adapter": str(path)})
    found, energies = given_adapter("cold_start.adapter", str(path), config.adapter, pipeline(config))
    assert (rank_of(found), found.scale) == (4, 2.0)
    for name, update in _updates(adapter).items():
        started, left = _updates(found)[name], np.linalg.svd(update, compute_uv=False)[..., 4:]
        lost = np.linalg.norm(started - update, axis=(-2, -1))
        bound = np.sqrt(np.square(left).sum(-1)) if rank > 4 else np.zeros_like(lost)
        np.testing.assert_allclose(lost, bound, rtol=1e-4, atol=1e-4 * np.linalg.norm(update))
    assert bool(energies) == (rank > 4)


def test_a_runs_folder_stands_for_the_adapter_that_it_left(tmp_path: Path):
    path, _ = _saved(tmp_path, 4, 8.0)
    assert source_of(str(tmp_path)) == str(tmp_path)  # PEFT's folder, say
    (tmp_path / "run.json").write_text("{}")
    assert source_of(str(tmp_path)) == str(path)
    path.unlink()
    assert source_of(str(tmp_path)) == str(path)  # whoever reads it says that it is missing
    assert source_of("") == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"cold_start\.adapter: missing, which cold_start\.method 'adapter' starts from"),
        ({"cold_start.method": "none", "cold_start.adapter": "x"}, r"adapter: found 'x', but cold_start\.method is"),
        ({"cold_start.adapter": "nowhere"}, r"cold_start\.adapter: nowhere: no such file"),
    ],
)
def test_what_cannot_be_started_from_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan_opd(_config(**changes))


def test_an_adapter_of_another_base_or_of_other_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, _ = _saved(tmp_path, 4, 8.0)
    card = AdapterCard(preset="miniature", base="0" * 64)
    monkeypatch.setattr(cold_start, "read_source", lambda field, source: card)
    with pytest.raises(ValueError, match=r"cold_start\.adapter: .*: trained on another base"):
        plan_opd(_config(**{"cold_start.adapter": str(path)}))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"cold_start\.adapter: adapter .* but adapter\.targets leaves that layer out"):
        plan_opd(_config(**{"cold_start.adapter": str(path), "adapter.targets": ("mlp",)}))


def test_what_a_merge_keeps_is_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = _config(**{"cold_start.method": "merge", "cold_start.merge": "ties", "cold_start.density": 0.3})
    kept = cold_start.Kept(0.75, 0.5, "blocks/attn/to_q[1]")
    tell_start(config, tmp_path / "run", kept)
    said = capsys.readouterr().out
    assert "rank 4 keeps 75.0% of the start's energy, the least in blocks/attn/to_q[1]: 50.0%" in said
    written = json.loads((tmp_path / "run" / "cold_start.json").read_text())
    third = 1 / 3
    assert written == {
        "method": "merge", "merge": "ties", "density": 0.3, "rank": 4, "kept": dataclasses.asdict(kept),
        "weights": {"text": third, "composition": third, "quality": third},
    }  # fmt: skip


@pytest.mark.parametrize("method", ["svd", "dare", pytest.param("ties", marks=pytest.mark.slow)])
def test_networks_are_merged_by_their_differences_to_the_base(method: str):
    """Weights of 1.25 in all scale the differences, and leave the base as it is."""
    config = _config(**{"cold_start.method": "merge", "cold_start.merge": method, "cold_start.density": 0.3})
    made = pipeline(config)
    boxed = boxed_variables(made.model, made.world.latent_shape)["params"]
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), _plain(boxed))
    bank = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(3, *leaf.shape)), jnp.float32), tree)
    found = flatten_dict(merge_networks(config, made, tree, bank, WEIGHTS), sep="/")
    bases, banks = (flatten_dict(each, sep="/") for each in (tree, bank))
    assert found.keys() == bases.keys()
    shares = jnp.asarray(list(WEIGHTS.values()))
    for path, leaf in list(found.items())[::7]:
        deltas = banks[path][jnp.asarray([0, 2])] - bases[path][None]
        if method == "svd":
            expected = bases[path] + jnp.tensordot(shares, deltas, 1)
        elif path.startswith(("blocks/", "dual_blocks/")):
            keys = [jax.random.fold_in(layer_key(config.seed, path), i) for i in range(len(leaf))]
            layers = [combine(method, key, deltas[:, i], shares, 0.3) for i, key in enumerate(keys)]
            expected = bases[path] + jnp.stack(layers)
        else:
            expected = bases[path] + combine(method, layer_key(config.seed, path), deltas, shares, 0.3)
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-4, err_msg=path)


def _plain(boxed: Any) -> Any:
    return jax.tree.map(lambda leaf: getattr(leaf, "value", leaf), boxed, is_leaf=lambda leaf: hasattr(leaf, "names"))
