"""`python -m fopd_jax.benchmark --config=configs/sd35m_opd.py [--batch=16] [--teachers=4] [--phases] [--json=FILE]`.

Times the whole update of a config on random weights, so that nothing has to be downloaded: median and spread of at
least ten steps after a warm-up, each to its end on the device; samples/s, analytic TFLOP/s and MFU against a large
matrix product timed in the same process and against the datasheet; memory, weights held, compile time cold and from
the persistent cache. Any field of the config can be set: `--config.run.attention=cudnn --config.run.remat=dots`.

Of a config of reinforcement learning the rollout and the updates on it are timed apart, without decoding and rewards;
--phases, --sweep, --teachers-sweep and --profile are OPD's.

    --phases           where the time goes, by ablation (fopd_jax/performance/phases.py says how)
    --sweep            then batches doubling from the given one to the first that does not fit
    --teachers-sweep   then the same batch with 1, 2, 4 and 8 teachers
    --profile=FOLDER   a trace of two steps for xprof or TensorBoard, its scopes named as in the code
    --estimate --topology=v6e:2x2    times nothing: what the TPU compiler says that one chip of a slice, which need not
                       be there (extra `tpu-aot`), takes for the update of --batch images; an estimate without waits
                       for DMA, by phase and kind of operation (fopd_jax/performance/estimate.py)
    --forward=base     with it: of one forward of --batch rows instead, under no adapter; =routed: each row under its
                       own of --teachers and an anchor
    --json=FILE        every figure, with device, driver, versions, flags and commit

On 2 CPU cores: `--config=configs/miniature.py`, two minutes.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
from absl import app, flags, logging

from fopd_jax.config.flags import parse_flags, read_config
from fopd_jax.config.learning import Reinforced
from fopd_jax.config.schema import OPD, Config
from fopd_jax.config.variants import with_batch, with_teachers
from fopd_jax.exits import RETRY, explained, leave
from fopd_jax.files import check_writable, local_file, local_path, write_json
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.performance.compilation import compile_program
from fopd_jax.performance.estimate import check_estimated, describe_estimate, estimate, keeping_schedules
from fopd_jax.performance.host import commit, hardware, versions
from fopd_jax.performance.kept_programs import keeping
from fopd_jax.performance.measure import Options, measure
from fopd_jax.performance.problem import Fields
from fopd_jax.performance.report import memory_fields
from fopd_jax.performance.sweeps import sweep_batches, sweep_teachers
from fopd_jax.performance.table import describe, describe_batches, describe_learning, describe_teachers
from fopd_jax.performance.timing import MatmulPeak, matmul_peak
from fopd_jax.performance.topology import configure, parse_topology, topology_devices
from fopd_jax.stages.forward import forward_program
from fopd_jax.stages.problem import make_problem, opd_programs
from fopd_jax.stages.trial import measure_learning

PACKAGES = ("fopd_jax", "jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "jax-cuda13-plugin", "nvidia-cudnn-cu13")
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")

_TEACHERS = flags.DEFINE_integer("teachers", None, "Routed teachers; default: the config's tasks.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", None, "Images an update; default config.batch_size.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 10, "Timed updates.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 2, "Updates before them.", lower_bound=1)
_PHASES = flags.DEFINE_bool("phases", False, "Time the phases, by ablation.")
_SWEEP = flags.DEFINE_bool("sweep", False, "Double the batch until it does not fit.")
_TEACHERS_SWEEP = flags.DEFINE_bool("teachers-sweep", False, "Measure with 1, 2, 4 and 8 teachers.")
_PROFILE = flags.DEFINE_string("profile", "", "Folder for a trace.")
_ESTIMATE = flags.DEFINE_bool("estimate", False, "Time nothing; the TPU compiler's estimate of cycles on --topology.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "With --estimate: v5e:2x2, v5p:2x2x1, v6e:2x2, …")
_FORWARD = flags.DEFINE_enum("forward", None, ["base", "routed"], "With --estimate: of one forward alone.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")


def main(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    with explained():
        out = None if _JSON.value is None else local_file("json", _JSON.value)
        if _PROFILE.value:
            check_writable(local_path("profile", _PROFILE.value), "profile")
        config = _sized(read_config())
        if asked_to_estimate():
            run_estimate(config, out)
            return
        options = Options(_STEPS.value, _WARMUP.value, _PHASES.value, _PROFILE.value)
        with keeping(config.run.compiled):
            fields = run(config, options, out) if isinstance(config, OPD) else run_learning(config, options, out)
    if not fields["update"]["fits"]:
        leave("error: the update does not fit into the device's memory", RETRY)


def run(config: OPD, options: Options, out: Path | None) -> Fields:
    """Measure what the flags ask for, printing and writing as it goes: what ends early leaves what it has in `out`.

    Raises:
      ValueError: names the field that is out of range.
    """
    mesh = make_mesh(config.run.mesh)
    problem = make_problem(config, mesh)
    matmul = matmul_peak(mesh.devices.flat[0])
    fields = circumstances(matmul)
    fields["update"] = update = measure(problem, matmul, options)
    _write(fields, out)
    print(f"{_describe(fields)}\n{describe(update)}", flush=True)
    plain = dataclasses.replace(options, phases=False, profile="")
    if _SWEEP.value and update["fits"]:
        sized = sweep_batches(
            lambda count: make_problem(with_batch(config, count), mesh), config.batch_size, matmul, plain
        )
        rows = itertools.chain([update], sized)
        print(f"\n{describe_batches(_collect(fields, 'batches', rows, out))}", flush=True)
    if _TEACHERS_SWEEP.value:
        rows = sweep_teachers(lambda count: make_problem(with_teachers(config, count), mesh), matmul, plain)
        print(f"\n{describe_teachers(_collect(fields, 'teachers', rows, out))}", flush=True)
    return fields


def asked_to_estimate() -> bool:
    """Whether to estimate.

    Raises:
      ValueError: flags that do not go together; names them.
    """
    timed = {"phases": _PHASES, "sweep": _SWEEP, "teachers-sweep": _TEACHERS_SWEEP, "profile": _PROFILE}
    if _ESTIMATE.value and (given := [name for name, flag in timed.items() if flag.value]):
        raise ValueError(f"estimate: found it with {given[0]}, which times; expected one of them")
    for name, flag in {"topology": _TOPOLOGY, "forward": _FORWARD}.items():
        if flag.value and not _ESTIMATE.value:
            raise ValueError(f"{name}: found {flag.value!r} without --estimate, which it belongs to")
    if _ESTIMATE.value and not _TOPOLOGY.value:
        raise ValueError("estimate: found no --topology, expected one, like --topology=v6e:2x2")
    return _ESTIMATE.value


def run_estimate(config: Config, out: Path | None) -> Fields:
    """Compile for one chip of a topology, and say what its compiler estimates.

    Raises:
      ValueError: names the flag or field that is out of place, or says what is missing.
    """
    if not isinstance(config, OPD):
        raise ValueError(f"estimate: found stage {config.stage!r}, expected 'opd'")
    topology = parse_topology(_TOPOLOGY.value or "")
    chip = check_estimated(topology)
    jax.config.update("jax_enable_compilation_cache", False)  # what is read from one leaves no schedules
    with keeping_schedules() as dumps:
        configure(topology)
        mesh = make_mesh(config.run.mesh, topology_devices(topology)[:1])
        if _FORWARD.value:
            program = forward_program(config, mesh, len(config.tasks) + 1 if _FORWARD.value == "routed" else 0)
        else:
            program, *_ = opd_programs(config, mesh)
        compilation = compile_program(program)
        if not compilation.fits:
            leave(f"error: {program.name} needs {compilation.needed:,} of {chip.hbm:,} bytes a chip", RETRY)
        fields = {
            "config": config.name,
            "topology": topology.name,
            "program": program.name if not _FORWARD.value else f"{program.name}, {_FORWARD.value}",
            "batch_size": config.batch_size,
            "teachers": len(config.tasks),
            "remat": config.run.remat,
            "attention": config.run.attention,
            "memory": memory_fields(compilation, chip),
            "compile_seconds": compilation.compile_seconds,
            "versions": versions(PACKAGES),
            "flags": sys.argv[1:],
            "commit": commit(),
            "estimate": estimate(compilation, dumps, program.flops, chip, program.attention),
        }
    _write(fields, out)
    print(f"{config.name}, {fields['program']}, batch {config.batch_size}, one chip of {topology.name}")
    print(describe_estimate(fields["estimate"]), flush=True)
    return fields


def run_learning(config: Reinforced, options: Options, out: Path | None) -> Fields:
    """The same of a step of reinforcement learning.

    Raises:
      ValueError: names the field or flag that is out of place.
    """
    of_opd = {"phases": options.phases, "sweep": _SWEEP.value, "profile": options.profile}
    for name, given in (of_opd | {"teachers-sweep": _TEACHERS_SWEEP.value}).items():
        if given:
            raise ValueError(f"{name}: stage {config.stage!r} is timed without it")
    mesh = make_mesh(config.run.mesh)
    matmul = matmul_peak(mesh.devices.flat[0])
    fields = circumstances(matmul)
    fields["update"] = measure_learning(config, mesh, matmul, options)
    _write(fields, out)
    print(f"{_describe(fields)}\n{describe_learning(fields['update'])}", flush=True)
    return fields


def _collect(fields: Fields, name: str, rows: Iterable[Fields], out: Path | None) -> list[Fields]:
    """Measure the rows one by one into `fields`."""
    fields[name] = found = []
    for row in rows:
        found.append(row)
        _write(fields, out)
    return found


def _write(fields: Fields, out: Path | None) -> None:
    if out is not None:
        write_json(out, fields)


def circumstances(matmul: MatmulPeak) -> Fields:
    """All that the figures depend on beside the config."""
    device = jax.devices()[0]
    return {
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "hardware": hardware(),
        "versions": versions(PACKAGES),
        "flags": sys.argv[1:],
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "commit": commit(),
        "matmul": dataclasses.asdict(matmul),
    }


def _describe(fields: Fields) -> str:
    matmul, hardware_fields = fields["matmul"], fields["hardware"]
    return (
        f"{hardware_fields['gpu'] or fields['device']['kind']} on {hardware_fields['cpu']}, "
        f"{hardware_fields['threads']} threads; {matmul['dtype']} matrix product of {matmul['side']}: "
        f"{matmul['flops_per_second'] / 1e12:.4g} TFLOP/s (median {matmul['median_flops_per_second'] / 1e12:.4g})"
    )


def _sized(config: Config) -> OPD | Reinforced:
    if not isinstance(config, OPD | Reinforced):
        raise ValueError(f"stage: found {config.stage!r}, expected 'opd', 'grpo' or 'forward_rl'")
    config = config if _BATCH.value is None else with_batch(config, _BATCH.value)
    if _TEACHERS.value is None:
        return config
    if not isinstance(config, OPD):
        raise ValueError(f"teachers: found {_TEACHERS.value}, but stage {config.stage!r} has none")
    return with_teachers(config, _TEACHERS.value)


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    app.run(main, flags_parser=parse_flags)
