"""Kernels and layouts side by side at SD3.5-Medium's widths, as JSON: parity, time and memory of every variant.

    python benchmarks/kernels.py --json OUT [--cases attention,qkv] [--rows 8] [--repeats 10] [--dtype bfloat16]
    python benchmarks/kernels.py --json OUT --topology v6e:2x2

- `attention`: each implementation that can run, forward and backward, image alone and with text at 512 px, and 1024 px.
- `lora`: one routed projection: nothing, one adapter for all, gathered per sample, masked over all ranks, grouped.
- `qkv`: three projections as three matrix products, as one of a stored matrix, as one of a matrix joined on the way.
- `adaln`: the modulation of all blocks, to be set against a whole forward.
- `forward`: a shallow network with no adapter, with one for all, with each sample's own out of a bank.
- `remat`: gradient of a shallow network's adapter under each rematerialisation policy.

Errors are relative to the first variant in float32. With `--topology` everything is compiled for one chip of that kind,
which need not be there: no times, but memory and the compiler's own estimate of cycles, custom kernels left out.
"""

import argparse
import dataclasses
import functools
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fopd_jax.adapters.lora import init_adapter
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import REMATS, LoRAConfig
from fopd_jax.files import write_json
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.attention import AttentionImpl, attention, resolve_attention
from fopd_jax.models.dense import routed_product
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.performance.topology import configure, parse_topology, topology_devices
from fopd_jax.policy.velocity import make_velocity

