"""What a compilation says about a pod: memory, collectives, FLOPs and the time that they cannot go below."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from fopd_jax.parallel.sharding import BATCH_AXES
from fopd_jax.performance.compilation import Compilation
from fopd_jax.performance.flops import Update
from fopd_jax.performance.hlo import REDUCTIONS, Collective
from fopd_jax.performance.topology import GIB, NODE, Chip

PACKAGES = ("fopd_jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax")
# What a ring sends per device and byte of message, times (n - 1) / n of n devices; a permutation sends all of it.
_RING = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}
Fields = dict[str, Any]


def memory_fields(compilation: Compilation, chip: Chip | None) -> Fields:
    """Bytes per chip and the chip's capacity (None for simulated devices). A GPU's compiler refuses nothing itself."""
    parts = dataclasses.asdict(compilation.memory) if compilation.memory else {}
    return {
        "fits": compilation.fits and (chip is None or compilation.needed <= chip.hbm),
        **{f"{name}_bytes": value for name, value in parts.items()},
        "total_bytes": compilation.needed,
        "capacity_bytes": chip.hbm if chip else None,
    }


def collective_fields(found: Iterable[Collective], mesh: dict[str, int]) -> list[Fields]:
    """Instructions added up by kind, mesh axes and depth of loops; deepest and largest first.

    `bytes`: of the messages of one pass through the program text; `executed_bytes`: times how often loops run them
    (None where a loop's length is unknown).
    """
    groups: dict[tuple[str, tuple[str, ...], int], list[Collective]] = {}
    for each in found:
        groups.setdefault((each.kind, each.axes(mesh), each.depth), []).append(each)
    rows = [
        {
            "kind": kind,
            "axes": list(axes),
            "loop_depth": depth,
            "count": len(members),
            "bytes": sum(each.bytes for each in members),
            "executed_bytes": _total(members),
        }
        for (kind, axes, depth), members in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row["loop_depth"], -row["bytes"]))


def _total(members: list[Collective]) -> int | None:
    if any(each.executions is None for each in members):
        return None
    return sum(each.bytes * (each.executions or 0) for each in members)


def loop_reductions(found: Iterable[Collective], mesh: dict[str, int]) -> list[Collective]:
    """Sums of numbers over the batch's mesh axes inside loops: gradients that are reduced more than once an update."""
    return [
        each
        for each in found
        if each.depth and each.floating and each.kind in REDUCTIONS and set(each.axes(mesh)) & set(BATCH_AXES)
    ]


def flops_fields(update: Update, chips: int) -> Fields:
    """Analytic FLOPs of one update, per chip."""
    phases = {name: value / chips for name, value in dataclasses.asdict(update).items()}
    return phases | {"model": update.model / chips, "hardware": update.hardware / chips}


def roofline(update: Update, found: Iterable[Collective], mesh: dict[str, int], chips: int, chip: Chip) -> Fields:
    """Seconds an update cannot go below: arithmetic at the chip's peak, and messages at all of its links' rate.

    Between nodes of GPUs a message goes once: each card of a node sends its share of it.
    """
    near, far = 0.0, 0.0
    for each in found:
        inside, outside = _sent(each, mesh, NODE if chip.node_bandwidth else chips)
        near, far = near + inside, far + outside
    network = near / (chip.ici_bandwidth / 2)
    if chip.node_bandwidth:
        network = max(network, far / (chip.node_bandwidth / 2))
    compute = update.hardware / chips / chip.peak_flops
    return {"compute": compute, "network": network, "update": max(compute, network)}


def _sent(each: Collective, mesh: dict[str, int], size: int) -> tuple[float, float]:
    """Bytes that one chip sends within its node of so many chips, and to other nodes."""
    members, nodes = math.prod(mesh[axis] for axis in each.axes(mesh)), 1
    if (chips := math.prod(mesh.values())) > size:
        spread = [(len({one // size for one in group}), len(group)) for group in each.devices or (tuple(range(chips)),)]
        nodes, members = max(spread)
    message, near = each.bytes * (each.executions or 1), members // nodes
    return message * _share(each, near), message * _share(each, nodes) / near


def _share(each: Collective, members: int) -> float:
    """Of a message, what each of so many members sends."""
    return _RING[each.kind] * (members - 1) / members if each.kind in _RING else float(members > 1)


# ---- text


def describe(fields: Fields) -> str:
    """The same figures to read."""
    lines = [f"{fields['config']} on {fields['topology']}: {fields['chips']} chips, mesh {_spell(fields['mesh'])}"]
    lines += [f"batch {fields['batch_size']}, {fields['per_chip_batch']} a chip; trains {fields['trained']}"]
    lines += [f"lowered in {fields['lower_seconds']:.1f} s, compiled in {fields['compile_seconds']:.1f} s"]
    lines += _describe_memory(fields["memory"])
    lines += _describe_collectives(fields) if "collectives" in fields else []
    flops = fields["flops_per_chip"]
    lines += [f"FLOPs a chip and update: {flops['model']:.4g}, {flops['hardware']:.4g} with recomputation"]
    for name, each in fields.get("networks", {}).items():
        lines += [f"  asked of {name}: {each['flops_per_chip']:.4g}; held of it: {_gib(each['held_bytes'])}"]
    for kind, each in fields.get("calls", {}).items():
        called = f"the program {fields['program']!r} {kind} {each['count']} times"
        lines += [f"  {called}, {each['flops_per_chip']['model']:.4g} each"]
    if fields.get("roofline_seconds"):
        seconds = fields["roofline_seconds"]
        lines += [
            f"no faster than {seconds['update']:.3g} s an update: "
            f"arithmetic {seconds['compute']:.3g} s, network {seconds['network']:.3g} s"
        ]
    for each in fields.get("beside", ()):
        lines += [f"beside it, {each['program']}: compiled in {each['compile_seconds']:.1f} s"]
        lines += [*_describe_memory(each["memory"]), f"FLOPs a chip: {each['flops_per_chip']['model']:.4g}"]
    if "search" in fields:
        lines += [f"largest batch a chip that fits: {fields['search']['largest']}"]
        lines += [
            f"  {trial['per_chip_batch']}: {_gib(trial['total_bytes'])} {'fits' if trial['fits'] else 'does not fit'}"
            for trial in fields["search"]["trials"]
        ]
    return "\n".join(lines)


def _describe_memory(memory: Fields) -> list[str]:
    capacity = f" of {_gib(memory['capacity_bytes'])}" if memory["capacity_bytes"] else ""
    if not memory["fits"]:
        return [f"does not fit: needs {_gib(memory['total_bytes'])}{capacity} a chip"]
    parts = ", ".join(f"{name} {_gib(memory[f'{name}_bytes'])}" for name in ("arguments", "temporaries", "outputs"))
    return [f"memory a chip: {_gib(memory['total_bytes'])}{capacity} ({parts})"]


def _describe_collectives(fields: Fields) -> list[str]:
    rows = [
        f"  {row['kind']:<19}{'x'.join(row['axes']) or '-':<18}loops {row['loop_depth']}  "
        f"{row['count']:>5} of {row['bytes'] / 2**20:>10.2f} MiB"
        for row in fields["collectives"]
    ]
    once = fields["loop_reductions"]["count"]
    verdict = "none inside loops" if once == 0 else f"{once} inside loops"
    return ["collectives:", *rows, f"reductions over the batch's axes: {verdict}"]


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def _spell(mesh: dict[str, int]) -> str:
    return " x ".join(f"{name} {length}" for name, length in mesh.items())
