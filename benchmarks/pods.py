"""SD3.5-Medium's updates compiled for pods that are not there: distillation's, and those of its teachers' training.

    python benchmarks/pods.py --work=FOLDER [--only NAME …]

Each job of `JOBS` is `fopd_jax.compile_for` in a process of its own, one after another, for it takes minutes and
gigabytes; its figures stay in FOLDER, so that an interrupted run goes on where it stopped and a job is repeated by
deleting its file. `benchmarks/results/pods.json` and `pods.md` get what is there; other jobs keep what they had. Needs
the extra `tpu-aot`; no accelerator, no weights.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from compile_jobs import RESULTS, Fields, keep, markdown, run

from fopd_jax.files import write_text

GIB = 2**30
LARGE = "configs/sd35m_large.py"
OPD, GRPO = "configs/sd35m_opd.py", "configs/sd35m_grpo.py:ocr"
TEACHERS = 4  # routed ones; the anchor comes on top
LIMIT_SECONDS = 12 * 60


@dataclasses.dataclass(frozen=True)
class Job:
    """`fsdp` of 1 replicates the network; `once`: mesh axes over which gradients are summed once an update;
    `micro_batches`: in stages that store rollouts.
    """

    topology: str
    per_chip_batch: int = 4
    fsdp: int = 1
    trained: str = "adapter"
    once: tuple[str, ...] = ("data", "fsdp")
    remat: str = "attention"
    search: bool = False
    config: str = OPD
    micro_batches: int = 1

    def arguments(self) -> list[str]:
        return [
            f"--config={self.config}",
            *([f"--teachers={TEACHERS}"] if self.config == OPD else []),
            f"--topology={self.topology}",
            f"--per-chip-batch={self.per_chip_batch}",
            f"--config.run.mesh.fsdp={self.fsdp}",
            f"--config.trained={self.trained}",
            f"--config.run.reduce_once={self.once!r}",
            f"--config.run.remat={self.remat}",
            f"--config.run.micro_batches={self.micro_batches}",
            *(["--search"] if self.search else []),
        ]


JOBS = {
    "adapter-v5e-256": Job("v5e:16x16"),
    "adapter-v5p-64": Job("v5p:4x4x4"),
    "adapter-v6e-256": Job("v6e:16x16"),
    "adapter-v6e-8": Job("v6e:2x4"),  # weak scaling: the same batch a chip on 8 to 256 chips
    "adapter-v6e-64": Job("v6e:8x8"),
    **{f"adapter-v5p-64-{remat}": Job("v5p:4x4x4", remat=remat) for remat in ("full", "dots", "none")},
    "full-v5p-64": Job("v5p:4x4x4", fsdp=8, trained="params", once=("data",)),
    "full-v6e-64": Job("v6e:8x8", fsdp=8, trained="params", once=("data",)),
    "full-v5p-64-once": Job("v5p:4x4x4", fsdp=8, trained="params"),  # a whole float32 sum a chip
    "full-v5p-64-each": Job("v5p:4x4x4", fsdp=8, trained="params", once=()),  # a reduction per timestep
    "largest-v5e": Job("v5e:2x4", search=True),
    "largest-v5p": Job("v5p:2x2x1", per_chip_batch=16, search=True),
    "largest-v6e": Job("v6e:2x4", per_chip_batch=8, search=True),
    "grpo-v5e-256": Job("v5e:16x16", 6, config=GRPO),  # 1,536 images, which 256 chips and two minibatches divide
    "grpo-v5p-64": Job("v5p:4x4x4", 18, config=GRPO),
    "grpo-v6e-256": Job("v6e:16x16", 6, config=GRPO),
    "grpo-v6e-4": Job("v6e:2x2", 4, config=GRPO),
    **{
        f"large-{name}": Job(topology, fsdp=fsdp, trained="params", once=("data",), config=LARGE)
        for name, topology, fsdp in (
            ("v5e-256", "v5e:16x16", 32),
            ("v5p-64", "v5p:4x4x4", 8),
            ("v6e-256", "v6e:16x16", 8),
        )
    },
    "fast-v5e-256": Job("v5e:16x16", 6, config="configs/sd35m_fast.py:ocr"),
    "nft-v5e-256": Job("v5e:16x16", 6, config="configs/sd35m_nft.py:geneval"),
}


def table(results: dict[str, Fields]) -> str:
    """Markdown, one row a job."""
    head = (
        "job", "remat", "mesh", "images a chip", "compiled", "arguments + temporaries = HBM a chip", "of",
        "collectives in loops, a chip and update", "once an update", "PFLOP a chip (with recomputation)", "at least",
        "largest batch a chip",
    )  # fmt: skip
    rows = [head, ("---",) * len(head), *(_row(name, fields) for name, fields in results.items())]
    return markdown(rows) + "\n"


def _row(name: str, fields: Fields) -> tuple[str, ...]:
    memory = fields["memory"]
    seconds = fields.get("roofline_seconds") or {}
    return (
        name,
        JOBS[name].remat,
        "×".join(map(str, fields["mesh"].values())),
        str(fields["per_chip_batch"]),
        f"{fields['compile_seconds']:.0f} s",
        _memory(memory),
        _gib(memory["capacity_bytes"]),
        _collectives([row for row in fields.get("collectives", []) if row["loop_depth"]]),
        _collectives([row for row in fields.get("collectives", []) if not row["loop_depth"]]),
        "{model:.3f} ({hardware:.3f})".format(**{k: v / 1e15 for k, v in fields["flops_per_chip"].items()}),
        f"{seconds['update']:.2f} s" if seconds else "",
        str(fields["search"]["largest"]) if "search" in fields else "",
    )


def _memory(memory: Fields) -> str:
    total = _gib(memory["total_bytes"])
    if not memory["fits"]:
        return f"does not fit: {total}"
    return f"{_gib(memory['arguments_bytes'])} + {_gib(memory['temporaries_bytes'])} = {total}"


def _collectives(rows: list[Fields]) -> str:
    """Kinds and bytes by loops' length; a message of less than a MiB in all is not worth a word."""
    totals: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["kind"], "×".join(row["axes"]))
        totals[key] = totals.get(key, 0) + (row["executed_bytes"] or row["bytes"])
    named = [f"{kind} over {axes} {_gib(size)}" for (kind, axes), size in totals.items() if size >= 2**20]
    return ", ".join(named) or "none"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the jobs' figures and logs")
    parser.add_argument("--only", nargs="*", choices=JOBS, default=list(JOBS), help="some of the jobs")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.only if not run(name, JOBS[name].arguments(), options.work)]
    results = keep("pods.json", JOBS, options.work)
    write_text(RESULTS / "pods.md", table(results))
    slow = [name for name, each in results.items() if each["compile_seconds"] > LIMIT_SECONDS]
    if failed or slow:
        sys.exit(f"error: failed: {failed or 'none'}; took more than {LIMIT_SECONDS} s to compile: {slow or 'none'}")


if __name__ == "__main__":
    main()
