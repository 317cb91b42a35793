"""The converter at true size: time, memory and exactness on random weights of SD3.5-Medium's shapes.

    python benchmarks/true_size.py --work FOLDER [--components transformer,vae] [--t5-layers 6]

Builds a pipeline in FOLDER (kept, and used again by the next run), converts it, converts it once more (unchanged),
writes the transformer back and compares every tensor, loads it sharded over 8 simulated devices, and compares one
forward at 256 px with diffusers in float32 and bfloat16. Each step is a process of its own, whose peak resident memory
is measured. Needs the `test` extra, 16 GB of memory and 40 GB of disk with T5-XXL. Prints a table and writes
`benchmarks/results/true_size_cpu.json`; exits with 1 if a limit is exceeded.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fopd_jax.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "true_size_cpu.json"
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
PACKAGES = ("jax", "flax", "orbax-checkpoint", "numpy", "torch", "diffusers", "transformers")
DEVICES = 8
GIB = 2**30
LIMITS = {
    "seconds to convert the transformer": 180.0,
    "GiB to convert the transformer": 8.0,
    "relative L2 in float32": 1e-3,
    "relative L2 in bfloat16": 2e-2,
}
Fields = dict[str, Any]


# ---- processes


def measure(work: Path, command: Sequence[str | Path], **environment: str) -> Fields:
    """Run a command to its end: seconds, and its own peak of resident memory. What it prints goes to a log."""
    start = time.perf_counter()
    with (work / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it, too
    if process.returncode:
        sys.exit(f"error: {command[0]} failed with status {process.returncode}; see {work / 'log.txt'}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gib": round(usage.ru_maxrss * 1024 / GIB, 2),
    }


def measure_step(work: Path, name: str, **environment: str) -> Fields:
    """Run one of `STEPS` in a process; its results and what it took."""
    cost = measure(work, [Path(__file__), "--work", work, "--step", name], JAX_PLATFORMS="cpu", **environment)
    return cost | json.loads((work / f"{name}.json").read_text())


def size_of(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / GIB, 2)


# ---- the converter's command line


def build(work: Path, name: str, t5_layers: int) -> Path:
    """A pipeline of one network, unless an earlier run left it."""
    folder = work / "source" / name
    if not folder.is_dir():
        partial = work / "source" / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        options = ["--size", "medium", "--components", name, "--t5-layers", str(t5_layers)]
        measure(work, [ROOT / "tools" / "random_pipeline.py", "--dst", partial, *options])
        partial.rename(folder)
    return folder


def convert(work: Path, name: str, source: Path) -> Fields:
    """Convert one network, and again, which finds it unchanged."""
    arguments = ["--src", source, "--dst", work / "converted"]
    cost = measure(work, [ROOT / "tools" / "convert_sd35_weights.py", *arguments])
    again = measure(work, [ROOT / "tools" / "convert_sd35_weights.py", *arguments])
    manifest = json.loads((work / "converted" / "manifest.json").read_text())["components"][name]
    return cost | {
        "unchanged_seconds": again["seconds"],
        "source_gib": size_of(source / name),
        "parameters": manifest["parameters"],
        "tensors": manifest["tensors"],
        "dtype": manifest["dtype"],
    }


def write_back(work: Path) -> Fields:
    """Write the transformer as a diffusers folder."""
    back = work / "back"
    shutil.rmtree(back, ignore_errors=True)
    arguments = ["--reverse", "--src", work / "converted", "--dst", back]
    cost = measure(work, [ROOT / "tools" / "convert_sd35_weights.py", *arguments])
    return cost | {"equal": measure_step(work, "compare_tensors")["equal"]}


# ---- steps, each in a process of its own


def compare_tensors(work: Path) -> Fields:
    """Every tensor that was written back against the one that it came from, bit by bit."""
    import torch
    from safetensors import safe_open

    files = (work / "source" / "transformer" / "transformer").glob("*.safetensors")
    equal = unequal = 0
    with safe_open(work / "back" / "diffusion_pytorch_model.safetensors", "pt") as back:
        missing = set(back.keys())
        for file in files:
            with safe_open(file, "pt") as source:
                for name in source.keys():  # noqa: SIM118
                    bits, written = (each.get_tensor(name).view(torch.int16) for each in (source, back))
                    same = torch.equal(bits, written)
                    equal, unequal = equal + same, unequal + (not same)
                    missing.discard(name)
    return {"equal": f"{equal} of {equal + unequal + len(missing)}"}


def load_sharded(work: Path) -> Fields:
    """The transformer's parameters, each shard on one of the simulated devices."""
    import jax
    import jax.numpy as jnp

    from fopd_jax.config.schema import MeshShape
    from fopd_jax.interop.files.converted import load_sharded, read_manifest
    from fopd_jax.models.mmdit import MMDiT
    from fopd_jax.parallel.mesh import make_mesh

    c = read_manifest(work / "converted").transformer
    inputs = jnp.zeros((1, 32, 32, c.channels)), jnp.zeros(1), jnp.zeros((1, 1, c.context_dim))
    boxed = jax.eval_shape(MMDiT(c).init, jax.random.key(0), *inputs, jnp.zeros((1, c.pooled_dim)))["params"]
    mesh = make_mesh(MeshShape(data=1, fsdp=DEVICES))
    start = time.perf_counter()
    params = load_sharded(work / "converted", "transformer", boxed, jnp.bfloat16, mesh)
    leaves = jax.tree.leaves(params)
    a_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return {
        "load_seconds": round(time.perf_counter() - start, 1),
        "devices": len(mesh.devices.flat),
        "copy_gib": round(sum(leaf.nbytes for leaf in leaves) / GIB, 2),
        "device_gib": round(a_device / GIB, 2),
    }