NETWORK = PRESETS["sd35_medium"]
WIDTH, IMAGE, TEXT = NETWORK.width, 1024, 205
SHALLOW = dataclasses.replace(NETWORK, depth=7, dual_layers=3)  # stacks long enough to be loops, as the true ones
TEACHERS, RANK = 5, 32
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Variants of one computation on the same inputs, given as shapes; the first one is the reference."""

    name: str
    variants: dict[str, Callable[..., Any]]
    inputs: tuple[Any, ...]
    check: bool = True


@dataclasses.dataclass(frozen=True)
class Setting:
    """Samples in a batch, dtype of computation, platform, and the device to compile for where it is not there."""

    rows: int
    dtype: Any
    platform: str
    device: Any = None

    def shape(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self.dtype)


# ---- cases


def attention_cases(setting: Setting) -> Iterator[Case]:
    """Forward alone, and with its gradients."""
    for name, length in (("image", IMAGE), ("joint", IMAGE + TEXT), ("joint 1024 px", 4 * IMAGE + 333)):
        shape = setting.shape(setting.rows, length, NETWORK.num_heads, NETWORK.head_dim)
        impls = [impl for impl in get_args(AttentionImpl) if _runs(impl, setting)]
        impls.sort(key="xla".__ne__)  # the reference leads
        forward = {impl: functools.partial(attention, impl=impl) for impl in impls}
        yield Case(f"attention/{name}/forward", forward, (shape,) * 3)
        yield Case(f"attention/{name}/both", {k: _both(f) for k, f in forward.items()}, (shape,) * 4)


def _runs(impl: str, setting: Setting) -> bool:
    try:
        resolve_attention(impl, setting.dtype, NETWORK.head_dim, setting.platform)
    except ValueError:
        return False
    return True


def _both(function: Callable[..., Any]) -> Callable[..., Any]:
    """Output and the gradients of all inputs for a cotangent, the last argument."""

    def both(*arguments: Any) -> Any:
        *inputs, cotangent = arguments
        out, pull = jax.vjp(function, *inputs)
        return out, pull(cotangent)

    return both


def lora_cases(setting: Setting) -> Iterator[Case]:
    """One projection of the image's tokens; samples come sorted by task, as grouped products want them."""
    route = jnp.arange(setting.rows) * TEACHERS // setting.rows
    x, kernel = setting.shape(setting.rows, IMAGE, WIDTH), setting.shape(WIDTH, WIDTH)
    a, b = setting.shape(TEACHERS, WIDTH, RANK), setting.shape(TEACHERS, RANK, WIDTH)

    def gathered(x: Any, a: Any, b: Any) -> Any:
        return routed_product(routed_product(x, a, route), b, route)

    def projection(update: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, kernel, a, b: x @ kernel + update(x, a, b)

    def grouped(x: Any, a: Any, b: Any) -> Any:
        sizes = jnp.bincount(route, length=TEACHERS).astype(jnp.int32) * x.shape[1]
        return jax.lax.ragged_dot(jax.lax.ragged_dot(x.reshape(-1, WIDTH), a, sizes), b, sizes).reshape(x.shape)

    def masked(x: Any, a: Any, b: Any) -> Any:
        mine = jnp.repeat(jax.nn.one_hot(route, TEACHERS, dtype=x.dtype), RANK, axis=1)
        hidden = x @ a.transpose(1, 0, 2).reshape(WIDTH, -1)
        return (hidden * mine[:, None]) @ b.reshape(-1, WIDTH)

    routed = {
        "gathered": projection(gathered),
        "masked": projection(masked),
        "grouped": projection(grouped),
    }
    yield Case("lora/routed", routed, (x, kernel, a, b))
    shared = {
        "none": lambda x, kernel, a, b: x @ kernel,
        "one adapter": projection(lambda x, a, b: (x @ a[0]) @ b[0]),
        "merged": lambda x, kernel, a, b: x @ (kernel + a[0] @ b[0]),
    }
    yield Case("lora/shared", shared, (x, kernel, a, b), check=False)


def qkv_cases(setting: Setting) -> Iterator[Case]:
    """Queries, keys and values of the image's tokens."""
    x, kernel = setting.shape(setting.rows, IMAGE, WIDTH), setting.shape(WIDTH, WIDTH)

    def separate(x: Any, q: Any, k: Any, v: Any) -> Any:
        return x @ q, x @ k, x @ v

    def joined(x: Any, q: Any, k: Any, v: Any) -> Any:
        return tuple(jnp.split(x @ jnp.concatenate([q, k, v], axis=1), 3, axis=-1))

    def stored(x: Any, kernel: Any) -> Any:
        return tuple(jnp.split(x @ kernel, 3, axis=-1))

    yield Case("qkv", {"separate": separate, "joined": joined}, (x, kernel, kernel, kernel))
    yield Case("qkv/stored", {"stored": stored}, (x, setting.shape(WIDTH, 3 * WIDTH)))


def adaln_cases(setting: Setting) -> Iterator[Case]:
    """All blocks' modulations of one forward: chunks of both streams, as one matrix of each layer."""
    dual, plain = NETWORK.dual_layers, NETWORK.depth - 1 - NETWORK.dual_layers
    chunks = dual * (9 + 6) + plain * (6 + 6) + (6 + 2) + 2

    def modulations(embedding: Any, kernels: Any) -> Any:
        return jax.lax.map(lambda kernel: nn.silu(embedding) @ kernel, kernels)

    kernels = setting.shape(chunks, WIDTH, WIDTH)
    yield Case("adaln", {"all blocks": modulations}, (setting.shape(setting.rows, WIDTH), kernels))


@dataclasses.dataclass(frozen=True)
class Shallow:
    """A network of three blocks of each stack and the last one, with its inputs as shapes."""

    impl: AttentionImpl
    adapter: Any
    frozen: Any
    x: Any
    conditioning: Conditioning
    dtype: Any

    def velocity(self, remat: str = "none") -> Callable[..., Any]:
        return make_velocity(MMDiT(SHALLOW, self.impl, self.dtype, remat=remat))


def make_shallow(setting: Setting) -> Shallow:
    latent = (64, 64, SHALLOW.channels)
    variables = nn.unbox(boxed_variables(MMDiT(SHALLOW), latent))
    params = jax.tree.map(lambda leaf: setting.shape(*leaf.shape), variables["params"])
    adapter = jax.eval_shape(lambda: init_adapter(jax.random.key(0), params, LoRAConfig(RANK, 64.0), TARGETS).weights)
    return Shallow(
        impl=resolve_attention("auto", setting.dtype, SHALLOW.head_dim, setting.platform),
        adapter=adapter,
        frozen={"params": params, "constants": variables["constants"]},
        x=jax.ShapeDtypeStruct((setting.rows, *latent), jnp.float32),
        conditioning=Conditioning(
            setting.shape(setting.rows, TEXT, SHALLOW.context_dim), setting.shape(setting.rows, SHALLOW.pooled_dim)
        ),
        dtype=setting.dtype,
    )


def forward_cases(setting: Setting) -> Iterator[Case]:
    """What an adapter adds to a forward: none, one for all samples, each sample's own out of a bank."""
    network = make_shallow(setting)
    velocity, level = network.velocity(), jnp.float32(0.5)
    route = jnp.arange(setting.rows) * TEACHERS // setting.rows
    bank = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*leaf.shape[:-2], TEACHERS, *leaf.shape[-2:]), setting.dtype),
        network.adapter,
    )
    first = functools.partial(jax.tree.map, lambda leaf: leaf[..., 0, :, :])
    variants = {
        "none": lambda bank, frozen, x, text: velocity(frozen, {}, x, level, text),
        "one adapter": lambda bank, frozen, x, text: velocity(frozen, first(bank), x, level, text),
        "routed": lambda bank, frozen, x, text: velocity(frozen, bank, x, level, text, route),
    }
    yield Case(f"forward/{network.impl}", variants, (bank, network.frozen, network.x, network.conditioning), False)


