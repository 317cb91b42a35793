"""Decoding, scoring and advantages on eight simulated devices: what one computes, and each device its own rows."""

import functools
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
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import batch_sharding, replicated
from fopd_jax.performance.hlo import collectives
from fopd_jax.rewards.advantages import advantages
from fopd_jax.rewards.traced import place, prepare, score, traced_of
from fopd_jax.worlds.decoder import autoencoder_decoder
from fopd_jax.worlds.miniature.rewards import make_rewards
from tests.quick import environment

VAE = AutoencoderConfig((4, 8), 1, 4, 3, 2, 1.5, 0.1)
COUNT = 24
PROMPTS = ["two red squares and one blue circle", "one yellow triangle"] * (COUNT // 2)
MESHES = {"one": MeshShape(1, 1, 1), "data": MeshShape(8, 1, 1), "all": MeshShape(2, 2, 2)}
FLAG = 4
"""Bytes of what all devices tell each other while objects are looked for: whether one of them has not done yet."""


def decoded_and_scored(mesh: Mesh) -> dict[str, Any]:
    """Images, their scores, and the size of the largest message between devices for both."""
    latents = np.random.default_rng(0).standard_normal((COUNT, 12, 12, 4), np.float32)
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
    """Advantages of values of which some have failed, in every mode."""
    rng, split = np.random.default_rng(1), batch_sharding(mesh)
    values = np.where(rng.random((2, COUNT)) < 0.1, np.nan, rng.standard_normal((2, COUNT))).astype(np.float32)
    groups = jax.device_put(np.arange(COUNT) % 5, split)
    found = {}
    for mode in ("global", "group", "each"):
        program = jax.jit(functools.partial(advantages, count=5, normalise=mode, mesh=mesh))
        found[mode] = program(jnp.asarray(values), jnp.array([0.5, 1.0]), groups).values.tolist()
    return found


def outcome(name: str) -> dict[str, Any]:
    mesh = make_mesh(MESHES[name], jax.devices()[: 1 if name == "one" else None])
    with jax.set_mesh(mesh):
        return {**decoded_and_scored(mesh), "advantages": compared(mesh)}


def test_eight_devices_compute_what_one_does():
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(8), check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    for name in ("data", "all"):
        for what in ("images", "values"):
            np.testing.assert_allclose(made[name][what], made["one"][what], rtol=0, atol=1e-5)
        assert made[name]["advantages"] == made["one"]["advantages"]  # to the bit
        assert made[name]["message"] <= FLAG
    assert np.ptp(made["one"]["values"][1]) > 1e-3


if __name__ == "__main__":
    assert jax.device_count() == 8
    print(json.dumps({name: outcome(name) for name in MESHES}))