def make_inputs(work: Path) -> Fields:
    """256 px, 77 + 128 text tokens; every value is one of bfloat16, so that all sides read the same."""
    import ml_dtypes
    import numpy as np

    random = np.random.default_rng(0)
    shapes = {"latents": (1, 32, 32, 16), "context": (1, 77 + 128, 4096), "pooled": (1, 2048)}
    inputs = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    inputs = {name: each.astype(ml_dtypes.bfloat16).astype(np.float32) for name, each in inputs.items()}
    np.savez(work / "inputs.npz", timestep=np.array([437.5], np.float32), **inputs)
    return {}


def forward_torch(work: Path, dtype: str) -> Fields:
    import numpy as np
    import torch
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    path, inputs = work / "source" / "transformer" / "transformer", np.load(work / "inputs.npz")
    model: Any = SD3Transformer2DModel.from_pretrained(path, torch_dtype=getattr(torch, dtype)).eval()
    latents, context, pooled = (
        torch.tensor(inputs[name]).to(getattr(torch, dtype)) for name in ("latents", "context", "pooled")
    )
    start = time.perf_counter()
    with torch.no_grad():
        v = model(latents.permute(0, 3, 1, 2), context, pooled, torch.tensor(inputs["timestep"])).sample
    np.save(work / f"torch_{dtype}.npy", v.permute(0, 2, 3, 1).float().numpy())
    return {"forward_seconds": round(time.perf_counter() - start, 1)}


def forward_ours(work: Path, dtype: str) -> Fields:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fopd_jax.interop.files.converted import abstract_params, load_params, load_table, read_manifest
    from fopd_jax.models.mmdit import MMDiT

    manifest, inputs = read_manifest(work / "converted"), np.load(work / "inputs.npz")
    component, config = manifest.component("transformer"), manifest.transformer
    rows = inputs["latents"].shape[1] // config.patch_size
    table = load_table(work / "converted", (config.table_size, rows, rows))
    variables = {
        "params": load_params(work / "converted", "transformer", abstract_params(component, jnp.dtype(dtype))),
        "constants": {"pos_embed": jnp.asarray(table.astype(np.float32))},
    }
    arguments = [jnp.asarray(inputs[name]) for name in ("latents", "timestep", "context", "pooled")]
    forward = jax.jit(MMDiT(config, dtype=jnp.dtype(dtype)).apply).lower(variables, *arguments).compile()
    start = time.perf_counter()
    np.save(work / f"ours_{dtype}.npy", np.asarray(forward(variables, *arguments)))
    return {"forward_seconds": round(time.perf_counter() - start, 1)}


def compare_forwards(work: Path) -> Fields:
    """‖a - b‖ / ‖b‖ of the velocities."""
    import numpy as np

    def distance(found: str, right: str) -> float:
        a, b = (np.load(work / f"{name}.npy").astype(np.float64) for name in (found, right))
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        return float(f"{np.linalg.norm(a - b) / np.linalg.norm(b):.2e}")

    return {
        "relative_l2": {
            "float32, ours to diffusers": distance("ours_float32", "torch_float32"),
            "bfloat16, ours to diffusers": distance("ours_bfloat16", "torch_bfloat16"),
            "ours, bfloat16 to diffusers' float32": distance("ours_bfloat16", "torch_float32"),
            "diffusers, bfloat16 to its float32": distance("torch_bfloat16", "torch_float32"),
        }
    }


