"""Decoding, scoring and advantages on eight simulated devices: what one computes, and each device its own rows."""

import json
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fopd_jax.config.learning import Decoding
from fopd_jax.config.schema import MeshShape
from fopd_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from fopd_jax.parallel.distributed import spread
from fopd_jax.parallel.mesh import AXES, make_mesh
from fopd_jax.parallel.sharding import batch_sharding, replicated
from fopd_jax.performance.hlo import collectives
from fopd_jax.rewards.advantages import advantages
from fopd_jax.rewards.traced import place, prepare, score, traced_of
from fopd_jax.worlds.decoder import autoencoder_decoder
from fopd_jax.worlds.miniature.rewards import make_rewards
from tests.quick import environment

VAE = AutoencoderConfig((4,), 1, 4, 3, 2, 1.5, 0.1)
COUNT = 24
PROMPTS = ["two red squares and one blue circle", "one yellow triangle"] * (COUNT // 2)
MESHES = {"one": MeshShape(1, 1, 1), "eight": MeshShape(2, 2, 2)}
FLAG = 4
"""Bytes of what all devices tell each other while objects are looked for: whether one of them has not done yet."""


def decoded_and_scored(mesh: Mesh) -> dict[str, Any]:
    """Images, their scores, and the size of the largest message between devices for both."""
    latents = np.random.default_rng(0).standard_normal((COUNT, 24, 24, 4), np.float32)
    traced = traced_of({name: make_rewards()[name] for name in ("composition", "quality")})
    params = nn.unbox(Autoencoder(VAE).init(jax.random.key(0), jnp.zeros((1, 2, 2, 3))))["params"]
    decoder = autoencoder_decoder(VAE, lambda: params)
    decode = decoder.make(Decoding(batch_size=2), mesh)

    def program(latents: Any, rows: Any, params: Any, scorers: Any) -> Any:
        images = decode(params, latents)
        return images, score(traced, scorers, images, rows)

    rows = (latents, prepare(traced, PROMPTS, [{}] * COUNT))
    arguments = *jax.device_put(rows, batch_sharding(mesh)), jax.device_put(decoder.params(), replicated(mesh))
    compiled = jax.jit(program).lower(*arguments, place(traced, mesh)).compile()
    images, values = compiled(*arguments, place(traced, mesh))
    sizes = [each.bytes for each in collectives(compiled.as_text())]
    return {"images": images[:, ::5, ::5].tolist(), "values": values.tolist(), "message": max(sizes, default=0)}


def compared(mesh: Mesh) -> dict[str, Any]:
    """Advantages of values of which some have failed, in two modes."""
    rng, split = np.random.default_rng(1), batch_sharding(mesh)
    values = np.where(rng.random((2, COUNT)) < 0.1, np.nan, rng.standard_normal((2, COUNT))).astype(np.float32)
    groups = jax.device_put(np.arange(COUNT) % 5, split)

    @jax.jit
    def program(*problem: Any) -> dict[str, Any]:
        return {mode: advantages(*problem, count=5, normalise=mode, mesh=mesh).values for mode in ("global", "each")}

    found = program(jnp.asarray(values), jnp.array([0.5, 1.0]), groups)
    return {mode: each.tolist() for mode, each in found.items()}


def weights_lie_once(mesh: Mesh) -> bool:
    """What is whole on every device already, in another order of them, is not copied."""
    params = {"a": np.arange(4.0, dtype=np.float32), "b": np.ones(2, np.float32)}
    there = jax.device_put(params["a"], replicated(Mesh(mesh.devices.ravel()[::-1].reshape(-1, 1, 1), AXES)))
    placed = spread({"a": there, "b": params["b"]}, mesh)
    before, after = (
        {shard.device: shard.data.unsafe_buffer_pointer() for shard in each.addressable_shards}
        for each in (there, placed["a"])
    )
    assert all(leaf.sharding == replicated(mesh) for leaf in jax.tree.leaves(placed))
    assert all(np.array_equal(placed[name], params[name]) for name in params)
    return before == after


def outcome(name: str) -> dict[str, Any]:
    mesh = make_mesh(MESHES[name], jax.devices()[: 1 if name == "one" else None])
    once = weights_lie_once(mesh)
    with jax.set_mesh(mesh):
        return {**decoded_and_scored(mesh), "advantages": compared(mesh), "lie once": once}


def test_eight_devices_compute_what_one_does():
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(8), check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    one, eight = made["one"], made["eight"]
    for what in ("images", "values"):
        np.testing.assert_allclose(eight[what], one[what], rtol=0, atol=1e-5)
    assert np.ptp(one["values"][1]) > 1e-3
    assert eight["advantages"] == one["advantages"]  # to the bit
    assert eight["message"] <= FLAG
    assert one["lie once"]
    assert eight["lie once"]


if __name__ == "__main__":
    assert jax.device_count() == 8
    print(json.dumps({name: outcome(name) for name in MESHES}))
