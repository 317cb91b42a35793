"""`python -m fopd_jax.compile_for --config=configs/sd35m_opd.py --topology=v6e:16x16 [--per-chip-batch=N] [--search]`.

Compiles what a config's update consists of (and what runs beside it: resident text encoders) with the machine's own
compiler, for a TPU slice (extra `tpu-aot`) or GPUs (`h100:8`, or `h200:4x8`: four nodes; extra `gpu-aot`) that need not
be there, or for simulated devices (`cpu:8`), and reports:
compile time, memory a chip against its capacity, collectives and whether they stand inside loops, analytic FLOPs, and
the time that they take at the very least. Flow-GRPO's program is called several times a step, to draw and to train:
its FLOPs are a step's, and each call's beside them.
Of GPUs it also says what the program consists of: which kernels, how many bytes and FLOPs, which library calls.
No weights and no prompts are read. `--estimate` adds what the TPU compiler says that the update takes, by phase and
kind of operation: an estimate without waits for DMA, not a time (fopd_jax/performance/estimate.py). `--search` also
finds the largest batch that fits; `--json=FILE` writes the figures.

Any field of the config can be set, so also the mesh: `--config.run.mesh.data=8 --config.run.mesh.fsdp=32`.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

import contextlib
import sys
from pathlib import Path

import jax
from absl import app, flags
from jax.sharding import Mesh

from fopd_jax.config.flags import parse_flags, read_config
from fopd_jax.config.identity import config_hash
from fopd_jax.config.schema import OPD, Config
from fopd_jax.config.variants import with_batch, with_teachers
from fopd_jax.exits import RETRY, explained, leave
from fopd_jax.files import local_file, write_json
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import batch_ways
from fopd_jax.performance.compilation import Compilation, compile_program
from fopd_jax.performance.estimate import check_estimated, describe_estimate, estimate, keeping_schedules
from fopd_jax.performance.flops import Update
from fopd_jax.performance.gpu_kernels import kernels
from fopd_jax.performance.gpu_report import describe_gpu, gpu_fields
from fopd_jax.performance.hlo import collectives
from fopd_jax.performance.host import versions
from fopd_jax.performance.program import Program
from fopd_jax.performance.report import (
    PACKAGES,
    Fields,
    collective_fields,
    describe,
    flops_fields,
    loop_reductions,
    memory_fields,
    roofline,
)
from fopd_jax.performance.search import Trial, largest_fitting
from fopd_jax.performance.topology import Chip, Topology, configure, parse_topology, topology_devices
from fopd_jax.stages.registry import find_stage

_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:16x16, v5p:4x4x4, v6e:16x16, …; h100:8, h200:4x8; or cpu:N.")
_BATCH = flags.DEFINE_integer(
    "per-chip-batch", None, "Images a chip (chips along `tensor` share them); default config.batch_size.", lower_bound=1
)
_TEACHERS = flags.DEFINE_integer("teachers", None, "Routed teachers, more than the config's tasks.", lower_bound=1)
_SEARCH = flags.DEFINE_bool("search", False, "Find the largest batch a chip that fits, from the given one.")
_ESTIMATE = flags.DEFINE_bool("estimate", False, "Add the TPU compiler's estimate of cycles; no time is measured.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")


def main(_: list[str]) -> None:
    with explained():
        out = None if _JSON.value is None else local_file("json", _JSON.value)
        jax.config.update("jax_enable_compilation_cache", False)  # what is read from one takes no time to compile
        asked = {"search": _SEARCH.value, "estimated": _ESTIMATE.value}
        fields = run(read_config(), _TOPOLOGY.value or "", _BATCH.value, _TEACHERS.value, **asked)
        if out is not None:
            write_json(out, fields)
    print(describe(fields))
    if "estimate" in fields:
        print(f"\n{describe_estimate(fields['estimate'])}")
    if "gpu" in fields:
        print(f"\n{describe_gpu(fields['gpu'])}")
    if not fields["memory"]["fits"]:
        leave("error: the update does not fit into the chips' memory", RETRY)


def run(
    config: Config,
    name: str,
    per_chip: int | None = None,
    teachers: int | None = None,
    *,
    search: bool = False,
    estimated: bool = False,
) -> Fields:
    """Compile for the topology `name` and measure; with `search` the largest batch that fits, from `per_chip` on.

    `estimated`: with the TPU compiler's estimate of cycles, which this process must not have loaded yet.

    Raises:
      ValueError: names the flag or field that is wrong, or says what is missing.
    """
    topology = parse_topology(name)
    if search and topology.chip is None:
        raise ValueError(f"search: {name} has no memory limit to search for")
    config = config if teachers is None else _with_teachers(config, teachers)
    if estimated:
        check_estimated(topology)
    with keeping_schedules() if estimated else contextlib.nullcontext() as dumps:
        configure(topology)
        mesh = make_mesh(config.run.mesh, topology_devices(topology))
        start = per_chip or _per_chip(config, mesh)
        if search and topology.chip is not None:
            return _search(config, topology, mesh, start, topology.chip, dumps)
        return measure(config, topology, mesh, start, dumps)


def _with_teachers(config: Config, count: int) -> OPD:
    if not isinstance(config, OPD):
        raise ValueError(f"teachers: found {count}, but stage {config.stage!r} has none")
    return with_teachers(config, count)


def _search(config: Config, topology: Topology, mesh: Mesh, start: int, chip: Chip, dumps: Path | None) -> Fields:
    """The figures of the largest batch that fits (or of the first one, if none does), and all trials."""
    found: dict[int, Fields] = {}

    def attempt(per_chip: int) -> Trial:
        found[per_chip] = measure(config, topology, mesh, per_chip, dumps)
        memory = found[per_chip]["memory"]
        print(f"{per_chip} images a chip: {memory['total_bytes']:,} bytes", file=sys.stderr, flush=True)
        return memory["fits"], memory["total_bytes"]

    largest, trials = largest_fitting(attempt, start, chip.hbm)
    tried = [{"per_chip_batch": batch, "fits": fits, "total_bytes": size} for batch, (fits, size) in trials.items()]
    return found[largest or start] | {"search": {"largest": largest, "trials": tried}}


def measure(config: Config, topology: Topology, mesh: Mesh, per_chip: int, dumps: Path | None = None) -> Fields:
    """One compilation at a given batch per chip, with its figures; `dumps`: see `keeping_schedules`."""
    config = with_batch(config, per_chip * batch_ways(mesh))
    update, *others = find_stage(config).programs(config, mesh)
    fields = {
        "config": config.name,
        "config_hash": config_hash(config),
        "topology": topology.name,
        "chips": topology.count,
        "mesh": dict(mesh.shape),
        "stage": config.stage,
        "teachers": len(config.tasks) if isinstance(config, OPD) else 0,
        "trained": config.trained,
        "reduce_once": list(config.run.reduce_once),
        "batch_size": config.batch_size,
        "per_chip_batch": per_chip,
        "versions": versions(PACKAGES),
    }
    fields |= {"program": update.name} | _compile(update, topology, dict(mesh.shape), dumps)
    beside = [{"program": each.name} | _compile(each, topology, dict(mesh.shape), dumps) for each in others]
    return fields | ({"beside": beside} if beside else {})


def _compile(program: Program, topology: Topology, mesh: dict[str, int], dumps: Path | None) -> Fields:
    """One program: time, memory, FLOPs, and what only a compiled one tells."""
    if dumps is not None and program.calls:
        raise ValueError(
            f"estimate: a step calls its program {program.name!r} several times, expected one: stage 'opd'"
        )
    compilation = compile_program(program)
    fields = {
        "lower_seconds": compilation.lower_seconds,
        "compile_seconds": compilation.compile_seconds,
        "memory": memory_fields(compilation, topology.chip),
        "flops_per_chip": flops_fields(program.flops, topology.count),
    }
    if program.networks:
        fields["networks"] = {
            name: {"flops_per_chip": flops / topology.count, "held_bytes": held}
            for name, (flops, held) in program.networks.items()
        }
    if program.calls:
        fields["calls"] = {
            kind: {"count": each.count, "flops_per_chip": flops_fields(each.flops, topology.count)}
            for kind, each in program.calls.items()
        }
    if compilation.fits and dumps is not None:
        share = program.flops * (1 / topology.count)
        fields["estimate"] = estimate(compilation, dumps, share, check_estimated(topology), program.attention)
    if compilation.fits and topology.platform == "gpu" and topology.chip is not None:
        fields["gpu"] = gpu_fields(kernels(compilation.text), topology.chip)
    return fields | (_communication(compilation, program.flops, topology, mesh) if compilation.fits else {})


def _communication(compilation: Compilation, flops: Update, topology: Topology, mesh: dict[str, int]) -> Fields:
    found = collectives(compilation.text)
    repeated = loop_reductions(found, mesh)
    return {
        "collectives": collective_fields(found, mesh),
        "loop_reductions": {
            "count": len(repeated),
            "bytes": sum(each.bytes for each in repeated),
            "operations": sorted({each.op_name for each in repeated}),
        },
        "roofline_seconds": roofline(flops, found, mesh, topology.count, topology.chip) if topology.chip else None,
    }


def _per_chip(config: Config, mesh: Mesh) -> int:
    ways = batch_ways(mesh)
    if config.batch_size % ways:
        raise ValueError(
            f"batch_size: found {config.batch_size}, expected a multiple of {ways} (mesh axes data x fsdp); "
            "set it, or give --per-chip-batch"
        )
    return config.batch_size // ways


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=parse_flags)
