"""What decoding costs, and what decoding in bfloat16 changes: pixels, and every reward that is asked about, as JSON.

    python benchmarks/decoding.py --json OUT --model CONVERTED [--images FOLDER] [--size 512] [--batch-size 4]
        [--reward jpeg_compressibility --reward ocr --reward pickscore=WEIGHTS …]
    python benchmarks/decoding.py --json OUT --cost 1,4,8 [--size 512] [--rows 8] [--topology v6e:2x2]

Pictures go through the autoencoder of a converted folder and back: drawn signs and scenes of this project's, whose
prompts are known, photographs of scikit-image where it is there, and those of a folder. Of each reward: its values in
float32, by how much bfloat16 moves them, and that beside their deviation over the pictures. Random weights (`--model
random`) try the program alone: their pictures show nothing.

With `--cost`, of the published autoencoder's shape, for each number of images at once: seconds an image on the devices
that are here and temporary memory, or with `--topology` what the compiler for one such chip says, which need not be
here (extra `tpu-aot`).
"""

import argparse
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jaxtyping import Float, UInt8
from PIL import Image

from fopd_jax.config.learning import Decoding
from fopd_jax.config.schema import RewardConfig
from fopd_jax.files import write_json
from fopd_jax.interop.files.converted import load_sharded, read_manifest
from fopd_jax.models.autoencoder import SD3_VAE, Autoencoder, AutoencoderConfig
from fopd_jax.parallel.mesh import AXES
from fopd_jax.parallel.parts import in_parts, own_mesh
from fopd_jax.performance.hlo import estimated_cycles
from fopd_jax.performance.topology import configure, parse_topology, topology_devices
from fopd_jax.rewards import cases, specimens
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.rewards.registry import close_all, make_rewards
from fopd_jax.rewards.reward import Metadata, Reward
from fopd_jax.worlds.decoder import autoencoder_decoder

RANDOM = "random"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "retina", "rocket")
ALONE = AbstractMesh((1, 1, 1), AXES)
"""Of one device, which need not be here."""
DTYPES = ("float32", "bfloat16")
Fields = dict[str, Any]


class Picture(NamedTuple):
    """A picture and the prompt that it is scored for; `source` says where it is from."""

    source: str
    pixels: UInt8[np.ndarray, "size size 3"]
    prompt: str
    metadata: Metadata


# ---- pictures


def square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The middle of a picture, resized."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(cut.resize((size, size), Image.Resampling.LANCZOS))


def pictures(size: int, folder: Path | None) -> Iterator[Picture]:
    """All that there are: with their own prompts where those are known."""
    for case in (*cases.texts(), *cases.objects()):
        yield Picture("drawn", square(Image.fromarray(case.better), size), case.prompt, case.metadata)
    landscape = square(Image.fromarray(specimens.landscape()), size)
    yield Picture("drawn", landscape, "mountains behind a meadow", {})
    if importlib.util.find_spec("skimage"):
        from skimage import data

        for name in PHOTOGRAPHS:
            yield Picture("photograph", square(Image.fromarray(getattr(data, name)()), size), f"a photo of {name}", {})
    for path in sorted(folder.iterdir()) if folder else ():
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            yield Picture("folder", square(Image.open(path), size), path.stem.replace("_", " "), {})


# ---- what bfloat16 changes


