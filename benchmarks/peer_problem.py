"""One update of on-policy distillation as plain numbers, which is what every compared program is given.

Imports neither JAX nor PyTorch: the programs are processes of their own, and read this from a JSON file.

The unit of arithmetic is the forward-equivalent: the network once over one row (one sample's text or empty prompt).
A backward pass counts as one more: the base is frozen, so it computes gradients of activations, not of weights.
Rematerialisation is not counted, as in MFU.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

OURS = "ours"
FORMS = ("replay", "fused")
TEACHERS = ("adapters", "copies")
COMPILE = ("none", "blocks", "whole")
SDPA = ("auto", "flash", "cudnn")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes, sampler, objective and optimizer; `network` holds the arguments of diffusers' `SD3Transformer2DModel`.

    `teacher_guidance` has one scale per teacher, the anchor's last. Row i's teacher is i modulo their number.
    """

    network: dict[str, Any]
    latent: tuple[int, int, int]  # height, width, channels
    text_tokens: int
    batch: int
    dtype: str
    rank: int
    scale: float  # of the adapters, alpha/rank
    targets: tuple[str, ...]  # names of adapted layers, as PEFT takes them
    sigmas: tuple[float, ...]
    noise_level: float
    objective: str  # "clipped" (with the attached reward) or "direct"
    weighting: str
    clip: float
    mar_beta: float
    guidance: float
    teacher_guidance: tuple[float, ...]
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    ema_decay: float

    @property
    def teachers(self) -> int:
        return len(self.teacher_guidance) - 1

    @property
    def trained_steps(self) -> int:
        """The last sampler step is not trained."""
        return len(self.sigmas) - 2

    def route(self) -> list[int]:
        return [i % self.teachers for i in range(self.batch)]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Problem":
        fields: dict[str, Any] = json.loads(path.read_text())
        fields |= {name: tuple(each) for name, each in fields.items() if isinstance(each, list)}
        return cls(**fields)


def forward_equivalents(problem: Problem, form: str) -> float:
    """Forward-equivalents per sample of one update, for `OURS` or one of `FORMS`.

    Guidance takes two rows. In our program all teachers and the anchor are one forward, so one scale other than 1
    makes all of them take two; in the peers each takes what it needs. Replay also samples the untrained last step.
    """
    student, *frozen = (1 if scale == 1 else 2 for scale in (problem.guidance, *problem.teacher_guidance))
    *teachers, anchor = [max(frozen)] * len(frozen) if form == OURS else frozen
    asked = statistics.fmean(teachers[k] for k in problem.route()) + (anchor if problem.mar_beta > 0 else 0)
    rollout = (problem.trained_steps + 1) * student if form == "replay" else 0
    return problem.trained_steps * (2 * student + asked) + rollout


def summarise(seconds: list[float], batch: int) -> dict[str, float]:
    """Median step, the spread around it (interquartile range), extremes, and samples per second at the median."""
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    return {
        "median_s": median,
        "iqr_s": quartiles[2] - quartiles[0],
        "min_s": min(seconds),
        "max_s": max(seconds),
        "steps": len(seconds),
        "samples_per_s": batch / median,
    }
