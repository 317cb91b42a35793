"""Our update and the PyTorch peers' (`torch_opd.py`) in turn on one machine, after a check that they compute the same.

On CPU, the miniature, ours against both forms without compilation; 3 minutes on 2 cores, nothing to download:

    python benchmarks/compare.py --config=configs/miniature.py --steps=5

On a GPU, SD3.5-Medium's true size on random weights, 4 teachers and an anchor:

    python benchmarks/compare.py --config=configs/sd35m_opd.py --teachers=4 --config.batch_size=16 \\
        --config.run.attention=cudnn --compile none blocks --microbatch=4 --json=benchmarks/results/h200_compare.json

Every program is a process of its own, so that its memory is free before the next; the programs take turns, `rounds`
times. Of each pair are printed the ratio of samples/s, the part of it that is arithmetic (forward-equivalents, see
`peer_problem.py`) and the part that is efficiency, which is the ratio of MFU. The peer's settings: `--peer_teachers`
(adapters on one base, or whole copies with the adapters merged in), `--compile` (blocks: each transformer block;
whole: the network), `--microbatch` (samples differentiated at a time), `--checkpointing`, `--sdpa`.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer_problem import COMPILE, FORMS, OURS, SDPA, TEACHERS
from peer_report import pair, summaries, table

from fopd_jax.files import write_text
from fopd_jax.performance.host import commit, hardware

ROOT = Path(__file__).parents[1]
Fields = dict[str, Any]
Command = list[str]

# ---- processes


def run(command: Command, **environment: str) -> None:
    """Run one of this folder's programs to its end; what it prints is kept for the case that it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / command[0]), *command[1:]],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed with status {done.returncode}:\n{done.stdout[-3000:]}")


def measure(command: Command, args: argparse.Namespace, work: Path) -> Fields:
    out = work / "run.json"
    timing = [f"--steps={args.steps}", f"--warmup={args.warmup}", f"--json={out}"]
    run([*command, *timing], JAX_COMPILATION_CACHE_DIR=str(work / "compiled"))
    return json.loads(out.read_text())


def peers(args: argparse.Namespace, problem: Path) -> dict[str, Command]:
    """Title → command of every peer that the flags ask for."""
    found = {}
    for form, teachers, mode in itertools.product(args.forms, args.peer_teachers, args.compile):
        command = ["torch_peer.py", f"--problem={problem}", f"--form={form}", f"--teachers={teachers}"]
        command += [f"--compile={mode}", f"--microbatch={args.microbatch}", f"--sdpa={args.sdpa}"]
        found[f"{form}, {teachers}, compile {mode}"] = command + ["--checkpointing"] * args.checkpointing
    return found


def compare(args: argparse.Namespace, config_flags: Command, work: Path) -> Fields:
    """Check, then time every program in turn."""
    ours = [*config_flags, f"--teachers={args.teachers}"]
    print("check: loss, gradient norm and gradient of both forms against ours", flush=True)
    run(["our_check.py", *ours, f"--folder={work}"], JAX_PLATFORMS="cpu")
    run(["torch_peer.py", f"--check={work / 'check'}", f"--json={work / 'check.json'}"])
    programs = {OURS: ["our_step.py", *ours]} | peers(args, work / "problem.json")
    runs: dict[str, list[Fields]] = {name: [] for name in programs}
    for turn, (name, command) in itertools.product(range(args.rounds), programs.items()):
        runs[name].append(measure(command, args, work))
        print(f"round {turn + 1}: {name}: {runs[name][-1]['samples_per_s']:.3g} samples/s", flush=True)
    return {
        "hardware": hardware(),
        "commit": commit(),
        "flags": sys.argv[1:],
        "problem": json.loads((work / "problem.json").read_text()),
        "check": json.loads((work / "check.json").read_text()),
        "runs": runs,
        "programs": summaries(runs),
        "pairs": {name: pair(runs[OURS], each) for name, each in runs.items() if name != OURS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--teachers", type=int, default=0, help="number of routed teachers; 0: the config's")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="of the peer")
    parser.add_argument("--peer_teachers", nargs="+", choices=TEACHERS, default=TEACHERS[:1], help="of the peer")
    parser.add_argument("--compile", nargs="+", choices=COMPILE, default=COMPILE[:1], help="of the peer")
    parser.add_argument("--checkpointing", action="store_true", help="of the peer")
    parser.add_argument("--microbatch", type=int, default=0, help="of the peer; 0: the whole batch")
    parser.add_argument("--sdpa", choices=SDPA, default="auto", help="of the peer")
    parser.add_argument("--steps", type=int, default=10, help="timed updates of each run")
    parser.add_argument("--warmup", type=int, default=2, help="updates before them")
    parser.add_argument("--rounds", type=int, default=2, help="turns")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args, config_flags = parser.parse_known_args()
    if not config_flags or not all(each.startswith("--config") for each in config_flags):
        parser.error(
            f"found {config_flags}, expected --config=FILE, --config.FIELD=VALUE and the options of this program"
        )
    with tempfile.TemporaryDirectory() as folder:
        found = compare(args, config_flags, Path(folder))
    print(f"largest relative difference in the check: {found['check']['worst']:.1e}\n\n{table(found)}")
    if args.json:
        write_text(args.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
