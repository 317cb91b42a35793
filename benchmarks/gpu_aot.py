"""SD3.5-Medium's update compiled for H100s that are not there, and what its program consists of.

    python benchmarks/gpu_aot.py --work=FOLDER [--only NAME …]

An analysis by XLA's GPU compiler on a CPU host: no GPU, no cycles, nothing autotuned, cuDNN's acceptance not checked.
Each job of `JOBS` is `fopd_jax.compile_for` in a process of its own; its figures stay in FOLDER, and a job is repeated
by deleting its file. `benchmarks/results/gpu_aot.json` and `gpu_aot.md` get what is there; other jobs keep what they
had. Needs the extra `gpu-aot`; no weights.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from compile_jobs import RESULTS, Fields, keep, markdown, run

from fopd_jax.files import write_text
from fopd_jax.performance.gpu_report import WHAT
from fopd_jax.performance.topology import GIB

CUBLAS = "--xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass(frozen=True)
class Job:
    """One update of configs/sd35m_opd.py: 512 px, T = 10, guidance, three teachers and an anchor, an adapter trains."""

    topology: str
    flags: str = ""

    def arguments(self) -> list[str]:
        return ["--config=configs/sd35m_opd.py", f"--topology={self.topology}", "--per-chip-batch=4"]


JOBS = {
    "h100-1": Job("h100:1"),
    "h100-8": Job("h100:8"),
    "h100-1-cublas": Job("h100:1", CUBLAS),
}


def page(results: dict[str, Fields]) -> str:
    """Markdown: one row a job, then the kernels of each."""
    head = ("job", "GPUs", "compiled", "HBM a GPU", "of", "collectives in loops", "arithmetic", "kernel by kernel")
    rows = [head, ("---",) * len(head), *(_row(name, fields) for name, fields in results.items())]
    parts = [f"{WHAT[0].upper()}{WHAT[1:]}.", markdown(rows)]
    for name, fields in results.items():
        kinds = [("kind", "kernels", "launches", "GB", "TFLOP", "at datasheet rates"), ("---",) * 6]
        kinds += [
            (
                row["kind"], f"{row['count']}", f"{row['launches']}", f"{row['bytes'] / 1e9:.1f}",
                f"{row['flops'] / 1e12:.1f}", f"{row['datasheet_seconds']:.3f} s",
            )
            for row in fields["gpu"]["kernels"]
        ]  # fmt: skip
        calls = ", ".join(f"`{row['target']}` {row['count']}" for row in fields["gpu"]["custom_calls"])
        flags = f", `{JOBS[name].flags}`" if JOBS[name].flags else ""
        parts += [f"## {name}{flags}", markdown(kinds), f"Library calls: {calls}."]
    return "\n\n".join(parts) + "\n"


def _row(name: str, fields: Fields) -> tuple[str, ...]:
    memory, inside = fields["memory"], [row for row in fields["collectives"] if row["loop_depth"]]
    return (
        name,
        str(fields["chips"]),
        f"{fields['compile_seconds']:.0f} s",
        f"{memory['total_bytes'] / GIB:.2f} GiB",
        f"{memory['capacity_bytes'] / GIB:.2f} GiB",
        str(sum(row["count"] for row in inside)),
        f"{fields['roofline_seconds']['compute']:.3f} s",
        f"{fields['gpu']['datasheet_seconds']:.3f} s",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the jobs' figures and logs")
    parser.add_argument("--only", nargs="*", choices=JOBS, default=list(JOBS), help="some of the jobs")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.only if not run(name, JOBS[name].arguments(), options.work, JOBS[name].flags)]
    results = keep("gpu_aot.json", JOBS, options.work)
    write_text(RESULTS / "gpu_aot.md", page(results))
    if failed:
        sys.exit(f"error: failed: {failed}; see their logs in {options.work}")


if __name__ == "__main__":
    main()
