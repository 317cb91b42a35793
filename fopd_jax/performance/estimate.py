"""What the TPU compiler says that a program takes, without a TPU: an estimate, never a measurement.

Two counts of cycles are added up. Of XLA's operations it is the compiler's own `estimated_cycles`, times the trips of
the loops around them. Of Pallas kernels, about which it says nothing, it is the static schedule that it made of them
(`performance.kernel_schedule`). Neither knows waits for DMA beyond the compiler's model, dispatch, or the clock that a
chip keeps, so that a chip is slower. Both branches of a conditional count.

Every operation is of one phase of an update, by the scopes of its name (`jax.named_scope`), and of one kind. A fusion
is of its heaviest kind: what is fused with a product is dense. `norms` are all other arithmetic of the blocks, apart
from products: norms, modulation, gates, residual sums.
"""

import collections
import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fopd_jax.performance.bounds import FLOPS_PER_CYCLE, Attention, bounds
from fopd_jax.performance.compilation import Compilation
from fopd_jax.performance.flops import Update
from fopd_jax.performance.hlo import Instruction, Program, Visit, collective_kind, parse, walk
from fopd_jax.performance.kernel_schedule import Schedule, dump_flags, find_dumps, read_schedule
from fopd_jax.performance.topology import Chip, Topology

Fields = dict[str, Any]
WHAT = "an estimate by the TPU compiler (operations' cycles and kernels' static schedules), without waits for DMA"
KINDS = ("dense", "attention", "norms", "layout", "collectives", "other")
_STUDENT, _BACKWARD, _ROLLOUT, _ASKED = "student forward", "backward", "rollout", "teachers and anchor"
_SCOPES = {
    _ASKED: re.compile(r"\b(teachers|anchor)\b"),
    _BACKWARD: re.compile(r"transpose\(jvp"),
    _ROLLOUT: re.compile(r"\bopd_(rollout|approach)\b"),
    _STUDENT: re.compile(r"\bstudent\b"),
    "optimizer": re.compile(r"\boptimizer\b"),
}
REST = "rest"
PHASES = (_ROLLOUT, _STUDENT, _BACKWARD, _ASKED, "optimizer", REST)
_KERNEL = 'custom_call_target="tpu_custom_call"'
_BODY = re.compile(r'"custom_call_config":\{"body":"([^"]*)"')
_KERNEL_KINDS = {"attention": re.compile("attention|mha|mqa|flash"), "norms": re.compile("norm")}
_XLA_ATTENTION = re.compile(r"\battn2?/vmap\((\)|BTNH|BNTS)")  # what `jax.nn.dot_product_attention` is made of
_PRODUCTS = {"dot", "convolution", "ragged-dot"}
_LAYOUT = {
    "copy", "copy-start", "copy-done", "transpose", "pad", "slice", "dynamic-slice", "dynamic-update-slice", "reshape",
    "bitcast", "concatenate", "broadcast", "convert", "slice-start", "slice-done",
    "parameter", "constant", "tuple", "get-tuple-element", "iota", "fusion",
}  # fmt: skip
_NETWORK = re.compile(r"\b(dual_blocks|blocks|last_block|norm_out)\b")
MOST_LISTED = 24


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction's cycles in one run of the program, all its `executions` together; `schedule`: of a kernel."""

    name: str
    op_name: str
    phase: str
    kind: str
    executions: int
    cycles: int
    schedule: Schedule | None = None


@contextlib.contextmanager
def keeping_schedules() -> Iterator[Path]:
    """A folder where the TPU compiler leaves kernels' schedules; it must not have been loaded before."""
    name, given = "LIBTPU_INIT_ARGS", os.environ.get("LIBTPU_INIT_ARGS", "")
    with tempfile.TemporaryDirectory(prefix="schedules_") as folder:
        os.environ[name] = f"{given} {dump_flags(Path(folder))}".strip()
        try:
            yield Path(folder)
        finally:
            os.environ[name] = given


def check_estimated(topology: Topology) -> Chip:
    """The chip that is estimated for.

    Raises:
      ValueError: no compiler estimates cycles for that topology.
    """
    if topology.chip is None or topology.chip.kind not in FLOPS_PER_CYCLE:
        kinds = ", ".join(FLOPS_PER_CYCLE)
        raise ValueError(f"estimate: found topology {topology.name!r}, expected a TPU's ({kinds}), whose compiler can")
    return topology.chip