def load(model: str) -> tuple[AutoencoderConfig, Any]:
    """An autoencoder's shape and its parameters on this process's devices."""
    config = SD3_VAE if model == RANDOM else read_manifest(Path(model)).component("vae").config
    side = config.downsampling
    start = functools.partial(Autoencoder(config).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    if model == RANDOM:
        return config, nn.unbox(jax.jit(start)())["params"]
    return config, load_sharded(Path(model), "vae", jax.eval_shape(start)["params"], jnp.float32, own_mesh())


def reconstruct(model: str, images: UInt8[np.ndarray, "n h w 3"], batch_size: int) -> dict[str, np.ndarray]:
    """The pictures encoded in float32 and decoded in each dtype, as floats in about [-1, 1]."""
    (config, params), mesh = load(model), own_mesh()

    def encode(params: Any, rows: Any) -> Any:
        return Autoencoder(config).apply({"params": params}, rows, method="encode")[0]

    unit = images.astype(np.float32) / 127.5 - 1
    latents = in_parts(functools.partial(jax.jit(encode), params), unit, mesh)
    decoder, decoded = autoencoder_decoder(config, lambda: params), {}
    for dtype in DTYPES:
        decode = functools.partial(jax.jit(decoder.make(Decoding(batch_size, dtype), mesh)), decoder.params())
        decoded[dtype] = in_parts(decode, latents, mesh, batch_size)
    return decoded


def pixel_changes(images: UInt8[np.ndarray, "n h w 3"], decoded: Mapping[str, Float[np.ndarray, "n h w 3"]]) -> Fields:
    """How near the pictures come back, and by how much the dtypes differ, in levels of 255."""
    exact, rough = (to_pixels(decoded[dtype]).astype(int) for dtype in DTYPES)
    error, change = np.square(exact - images).mean(), np.abs(decoded["bfloat16"] - decoded["float32"]) * 127.5
    return {
        "psnr_of_float32": round(float(10 * np.log10(255**2 / max(error, 1e-9))), 2),
        "mean_levels": float(change.mean()),
        "largest_levels": float(change.max()),
        "bytes_that_differ": float((exact != rough).mean()),
        "bytes_that_differ_by_more_than_1": float((np.abs(exact - rough) > 1).mean()),
    }


def reward_changes(reward: Reward, shown: Sequence[Picture], decoded: Mapping[str, np.ndarray]) -> Fields:
    """One reward of both, over the pictures that neither fails."""
    texts, beside = [each.prompt for each in shown], [each.metadata for each in shown]
    exact, rough = (reward.score(to_pixels(decoded[dtype]), texts, beside).values for dtype in DTYPES)
    whole = np.isfinite(exact) & np.isfinite(rough)
    if not whole.any():
        return {"pictures": 0}
    change, deviation = (rough - exact)[whole], float(exact[whole].std())
    return {
        "pictures": int(whole.sum()),
        "mean_in_float32": float(exact[whole].mean()),
        "deviation_in_float32": deviation,
        "mean_change": float(change.mean()),
        "mean_absolute_change": float(np.abs(change).mean()),
        "largest_change": float(np.abs(change).max()),
        "absolute_change_over_deviation": float(np.abs(change).mean() / deviation) if deviation else None,
    }


def compare(arguments: argparse.Namespace, report: Fields) -> None:
    """Both dtypes on all pictures."""
    shown = list(pictures(arguments.size, arguments.images))
    images = np.stack([each.pixels for each in shown])
    decoded = reconstruct(arguments.model, images, arguments.batch_size)
    sources = sorted({each.source for each in shown})
    report["pictures"] = {source: sum(each.source == source for each in shown) for source in sources}
    for source in sources:
        own = [i for i, each in enumerate(shown) if each.source == source]
        report["pixels"][source] = pixel_changes(images[own], {dtype: decoded[dtype][own] for dtype in DTYPES})
    named = dict(each.partition("=")[::2] for each in arguments.reward)
    rewards = make_rewards(named, {name: RewardConfig(weights=file) for name, file in named.items()}, {}, {})
    try:
        report["rewards"] = {name: reward_changes(reward, shown, decoded) for name, reward in rewards.items()}
    finally:
        close_all(rewards)


# ---- what it costs


def costs(arguments: argparse.Namespace, report: Fields) -> None:
    """Each number of images at once and each dtype, written as they come."""
    decoder, side = autoencoder_decoder(SD3_VAE, dict), arguments.size // SD3_VAE.downsampling
    device = topology_devices(parse_topology(arguments.topology))[0] if arguments.topology else jax.local_devices()[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def placed(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    shapes = jax.tree.map(placed, decoder.shapes())
    latents = placed(jax.ShapeDtypeStruct((arguments.rows, side, side, SD3_VAE.latent_channels), jnp.float32))
    for dtype in DTYPES:
        for size in (int(each) for each in arguments.cost.split(",")):
            began = time.perf_counter()
            compiled: Any = jax.jit(decoder.make(Decoding(size, dtype), ALONE)).lower(shapes, latents).compile()
            fields: Fields = {"compile_seconds": round(time.perf_counter() - began)}
            fields["temporary_mb"] = round(compiled.memory_analysis().temp_size_in_bytes / 1e6)
            fields |= _cycles(compiled, arguments.rows) if arguments.topology else _seconds(compiled, shapes, latents)
            report["cost"][f"{dtype}, {size} at once"] = fields
            print(json.dumps({f"{dtype}, {size} at once": fields}), flush=True)
            write_json(arguments.json, report)


def _cycles(compiled: Any, rows: int) -> Fields:
    return {"cycles_an_image": round(estimated_cycles(compiled.as_text()) / rows)}


def _seconds(compiled: Any, shapes: Any, latents: Any) -> Fields:
    """The median of three runs, one that is not counted first."""
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)
    rows, seconds = jax.random.normal(jax.random.key(0), latents.shape), []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(compiled(params, rows))
        seconds.append(time.perf_counter() - began)
    return {"seconds_an_image": round(statistics.median(seconds[1:]) / len(rows), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default=RANDOM, help="a converted folder, or random")
    parser.add_argument("--images", type=Path, help="a folder of pictures of one's own")
    parser.add_argument("--size", type=int, default=512, help="sides of the pictures in pixels")
    parser.add_argument("--batch-size", type=int, default=1, help="decoded at once")
    parser.add_argument("--reward", action="append", default=[], help="NAME or NAME=WEIGHTS; may be repeated")
    parser.add_argument("--cost", help="numbers of images at once, comma-separated")
    parser.add_argument("--rows", type=int, default=8, help="images in all, with --cost")
    parser.add_argument("--topology", help="with --cost: compile for one chip of it")
    arguments = parser.parse_args()
    if arguments.topology:
        configure(parse_topology(arguments.topology))
    report: Fields = {"jax": jax.__version__, "size": arguments.size}
    if arguments.cost:
        report |= {"rows": arguments.rows, "topology": arguments.topology, "cost": {}}
        costs(arguments, report)
    else:
        report |= {"model": arguments.model, "batch_size": arguments.batch_size, "pixels": {}, "rewards": {}}
        report["device"] = jax.devices()[0].device_kind
        compare(arguments, report)
    write_json(arguments.json, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
