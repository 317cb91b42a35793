"""Mask2Former Swin-S, GenEval's detector: FLOPs, and time or a TPU compiler's estimate, as JSON.

    python benchmarks/detector.py --json OUT [--rows 4] [--size 512] [--dtype float32] [--repeats 5]
    python benchmarks/detector.py --json OUT --topology v6e:2x2

Weights are random. On the devices that are here the whole program is timed, `rows` pictures a device. With `--topology`
its parts are compiled for one chip of that kind, which need not be there (extra `tpu-aot`): the compiler's own estimate
of cycles of each, loops multiplied out. It gives none for gathers, which read rows of 128 lanes out of on-chip memory;
for them stands the static schedule, read once from the compiler's dump for v6e: 450 bundles a loop of 256 rows. Waits
for memory are in neither, so pictures a second are an upper estimate.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fopd_jax.files import write_json
from fopd_jax.models.instances import detect, find_instances, input_size, make_input
from fopd_jax.models.mask2former import MASK2FORMER_SWIN_S, STRIDE, Decoder, Mask2Former
from fopd_jax.models.pixel_decoder import POINTS, PixelDecoder
from fopd_jax.models.swin import Swin
from fopd_jax.parallel.parts import in_parts, own_mesh
from fopd_jax.parallel.sharding import batch_ways, replicated
from fopd_jax.performance.hlo import estimated_cycles
from fopd_jax.performance.topology import CHIPS, configure, parse_topology, topology_devices

CONFIG = MASK2FORMER_SWIN_S
PEAK_PER_CYCLE = {"v5e": 131072, "v5p": 262144, "v6e": 524288}  # FLOP; with the peak a second, the clock
CYCLES_A_ROW = 450 / 256
PRECISION = "high"  # the detector's own
Fields = dict[str, Any]


def product_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products and convolutions, loops multiplied out."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += (
                2
                * equation.outvars[0].aval.size
                * int(np.prod([equation.invars[0].aval.shape[axis] for axis in contracted]))
            )
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval, equation.params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[numbers.rhs_spec[0]]
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns")]
        trips = equation.params.get("length", 1) if name == "scan" else 1
        total += trips * sum(product_flops(getattr(each, "jaxpr", each)) for each in inner)
    return total


def parts(rows: int, size: int, dtype: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The program cut in four: functions, and their arguments as shapes."""
    images = jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8)
    pixels = jax.eval_shape(make_input, images)
    swin, pixel_decoder = Swin(CONFIG.backbone, dtype), PixelDecoder(CONFIG.pixel_decoder, dtype)
    decoder = Decoder(CONFIG.decoder, dtype)
    cast = functools.partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype))

    def variables(network: nn.Module, *inputs: Any) -> Any:
        return nn.unbox(jax.eval_shape(network.init, jax.random.key(0), *inputs))

    pixels = cast(pixels)
    backbone = variables(swin, pixels)
    maps: Any = jax.eval_shape(swin.apply, backbone, pixels)
    pixel_weights = variables(pixel_decoder, maps)
    levels: Any = jax.eval_shape(pixel_decoder.apply, pixel_weights, maps)

    def instances(weights: Any, mask_map: Any, levels: Any) -> Any:
        made: Any = decoder.apply(weights, mask_map, levels)
        classes, masks = made
        return find_instances(classes, masks, input_size(size, size), (size, size))

    return {
        "input": (make_input, (images,)),
        "backbone": (swin.apply, (backbone, pixels)),
        "pixel decoder": (pixel_decoder.apply, (pixel_weights, maps)),
        "decoder and instances": (instances, (variables(decoder, *levels), *levels)),
    }


def gathered_rows(rows: int, size: int) -> int:
    """Rows that deformable attention reads in all."""
    side = -(-input_size(size, size)[0] // STRIDE) * STRIDE
    positions = sum((side // stride) ** 2 for stride in (8, 16, 32))
    config = CONFIG.pixel_decoder
    return rows * positions * config.num_heads * 3 * POINTS * config.depth


def estimate(arguments: argparse.Namespace, report: Fields) -> None:
    """Cycles of the parts on one chip that is not here, written as they come."""
    topology = parse_topology(arguments.topology)
    configure(topology)
    place, kind = jax.sharding.SingleDeviceSharding(topology_devices(topology)[0]), topology.name.partition(":")[0]
    rows = arguments.rows
    for name, (function, inputs) in parts(rows, arguments.size, jnp.dtype(arguments.dtype)).items():
        placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), inputs)
        began = time.perf_counter()
        with jax.default_matmul_precision(PRECISION):
            compiled: Any = jax.jit(function).lower(*placed).compile()
        fields = {
            "cycles": estimated_cycles(compiled.as_text()),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "compile_seconds": round(time.perf_counter() - began),
        }
        report["parts"][name] |= fields
        print(json.dumps({name: report["parts"][name]}), flush=True)
        write_json(arguments.json, report)
    clock = CHIPS[kind].peak_flops / PEAK_PER_CYCLE[kind]
    gathers = CYCLES_A_ROW * gathered_rows(rows, arguments.size)
    cycles = sum(part["cycles"] for part in report["parts"].values()) + gathers
    report |= {"gather_cycles": round(gathers), "cycles": round(cycles), "clock_hz": clock}
    report["images_per_second_and_chip"] = round(rows * clock / cycles, 1)


def measure(arguments: argparse.Namespace, report: Fields) -> None:
    """Time of whole batches on the devices that are here, one that is not counted first."""
    mesh, network = own_mesh(), Mask2Former(CONFIG, jnp.dtype(arguments.dtype))
    made: Any = nn.unbox(network.init(jax.random.key(0), jnp.zeros((1, STRIDE, STRIDE, 3))))
    params = jax.device_put(made["params"], replicated(mesh))
    rows = arguments.rows * batch_ways(mesh)
    images = np.random.default_rng(0).integers(0, 256, (rows, arguments.size, arguments.size, 3), dtype=np.uint8)
    program, seconds = functools.partial(jax.jit(functools.partial(detect, network)), params), []
    with jax.default_matmul_precision(PRECISION):
        for _ in range(arguments.repeats + 1):
            began = time.perf_counter()
            in_parts(program, images, mesh, rows)
            seconds.append(time.perf_counter() - began)
    report |= {"devices": jax.device_count(), "device": jax.devices()[0].device_kind, "first_seconds": seconds[0]}
    report["images_per_second"] = round(rows / statistics.median(seconds[1:]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4, help="pictures a device")
    parser.add_argument("--size", type=int, default=512, help="their sides in pixels")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--topology", help="compile for one chip of it")
    arguments = parser.parse_args()
    if arguments.topology:
        configure(parse_topology(arguments.topology))
    report: Fields = {"jax": jax.__version__, "precision": PRECISION, "parts": {}}
    report |= {name: getattr(arguments, name) for name in ("topology", "rows", "size", "dtype")}
    for name, (function, inputs) in parts(arguments.rows, arguments.size, jnp.dtype(arguments.dtype)).items():
        report["parts"][name] = {"product_flops": product_flops(jax.make_jaxpr(function)(*inputs).jaxpr)}
    (estimate if arguments.topology else measure)(arguments, report)
    write_json(arguments.json, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
