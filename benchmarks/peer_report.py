"""What follows from the timings of several programs: medians, MFU, and ratios taken apart."""

import statistics
from typing import Any

from peer_problem import OURS

Fields = dict[str, Any]


def summaries(runs: dict[str, list[Fields]]) -> dict[str, Fields]:
    """Medians over rounds; TFLOP/s and MFU from PyTorch's count of one forward and the best matrix product seen."""
    theirs = [each for name, rounds in runs.items() if name != OURS for each in rounds]
    forward = theirs[0]["forward_tflop"]
    peak = max(each["matmul_peak_tflops"] for each in theirs)
    found = {}
    for name, rounds in runs.items():
        samples = statistics.median(each["samples_per_s"] for each in rounds)
        tflops = samples * rounds[0]["forward_equivalents"] * forward
        found[name] = {
            "samples_per_s": samples,
            "median_s": statistics.median(each["median_s"] for each in rounds),
            "iqr_s": max(each["iqr_s"] for each in rounds),
            "forward_equivalents": rounds[0]["forward_equivalents"],
            "tflops": tflops,
            "mfu": tflops / peak,
            "peak_memory_gib": max(each["peak_memory_gib"] for each in rounds),
        }
    return found


def pair(our_rounds: list[Fields], peer_rounds: list[Fields]) -> Fields:
    """Ours to a peer: ratio = arithmetic x efficiency, the median over rounds and each round's."""
    each = [a["samples_per_s"] / b["samples_per_s"] for a, b in zip(our_rounds, peer_rounds, strict=True)]
    arithmetic = peer_rounds[0]["forward_equivalents"] / our_rounds[0]["forward_equivalents"]
    ratio = statistics.median(each)
    return {"ratio": ratio, "arithmetic": arithmetic, "efficiency": ratio / arithmetic, "ratio_by_round": each}


def table(found: Fields) -> str:
    columns = f"{'samples/s':>10}{'median':>11}{'spread':>10}{'forwards':>10}{'TFLOP/s':>9}{'MFU':>7}{'memory':>12}"
    lines = [f"{'program':34}{columns}"] + [
        f"{name:34}{each['samples_per_s']:>10.3g}{each['median_s']:>9.3f} s{each['iqr_s']:>8.3f} s"
        f"{each['forward_equivalents']:>10.4g}{each['tflops']:>9.3g}{each['mfu']:>7.1%}"
        f"{each['peak_memory_gib']:>8.2f} GiB"
        for name, each in found["programs"].items()
    ]
    lines += ["", "ours to"] + [
        f"{name:34}{each['ratio']:.2f}x samples/s = {each['arithmetic']:.2f}x arithmetic "
        f"x {each['efficiency']:.2f}x efficiency (by round {', '.join(f'{r:.2f}' for r in each['ratio_by_round'])})"
        for name, each in found["pairs"].items()
    ]
    return "\n".join(lines)
