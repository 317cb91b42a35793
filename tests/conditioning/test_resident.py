"""Resident encoders give what the cache gives, on one device, on many, and in several processes.

Both round to bfloat16. What they round is computed in batches of other sizes and in other orders, so that values near
the middle of two may go either way: of all numbers of a batch at most one in a thousand may differ, by at most one step
of bfloat16.

The file is also the program of the many: `python test_resident.py WEIGHTS FOLDER COUNT PROCESS PORT`.
"""

import functools
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from fopd_jax.conditioning.converted import ConvertedText
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.conditioning.kept import KeptPrompts
from fopd_jax.conditioning.resident import ResidentPrompts
from fopd_jax.config.schema import Encoding, MeshShape
from fopd_jax.interop.files.converted import read_manifest
from fopd_jax.parallel import distributed
from fopd_jax.parallel.mesh import fold_data, make_mesh
from fopd_jax.parallel.sharding import batch_sharding, replicated
from fopd_jax.worlds.folder import kept_prompts
from fopd_jax.worlds.world import World, embed_empty, embed_prompts
from tests.quick import environment

T5_LENGTH, SHARE, STEP = 24, 1e-3, 2.0**-7
PROMPTS = ['a sign that says "Hello"', "", "a photo of a cat " * 20, "two red squares", "x", "ÄΩ", "a b c", "two red"]
MESHES = {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2)}
PROCESSES = 2


def _text(weights: Path, dtype: str = "float32") -> ConvertedText:
    return ConvertedText(weights, read_manifest(weights), dtype, T5_LENGTH)


def _world(prompts: KeptPrompts | ResidentPrompts) -> World:
    return World((1, 1, 1), {}, prompts.encode, lambda latents: latents, prompts.prepare, prompts.embed)


def _plain(encoded: Any) -> dict[str, np.ndarray]:
    """In float32, which npz keeps."""
    whole = distributed.fetch(encoded)
    return {name: np.asarray(getattr(whole, name)).astype(np.float32) for name in ("context", "pooled")}


# ---- what the processes do


def _outcome(weights: Path, mesh: Mesh) -> dict[str, np.ndarray]:
    """Encodings of all prompts and of the empty one, and where they and a kernel of each encoder lie."""
    prompts = ResidentPrompts(_text(weights).load, mesh)
    world = _world(prompts)
    world.prepare(PROMPTS)
    batch, empty = embed_prompts(world, PROMPTS, mesh), embed_empty(world, mesh)
    places = [leaf.sharding.is_equivalent_to(batch_sharding(mesh), leaf.ndim) for leaf in jax.tree.leaves(batch)]
    places += [leaf.sharding.is_equivalent_to(replicated(mesh), leaf.ndim) for leaf in jax.tree.leaves(empty)]
    towers, t5 = prompts._encoders.params[:2], prompts._encoders.params[2]
    kernels = [each["layers"]["self_attn"]["q_proj"]["kernel"] for each in towers]
    kernels.append(t5["layers"]["attention"]["q"]["kernel"])
    parts = [leaf.addressable_shards[0].data.size / leaf.size for leaf in kernels]
    found = {f"empty_{name}": leaf for name, leaf in _plain(empty).items()} | _plain(batch)
    return found | {"places": np.array(places), "parts": np.array(parts)}


def _program(weights: Path, folder: Path, count: int, process: int, port: int) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    tokenized: list[str] = []
    if count > 1:
        distributed.initialize(f"localhost:{port}", count, process)
        encode = ResidentPrompts.encode
        ResidentPrompts.encode = lambda self, prompts: (tokenized.extend(prompts), encode(self, prompts))[1]
    for name, lengths in MESHES.items():
        mesh = make_mesh(MeshShape(*lengths))
        np.savez(folder / f"{name}_{count}_{process}.npz", **_outcome(weights, mesh))
    (folder / f"tokenized_{count}_{process}.json").write_text(json.dumps(tokenized), encoding="utf-8")


# ---- the tests


