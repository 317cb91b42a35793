"""What is told of a program compiled for GPUs: kernels by kind, float32 results, and attention's neighbours."""

from collections.abc import Iterable
from typing import Any

from fopd_jax.performance.gpu_kernels import KINDS, Kernel
from fopd_jax.performance.topology import Chip

Fields = dict[str, Any]
WHAT = (
    "an analysis by the compiler; nothing ran: no cycles, nothing autotuned (a card chooses between Triton and "
    "cuBLAS for every product), and whether cuDNN accepts the attention's graph is not checked"
)
LARGE = 2**20
"""Bytes of a result that is worth telling of."""
MOST_LISTED = 12


def gpu_fields(found: list[Kernel], chip: Chip) -> Fields:
    """The report's part that only GPUs have. A launch in a loop of unknown length counts once."""
    return {
        "what": WHAT,
        "kernels": [_kind_fields(kind, members, chip) for kind in KINDS if (members := _of(found, kind))],
        "details": _details(found),
        "custom_calls": _custom_calls(found),
        "float32": _float32_fields(found),
        "attention": attention_neighbours(found),
        "slowest": [_row(each, chip) for each in sorted(found, key=lambda each: -_seconds(each, chip))[:MOST_LISTED]],
        "datasheet_seconds": sum(_seconds(each, chip) for each in found),
    }


def _of(found: Iterable[Kernel], kind: str) -> list[Kernel]:
    return [each for each in found if each.kind == kind]


def _launches(each: Kernel) -> int:
    return each.launches or 1


def _seconds(each: Kernel, chip: Chip) -> float:
    return _launches(each) * each.seconds(chip.peak_flops, chip.hbm_bandwidth)


def _kind_fields(kind: str, members: list[Kernel], chip: Chip) -> Fields:
    """`datasheet_seconds`: every launch at the peak rate that bounds it, of arithmetic or of memory."""
    return {
        "kind": kind,
        "count": len(members),
        "launches": sum(map(_launches, members)),
        "bytes": sum(_launches(each) * each.bytes for each in members),
        "flops": sum(_launches(each) * each.flops for each in members),
        "datasheet_seconds": sum(_seconds(each, chip) for each in members),
    }


def _details(found: Iterable[Kernel]) -> dict[str, int]:
    """How many kernels the compiler calls what."""
    counts: dict[str, int] = {}
    for each in found:
        counts[each.detail] = counts.get(each.detail, 0) + 1
    return dict(sorted(counts.items()))


def _custom_calls(found: Iterable[Kernel]) -> list[Fields]:
    """Calls into cuDNN, cuBLAS and other libraries, and into own kernels."""
    targets: dict[str, list[Kernel]] = {}
    for each in found:
        if "$" in each.detail or each.kind == "library":
            targets.setdefault(each.detail, []).append(each)
    return [
        {"target": target, "count": len(members), "launches": sum(map(_launches, members))}
        for target, members in sorted(targets.items())
    ]


def _float32_fields(found: Iterable[Kernel]) -> Fields:
    """Large float32 results of kernels: where bfloat16 would halve what is written, and read again."""
    large = sorted((each for each in found if each.float32 >= LARGE), key=lambda each: -_launches(each) * each.float32)
    return {
        "count": len(large),
        "launches": sum(map(_launches, large)),
        "bytes": sum(_launches(each) * each.float32 for each in large),
        "largest": [
            {"op_name": each.op_name, "kind": each.kind, "bytes": each.float32, "launches": each.launches}
            for each in large[:MOST_LISTED]
        ],
    }


def attention_neighbours(found: Iterable[Kernel]) -> Fields:
    """Kernels that only move what attention reads or what it has written, each counted once."""
    by_name = {each.name: each for each in found}
    calls = {name: each for name, each in by_name.items() if each.kind == "attention"}
    feeding = {feed for each in calls.values() for feed in each.feeds}
    before = [each for name, each in by_name.items() if name in feeding and _moves(each)]
    after = [each for each in by_name.values() if _moves(each) and set(each.feeds) & calls.keys()]
    return {
        "calls": len(calls),
        "launches": sum(map(_launches, calls.values())),
        "moves_before": _moved(before),
        "moves_after": _moved(after),
    }


def _moves(each: Kernel) -> bool:
    return each.kind == "movement" and each.bytes >= LARGE


def _moved(members: list[Kernel]) -> Fields:
    return {"count": len(members), "bytes": sum(_launches(each) * each.bytes for each in members)}


def _row(each: Kernel, chip: Chip) -> Fields:
    return {
        "op_name": each.op_name,
        "kind": each.kind,
        "detail": each.detail,
        "launches": each.launches,
        "bytes": each.bytes,
        "flops": each.flops,
        "datasheet_seconds": _seconds(each, chip),
    }


# ---- text


def describe_gpu(fields: Fields) -> str:
    """The same figures to read."""
    lines = [f"kernels of an update ({fields['what']}):"]
    lines += [f"  {'kind':<15}{'kernels':>8}{'launches':>10}{'GB':>9}{'TFLOP':>9}{'at datasheet rates':>20}"]
    lines += [
        f"  {row['kind']:<15}{row['count']:>8}{row['launches']:>10}{row['bytes'] / 1e9:>9.4g}"
        f"{row['flops'] / 1e12:>9.4g}{row['datasheet_seconds']:>18.3g} s"
        for row in fields["kernels"]
    ]
    lines += [f"no faster than {fields['datasheet_seconds']:.3g} s kernel by kernel, launches and waits not counted"]
    called = ", ".join(f"{row['target']} {row['count']}" for row in fields["custom_calls"]) or "none"
    lines += [f"library calls: {called}; as the compiler calls them: {_spell(fields['details'])}"]
    float32, attention = fields["float32"], fields["attention"]
    lines += [f"float32 results of 1 MiB or more: {float32['count']} kernels write {float32['bytes'] / 1e9:.3g} GB"]
    before, after = attention["moves_before"], attention["moves_after"]
    lines += [
        f"around {attention['calls']} attentions: {before['count']} kernels only move what they read "
        f"({before['bytes'] / 1e9:.3g} GB), {after['count']} what they wrote ({after['bytes'] / 1e9:.3g} GB)"
    ]
    return "\n".join(lines)


def _spell(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
