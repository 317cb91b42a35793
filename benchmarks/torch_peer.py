"""The update of `torch_opd.py`, checked against ours or timed.

    python benchmarks/torch_peer.py --problem FOLDER/problem.json --form replay --json OUT     time it
    python benchmarks/torch_peer.py --check FOLDER                                              compare both forms

`benchmarks/compare.py` writes the folder and runs both; it is the program to start. Exits with 1 where loss, gradient
norm or gradient differ from ours by more than `TOLERANCE`.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from peer_problem import COMPILE, FORMS, SDPA, TEACHERS, Problem, forward_equivalents, summarise
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch_opd import TorchOPD
from torch_policies import STUDENT, Batch, Policies

TOLERANCE = 1e-4
"""Relative, of loss, gradient norm and ‖a - b‖/‖b‖ over the whole gradient, both sides in float32."""
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
PACKAGES = ("torch", "diffusers", "peft")
GIB = 2**30
Fields = dict[str, Any]


# ---- the check


def check(folder: Path, form: str, copies: bool, microbatch: int = 0) -> Fields:
    """Relative differences to ours on shared weights, prompts and noise."""
    problem, expected = Problem.read(folder / "problem.json"), json.loads((folder / "expected.json").read_text())
    inputs, ours = load_file(folder / "inputs.safetensors"), load_file(folder / "gradients.safetensors")
    policies = Policies(problem, torch.device("cpu"), copies, load_file(folder / "weights.safetensors"))
    update = TorchOPD(problem, policies, form, microbatch or problem.batch)
    loss, norm = update.update(Batch(**inputs))
    factors = [f"{name}/{factor}" for name in policies.names for factor in "ab"]
    assert sorted(factors) == sorted(ours)
    # Undoes the clipping, which both sides' norms precede.
    scale = max(1.0, float(norm) / problem.clip_norm)
    squares = [
        torch.stack([(scale * g - ours[name]).square().sum(), ours[name].square().sum()])
        for name, g in zip(factors, update.gradients, strict=True)
    ]
    distance, whole = torch.stack(squares).sum(0).sqrt().tolist()
    return {
        "loss": abs(float(loss) / expected["loss"] - 1),
        "grad_norm": abs(float(norm) / expected["grad_norm"] - 1),
        "gradient": distance / whole,
    }


def check_all(folder: Path) -> Fields:
    found = {f"{form}, {kind}": check(folder, form, kind == "copies") for form in FORMS for kind in TEACHERS}
    worst = max(value for each in found.values() for value in each.values())
    return {"tolerance": TOLERANCE, "worst": worst, "relative_difference": found}


# ---- the timing


def random_batch(problem: Problem, device: torch.device) -> Batch:
    h, w, c = problem.latent
    width, pooled = problem.network["joint_attention_dim"], problem.network["pooled_projection_dim"]
    dtype: torch.dtype = getattr(torch, problem.dtype)
    return Batch(
        torch.randn(problem.batch, problem.text_tokens, width, device=device, dtype=dtype),
        torch.randn(problem.batch, pooled, device=device, dtype=dtype),
        torch.randn(1, problem.text_tokens, width, device=device, dtype=dtype),
        torch.randn(1, pooled, device=device, dtype=dtype),
        torch.randn(problem.trained_steps + 1, problem.batch, c, h, w, device=device),
    )


def prepare(problem: Problem, device: torch.device, args: argparse.Namespace) -> Policies:
    """Random policies with the settings of the command line."""
    policies = Policies(problem, device, args.teachers == "copies", None)
    if args.checkpointing:
        policies.models[STUDENT].enable_gradient_checkpointing()
    # One program a block kind, adapter, batch size and gradient mode; the default of 8 would end in eager mode.
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 1024
    for model in {id(each): each for each in policies.models.values()}.values():
        if args.compile == "blocks":
            for block in model.transformer_blocks:
                block.compile(dynamic=False)
        elif args.compile == "whole":
            model.compile(dynamic=False)
    return policies


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(problem: Problem, args: argparse.Namespace) -> Fields:
    """Times `steps` updates one by one, each to its end on the device, after `warmup` that are not counted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as XLA does by default
    peak = matmul_peak(device, getattr(torch, problem.dtype))
    policies = prepare(problem, device, args)
    update, counts = TorchOPD(problem, policies, args.form, args.microbatch or problem.batch), policies.counts
    batch, seconds = random_batch(problem, device), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # weights are made in float32 before they are rounded
    loss = norm = torch.zeros(())
    with sdpa_kernel(BACKENDS[args.sdpa]) if args.sdpa in BACKENDS else contextlib.nullcontext():
        for _ in range(args.warmup + args.steps):
            begin = time.perf_counter()
            loss, norm = update.update(batch)
            synchronise(device)
            seconds.append(time.perf_counter() - begin)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        sys.exit(f"error: loss {float(loss)}, gradient norm {float(norm)}: expected finite numbers")
    samples = len(seconds) * problem.batch
    return {
        "program": args.form,
        "forward_equivalents": (counts.forward + counts.backward) / samples,
        "forward_equivalents_by_formula": forward_equivalents(problem, args.form),
        "recomputed_forwards": counts.recomputed / samples,
        "warmup_s": sum(seconds[: args.warmup]),
        **summarise(seconds[args.warmup :], problem.batch),
        "loss": float(loss),
        "peak_memory_gib": peak_memory(device),
        "matmul_peak_tflops": peak / 1e12,
        "forward_tflop": forward_flops(problem) / 1e12,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def peak_memory(device: torch.device) -> float:
    """Of the GPU's memory what tensors took at most; without one, the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        synchronise(device)
        best = min(best, (time.perf_counter() - begin) / 4)
    return 2 * size**3 / best


def forward_flops(problem: Problem) -> float:
    """FLOPs of the base over one row, counted by PyTorch without computing anything."""
    h, w, c = problem.latent
    with torch.device("meta"):
        model = SD3Transformer2DModel(**problem.network)
        context = torch.empty(1, problem.text_tokens, problem.network["joint_attention_dim"])
        pooled = torch.empty(1, problem.network["pooled_projection_dim"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, c, h, w), context, pooled, torch.empty(1))
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, help="folder that our side wrote")
    parser.add_argument("--problem", type=Path)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--form", choices=FORMS, default="fused")
    parser.add_argument("--teachers", choices=TEACHERS, default="adapters")
    parser.add_argument("--compile", choices=COMPILE, default="none")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the student's blocks in the backward")
    parser.add_argument("--microbatch", type=int, default=0, help="samples differentiated at a time; 0: all")
    parser.add_argument("--sdpa", choices=SDPA, default="auto")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    if (args.check is None) == (args.problem is None):
        parser.error("expected either --check or --problem")
    found = check_all(args.check) if args.check else measure(Problem.read(args.problem), args)
    text = json.dumps(found, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    if args.check and not found["worst"] <= TOLERANCE:
        sys.exit(f"error: differs from ours by {found['worst']:.1e}, more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