def _same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Contexts and pooled inputs of the same prompts."""
    pairs = [[np.asarray(leaf).astype(np.float32) for leaf in pair] for pair in zip(found, expected, strict=True)]
    for a, b in pairs:
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=STEP, atol=1e-5)
        assert np.abs(b).max() > 0.5  # the tolerance means something
    assert np.concatenate([(a != b).ravel() for a, b in pairs]).mean() <= SHARE


@functools.cache
def _cached(weights: Path, folder: Path) -> Conditioning:
    kept = kept_prompts(_text(weights), Encoding(str(folder / "cache"), 3), make_mesh(MeshShape()))
    kept.prepare(PROMPTS)
    return kept.encode(PROMPTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resident")


def test_one_device_encodes_as_the_cache_does(converted_pipeline: Path, folder: Path):
    mesh = make_mesh(MeshShape())
    world = _world(ResidentPrompts(_text(converted_pipeline).load, mesh))
    found, expected = embed_prompts(world, PROMPTS, mesh), _cached(converted_pipeline, folder)
    assert found.context.dtype == found.pooled.dtype == expected.context.dtype == ml_dtypes.bfloat16
    _same((found.context, found.pooled), (expected.context, expected.pooled))
    empty = embed_empty(world, mesh)
    assert empty.context.shape == (1, 77 + T5_LENGTH, 96)
    _same((empty.context, empty.pooled), (expected.context[1:2], expected.pooled[1:2]))


def test_computing_in_bfloat16_gives_what_the_same_batch_gives_there(converted_pipeline: Path):
    """Rounding stands in every layer: batches of other sizes differ by more, those of the same size by nothing."""
    mesh, text = make_mesh(MeshShape()), _text(converted_pipeline, "bfloat16")
    found = embed_prompts(_world(ResidentPrompts(text.load, mesh)), PROMPTS, mesh)
    expected = kept_prompts(text, Encoding("", len(PROMPTS)), mesh).encode(PROMPTS)
    np.testing.assert_array_equal(np.asarray(found.context), expected.context)
    np.testing.assert_array_equal(np.asarray(found.pooled), expected.pooled)


def test_nothing_is_encoded_beforehand_and_nothing_kept(converted_pipeline: Path):
    """Its encoder needs no prompt; what travels to the devices is ids."""
    mesh, loads = make_mesh(MeshShape()), []

    def load(mesh: Mesh) -> Any:
        loads.append(mesh)
        return _text(converted_pipeline).load(mesh)

    prompts = ResidentPrompts(load, mesh)
    prompts.prepare(iter(PROMPTS))
    tokens = prompts.encode(PROMPTS[:2])
    assert [(leaf.shape, leaf.dtype) for leaf in tokens.ids] == [((2, n), np.int32) for n in (77, 77, T5_LENGTH)]
    prompts.embed(jax.device_put(tokens, batch_sharding(mesh)))
    assert loads == [fold_data(mesh)]


def _run(weights: Path, folder: Path, count: int) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(weights), str(folder), str(count)]
    running = [
        subprocess.Popen([*command, str(k), str(port)], env=environment(8 // count), stderr=subprocess.PIPE, text=True)
        for k in range(count)
    ]
    for process in running:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def ran(converted_pipeline: Path, folder: Path) -> Path:
    """Eight devices of two processes."""
    _run(converted_pipeline, folder, PROCESSES)
    return folder


@pytest.fixture(scope="module")
def ran_alone(converted_pipeline: Path, folder: Path) -> Path:
    """Eight devices of one process."""
    _run(converted_pipeline, folder, 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_one_process_encodes_as_the_cache_does(converted_pipeline: Path, ran_alone: Path, mesh: str):
    found, expected = np.load(ran_alone / f"{mesh}_1_0.npz"), _cached(converted_pipeline, ran_alone)
    _same((found["context"], found["pooled"]), (expected.context, expected.pooled))


@pytest.mark.parametrize("process", ["2_0", "2_1"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_encodes_as_the_cache_does(converted_pipeline: Path, ran: Path, mesh: str, process: str):
    found, expected = np.load(ran / f"{mesh}_{process}.npz"), _cached(converted_pipeline, ran)
    _same((found["context"], found["pooled"]), (expected.context, expected.pooled))
    _same((found["empty_context"], found["empty_pooled"]), (expected.context[1:2], expected.pooled[1:2]))


@pytest.mark.parametrize("mesh", MESHES)
def test_encodings_lie_where_batches_do_and_parameters_on_all_devices(ran: Path, mesh: str):
    found = np.load(ran / f"{mesh}_2_0.npz")
    assert found["places"].all()
    np.testing.assert_array_equal(found["parts"], np.full(3, 1 / 8))


def test_each_process_tokenises_its_own_rows(ran: Path):
    """Whole batches of each mesh, and as many empty prompts as a batch has parts, by half each."""
    mine = [json.loads((ran / f"tokenized_2_{k}.json").read_text(encoding="utf-8")) for k in range(PROCESSES)]
    ways = sum(a * b for a, b, _ in MESHES.values())
    assert [len(each) for each in mine] == [(len(MESHES) * len(PROMPTS) + ways) // 2] * 2
    texts = [prompt for each in mine for prompt in each if prompt]
    assert sorted(texts) == sorted(prompt for prompt in PROMPTS if prompt for _ in MESHES)


if __name__ == "__main__":
    _program(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