STEPS: dict[str, Callable[[Path], Fields]] = {
    "compare_tensors": compare_tensors,
    "load_sharded": load_sharded,
    "make_inputs": make_inputs,
    "torch_float32": lambda work: forward_torch(work, "float32"),
    "torch_bfloat16": lambda work: forward_torch(work, "bfloat16"),
    "ours_float32": lambda work: forward_ours(work, "float32"),
    "ours_bfloat16": lambda work: forward_ours(work, "bfloat16"),
    "compare_forwards": compare_forwards,
}


# ---- all of it


def run(work: Path, components: Sequence[str], t5_layers: int) -> Fields:
    shutil.rmtree(work / "converted", ignore_errors=True)
    found: Fields = {"hardware": hardware(), "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    found["components"] = {}
    for name in components:
        print(f"{name}: build, convert", flush=True)
        found["components"][name] = convert(work, name, build(work, name, t5_layers))
    if "transformer" in components:
        print("transformer: write back, load sharded, forward", flush=True)
        found["write_back"] = write_back(work)
        found["sharded_load"] = measure_step(
            work, "load_sharded", XLA_FLAGS=f"--xla_force_host_platform_device_count={DEVICES}"
        )
        measure_step(work, "make_inputs")
        forwards = ("torch_float32", "ours_float32", "torch_bfloat16", "ours_bfloat16")
        found["forward"] = {name: measure_step(work, name) for name in forwards}
        found["forward"] |= {"relative_l2": measure_step(work, "compare_forwards")["relative_l2"]}
    return found


def hardware() -> Fields:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / GIB),
    }


def held(found: Fields) -> Fields:
    """What is limited → found, limit."""
    transformer, distances = found["components"]["transformer"], found["forward"]["relative_l2"]
    values = (
        transformer["seconds"],
        transformer["peak_gib"],
        distances["float32, ours to diffusers"],
        distances["bfloat16, ours to diffusers"],
    )
    return {name: {"found": value, "limit": limit} for value, (name, limit) in zip(values, LIMITS.items(), strict=True)}


def table(found: Fields) -> str:
    lines = ["", f"{'component':16}{'parameters':>12}{'source':>10}{'convert':>10}{'peak':>10}{'unchanged':>11}"]
    lines += [
        f"{name:16}{each['parameters'] / 1e6:>10.1f} M{each['source_gib']:>6.2f} GiB{each['seconds']:>8.1f} s"
        f"{each['peak_gib']:>6.2f} GiB{each['unchanged_seconds']:>9.1f} s"
        for name, each in found["components"].items()
    ]
    if "forward" in found:
        back, load = found["write_back"], found["sharded_load"]
        lines += [
            "",
            f"written back       {back['equal']} tensors equal, {back['seconds']} s, peak {back['peak_gib']} GiB",
            f"loaded sharded     {load['devices']} devices of {load['device_gib']} GiB in {load['load_seconds']} s, "
            f"peak {load['peak_gib']} GiB; one copy is {load['copy_gib']} GiB",
            *(f"relative L2        {value:.1e}  {name}" for name, value in found["forward"]["relative_l2"].items()),
            "",
            *(f"{name}: {each['found']:g} (limit {each['limit']:g})" for name, each in found["limits"].items()),
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--components", default=",".join(COMPONENTS), help="comma-separated; default: all")
    parser.add_argument("--t5-layers", type=int, default=24, help="fewer than 24, where disk or memory is short")
    parser.add_argument("--step", choices=tuple(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work.resolve()
    if args.step:
        (work / f"{args.step}.json").write_text(json.dumps(STEPS[args.step](work)))
        return
    work.mkdir(parents=True, exist_ok=True)
    found = run(work, args.components.split(","), args.t5_layers)
    if "forward" in found:
        found["limits"] = held(found)
    print(table(found))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS, json.dumps(found, indent=2) + "\n")
    if any(each["found"] > each["limit"] for each in found.get("limits", {}).values()):
        sys.exit("error: a limit is exceeded")


if __name__ == "__main__":
    main()