def estimate(
    compilation: Compilation, dumps: Path, flops: Update, chip: Chip, attention: Attention | None = None
) -> Fields:
    """Figures of a program that was compiled while schedules were kept in `dumps`, which is emptied for the next one.

    `flops`: of one run, one chip's share.

    Raises:
      ValueError: as `operations`.
    """
    found = operations(compilation.text, dumps)
    for path in dumps.iterdir():
        path.unlink()
    return estimate_fields(found, flops, chip, attention)


def operations(text: str, dumps: Path) -> list[Operation]:
    """All that takes cycles in an optimized HLO module; `dumps`: the folder with its kernels' schedules.

    Raises:
      ValueError: a loop without a static length, or a kernel whose schedule is missing or not understood; names it.
    """
    program, entry = parse(text)
    visits = list(walk(program, entry))
    types = {each.name: each.type for body in program.values() for each in body}
    schedules = _schedules({visit: _code(visit, types) for visit in visits if _is_kernel(visit)}, dumps)
    return [
        _operation(visit, program, schedules.get(visit.instruction.name))
        for visit in visits
        if visit.instruction.name in schedules or _has_cycles(visit, program)
    ]


def _schedules(kernels: Mapping[Visit, Any], dumps: Path) -> dict[str, Schedule]:
    """Of each kernel's instruction, by name. Of kernels with the same code the compiler makes one schedule."""
    names = {name for visit in kernels for name in _dumped_as(visit)}
    paths, read, own, shared = find_dumps(dumps, names), {}, {}, {}
    for name, path in paths.items():
        read[name] = read_schedule(path.read_text(errors="replace"), name)
    for visit, code in kernels.items():
        if name := next((each for each in _dumped_as(visit) if each in read), ""):
            own[visit.instruction.name] = shared[code] = read[name]
    for visit, code in kernels.items():
        if visit.instruction.name not in own and code not in shared:
            raise ValueError(f"kernel {visit.instruction.name}: found no schedule of it among the compiler's dumps")
        own.setdefault(visit.instruction.name, shared.get(code))
    return own


def _code(visit: Visit, types: Mapping[str, str]) -> tuple[Any, ...]:
    """The kernel's body, and the types of results and operands with their layouts and places."""
    each = visit.instruction
    body = _BODY.search(each.rest)
    return each.type, tuple(map(types.get, each.operands)), body.group(1) if body else each.name


def _is_kernel(visit: Visit) -> bool:
    return _KERNEL in visit.instruction.rest


def _has_cycles(visit: Visit, program: Program) -> bool:
    """Whether the compiler's cycles of an instruction count: a fusion's, for its parts; a kernel has its schedule."""
    if not visit.instruction.cycles or any(each.opcode == "fusion" for each in visit.around):
        return False
    return not any(_KERNEL in each.rest for each in _contents(visit.instruction, program))


def _dumped_as(visit: Visit) -> list[str]:
    """A kernel that inputs are fused into is dumped under the fusion's name."""
    return [visit.instruction.name, *(each.name for each in visit.around if each.opcode == "fusion")]


def _operation(visit: Visit, program: Program, schedule: Schedule | None) -> Operation:
    each = visit.instruction
    if visit.executions is None:
        loops = [loop.name for loop in visit.around if loop.opcode == "while"]
        raise ValueError(f"loop {' / '.join(loops)}: found no static number of trips, which an estimate needs")
    phase = _phase([each.op_name, *(outer.op_name for outer in reversed(visit.around))])
    kind, cycles = (_kernel_kind(each.name), schedule.cycles) if schedule else (_kind(each, program), each.cycles)
    return Operation(each.name, each.op_name, phase, kind, visit.executions, cycles * visit.executions, schedule)


def _phase(scopes: Iterable[str]) -> str:
    """By the innermost name that tells."""
    for scope in scopes:
        for phase, pattern in _SCOPES.items():
            if pattern.search(scope):
                return phase
    return REST


def _kernel_kind(name: str) -> str:
    return next((kind for kind, pattern in _KERNEL_KINDS.items() if pattern.search(name)), "other")


def _kind(each: Instruction, program: Program) -> str:
    inside = list(_contents(each, program))
    opcodes = {one.opcode for one in inside}
    if any(map(collective_kind, opcodes)):
        return "collectives"
    if any(_XLA_ATTENTION.search(one.op_name) for one in inside):
        return "attention"
    if opcodes & _PRODUCTS:
        return "dense"
    if opcodes <= _LAYOUT:
        return "layout"
    return "norms" if any(_NETWORK.search(one.op_name) for one in inside) else "other"