def remat_cases(setting: Setting) -> Iterator[Case]:
    """The memory of a deeper network grows with its blocks."""
    network = make_shallow(setting)

    def gradient(policy: str) -> Callable[..., Any]:
        velocity = network.velocity(policy)

        def loss(weights: Any, frozen: Any, x: Any, conditioning: Any) -> Any:
            return jnp.square(velocity(frozen, weights, x, jnp.float32(0.5), conditioning)).mean()

        return jax.value_and_grad(loss)

    variants = {policy: gradient(policy) for policy in REMATS}
    inputs = (network.adapter, network.frozen, network.x, network.conditioning)
    yield Case(f"remat/{network.impl}", variants, inputs)


CASES = {
    "attention": attention_cases,
    "lora": lora_cases,
    "qkv": qkv_cases,
    "adaln": adaln_cases,
    "forward": forward_cases,
    "remat": remat_cases,
}


# ---- measuring


def draw(shapes: Any) -> Any:
    """Random arrays of given shapes, scaled so that a product with them neither grows nor vanishes."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [
        (jax.random.normal(key, leaf.shape) * (leaf.shape[-2] ** -0.5 if leaf.shape[-2:] == (WIDTH, WIDTH) else 1.0))
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, [a.astype(leaf.dtype) for a, leaf in zip(arrays, leaves, strict=True)])


def compile_fields(compiled: Any) -> Fields:
    """Memory, and on a TPU the estimated cycles of all that is no custom kernel."""
    cycles = [int(found) for found in CYCLES.findall(compiled.as_text())]
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {"temporary_bytes": temporaries} | ({"estimated_cycles": sum(cycles)} if cycles else {})


def time_fields(compiled: Any, inputs: Any, repeats: int) -> Fields:
    """Median and range of single calls, each waited for, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - began)
    return {"median_ms": 1e3 * statistics.median(seconds[1:]), "range_ms": [1e3 * f(seconds[1:]) for f in (min, max)]}


def error(found: Any, expected: Any) -> float:
    """Relative L2 over all outputs."""
    pairs = zip(*([np.asarray(x, np.float64) for x in jax.tree.leaves(t)] for t in (found, expected)), strict=True)
    squares = [(np.square(a - b).sum(), np.square(b).sum()) for a, b in pairs]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


def measure(case: Case, setting: Setting, repeats: int) -> Fields:
    """All variants of a case."""
    if setting.device is not None:
        place = jax.sharding.SingleDeviceSharding(setting.device)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), case.inputs)
        return {
            name: compile_fields(jax.jit(variant).lower(*shapes).compile()) for name, variant in case.variants.items()
        }
    inputs, results = draw(case.inputs), {}
    exact = None
    if case.check:
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), inputs)
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(next(iter(case.variants.values())))(*wide)
    for name, variant in case.variants.items():
        compiled = jax.jit(variant).lower(*inputs).compile()
        results[name] = compile_fields(compiled) | time_fields(compiled, inputs, repeats)
        if exact is not None:
            results[name]["error"] = error(compiled(*inputs), exact)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated names")
    parser.add_argument("--rows", type=int, default=8, help="samples in a batch")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--topology", help="compile for one chip of it")
    arguments = parser.parse_args()
    device = None
    if arguments.topology:
        topology = parse_topology(arguments.topology)
        configure(topology)
        device = topology_devices(topology)[0]
    platform = device.platform if device else jax.default_backend()
    setting = Setting(arguments.rows, jnp.dtype(arguments.dtype), platform, device)
    kind = arguments.topology or jax.devices()[0].device_kind
    report: Fields = {"device": kind, "jax": jax.__version__, "rows": setting.rows, "dtype": arguments.dtype}
    for name in arguments.cases.split(","):
        for case in CASES[name](setting):
            report[case.name] = measure(case, setting, arguments.repeats)
            print(json.dumps({case.name: report[case.name]}), flush=True)
            write_json(arguments.json, report)


if __name__ == "__main__":
    main()