def _contents(each: Instruction, program: Program) -> Iterable[Instruction]:
    yield each
    for name in each.called:
        for inner in program.get(name, []):
            yield from _contents(inner, program)


# ---- figures


def estimate_fields(found: list[Operation], flops: Update, chip: Chip, attention: Attention | None = None) -> Fields:
    """Figures of one run on one chip: `flops`, that chip's share; utilisation of its nominal peak a cycle, and its
    bounds (`performance.bounds`).
    """
    total, peak = sum(each.cycles for each in found), FLOPS_PER_CYCLE[chip.kind]
    asked = {_ROLLOUT: flops.rollout, _STUDENT: flops.forward, _BACKWARD: flops.backward, _ASKED: flops.teachers}
    phases = {}
    for name in PHASES:
        mine = [each for each in found if each.phase == name]
        if mine:
            cycles, useful = sum(each.cycles for each in mine), asked.get(name, 0.0)
            phases[name] = {
                "cycles": cycles,
                "share": cycles / total,
                "model_flops": useful,
                "mfu": useful / cycles / peak if useful else None,
                "kinds": _sums(mine),
            }
    return {
        "what": WHAT,
        "chip": chip.kind,
        "flops_per_cycle": peak,
        "cycles": total,
        "seconds": total * peak / chip.peak_flops,
        "model_flops": flops.model,
        "mfu": flops.model / total / peak,
        "bounds": bounds(flops, attention, chip.kind),
        "kinds": _sums(found),
        "phases": phases,
        "kernels": _kernels(found),
        "largest": _largest(found, total),
    }


def _sums(found: Iterable[Operation]) -> Mapping[str, int]:
    sums: dict[str, int] = dict.fromkeys(KINDS, 0)
    for each in found:
        sums[each.kind] += each.cycles
    return sums


def _kernels(found: Iterable[Operation]) -> list[Fields]:
    return [
        {
            "name": each.name,
            "phase": each.phase,
            "kind": each.kind,
            "calls": each.executions,
            "cycles_a_call": each.schedule.cycles,
            "loops": [{"bundles": loop.last - loop.first + 1, "trips": loop.trips} for loop in each.schedule.loops],
        }
        for each in found
        if each.schedule
    ]


def _largest(found: Iterable[Operation], total: int) -> list[Fields]:
    """Operations alike, added up: of one phase and kind, named alike but for numbers."""
    sums: collections.Counter[tuple[str, ...]] = collections.Counter()
    counts: collections.Counter[tuple[str, ...]] = collections.Counter()
    for each in found:
        key = (each.phase, each.kind, re.sub(r"[.\d]+$", "", each.name), "/".join(each.op_name.split("/")[-4:]))
        sums[key] += each.cycles
        counts[key] += each.executions
    rows = []
    for key, cycles in sums.most_common(MOST_LISTED):
        named = dict(zip(("phase", "kind", "name", "op_name"), key, strict=True))
        rows.append(named | {"executions": counts[key], "cycles": cycles, "share": cycles / total})
    return rows


# ---- text


def describe_estimate(fields: Fields) -> str:
    """The same figures to read."""
    header = "".join(f"{kind:>13}" for kind in KINDS)
    lines = [
        f"ESTIMATE, not measured: {fields['what']}",
        f"{fields['cycles'] / 1e6:.1f} M cycles on a {fields['chip']}, {fields['seconds']:.3g} s at its nominal clock; "
        f"{fields['model_flops'] / 1e12:.4g} TFLOP: estimated MFU {fields['mfu']:.1%}{_bounds(fields['bounds'])}",
        f"{'M cycles':22}{'all':>10}{'share':>8}{'MFU':>8}{header}",
    ]
    rows = {"whole": fields | {"share": 1.0}, **fields["phases"]}
    for name, row in rows.items():
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        kinds = "".join(f"{row['kinds'][kind] / 1e6:>13.2f}" for kind in KINDS)
        lines.append(f"{name:22}{row['cycles'] / 1e6:>10.2f}{row['share']:>8.1%}{mfu:>8}{kinds}")
    lines.append("largest:")
    lines += [
        f"  {row['share']:6.2%} x{row['executions']:<5}{row['phase']}, {row['kind']}: {row['name']} | {row['op_name']}"
        for row in fields["largest"]
    ]
    return "\n".join(lines)


def _bounds(found: Fields) -> str:
    if found["width"] is None:
        return ""
    compiled = "" if found["compiled"] is None else f", {found['compiled']:.0%} at the rates of an earlier study"
    return f" (bounds: {found['width']:.0%} by the width of heads{compiled})"
