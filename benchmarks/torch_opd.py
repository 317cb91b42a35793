"""The update in PyTorch: diffusers' `SD3Transformer2DModel`, PEFT's adapters, autograd. Written for speed, plainly.

    replay   roll out, store the trajectory, then train on it timestep by timestep, as public programs do
    fused    the rollout's forward is also the training forward, as in ours

In both, the base and every frozen adapter stay in the compute dtype, frozen forwards run in inference mode, text and
empty prompt share a forward, rows are grouped by teacher, and gradients reach the student's factors alone; those have
float32 masters, which the optimizer moves. Nothing waits for the device.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from peer_problem import Problem
from torch import Tensor
from torch_policies import ANCHOR, STUDENT, Batch, Policies

foreach: Any = torch  # its functions on lists of tensors, which have no public names

# ---- the sampler's arithmetic: Gaussian transitions N(state·x + velocity·v, std²)


@dataclasses.dataclass(frozen=True)
class Level:
    """One sampler step of the SDE, and its weight in the loss."""

    sigma: float
    state: float
    velocity: float
    std: float
    weight: float


def levels(problem: Problem) -> list[Level]:
    found = []
    for sigma, after in zip(problem.sigmas[:-1], problem.sigmas[1:], strict=True):
        dt, a = after - sigma, problem.noise_level
        half_rate = a**2 / (2 * (1 - (after if sigma == 1 else sigma)))  # s²/(2·sigma)
        velocity, std = (1 + half_rate * (1 - sigma)) * dt, math.sqrt(2 * half_rate * sigma * -dt)
        kl = velocity**2 / (2 * std**2)
        weight = {"kl": kl, "kl_no_dt": -dt * kl, "ode": dt**2 / 2, "uniform": 1.0}[problem.weighting]
        found.append(Level(sigma, 1 + half_rate * dt, velocity, std, weight))
    return found


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean((1, 2, 3))


def log_density(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """Of each sample, averaged over dimensions."""
    return -mean_square(x_next - mean) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


# ---- the update


class TorchOPD:
    """`update(batch) → loss, gradient norm` moves the student once, differentiating `microbatch` samples at a time."""

    def __init__(self, problem: Problem, policies: Policies, form: str, microbatch: int) -> None:
        self.problem, self.policies, self.microbatch = problem, policies, microbatch
        self.run = {"replay": self.replay, "fused": self.fused}[form]
        self.levels = levels(problem)
        route = torch.tensor(problem.route(), device=policies.device)
        self.groups = [(str(k), torch.nonzero(route == k)[:, 0]) for k in range(problem.teachers) if (route == k).any()]
        self.masters = [each.detach().float().clone() for each in policies.student]
        self.gradients = [torch.zeros_like(each) for each in self.masters]
        self.ema = [each.clone() for each in self.masters]
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=problem.learning_rate, betas=problem.betas, weight_decay=problem.weight_decay, fused=True
        )

    def update(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One update; neither result waits for the device."""
        foreach._foreach_zero_(self.gradients)
        total = self.run(batch) / (self.problem.batch * self.problem.trained_steps)
        foreach._foreach_div_(self.gradients, self.problem.batch * self.problem.trained_steps)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.problem.clip_norm, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            foreach._foreach_copy_(self.policies.student, self.masters)
            foreach._foreach_lerp_(self.ema, self.masters, 1 - self.problem.ema_decay)
        return total, norm

    # the two forms; each returns the loss summed over samples and trained steps

    def fused(self, batch: Batch) -> Tensor:
        x, total = batch.noise[0], torch.zeros((), device=batch.noise.device)
        for level, noise in zip(self.levels[:-1], batch.noise[1:], strict=True):
            teacher, anchor = self.targets(batch, x, level)
            drawn = []
            for rows in self.chunks():
                v = self.policies.velocity(STUDENT, batch, rows, x[rows], level.sigma, self.problem.guidance)
                x_next, log_prob = self.act(x[rows], v.detach(), noise[rows], level)
                total += self.differentiate(v, x[rows], x_next, log_prob, teacher[rows], pick(anchor, rows), level)
                drawn.append(x_next)
            x = torch.cat(drawn)
        return total

    def replay(self, batch: Batch) -> Tensor:
        states, log_probs = self.rollout(batch)
        total = torch.zeros((), device=batch.noise.device)
        for t, level in enumerate(self.levels[:-1]):
            x, x_next = states[t], states[t + 1]
            teacher, anchor = self.targets(batch, x, level)
            for rows in self.chunks():
                v = self.policies.velocity(STUDENT, batch, rows, x[rows], level.sigma, self.problem.guidance)
                total += self.differentiate(
                    v, x[rows], x_next[rows], log_probs[t][rows], teacher[rows], pick(anchor, rows), level
                )
        return total

    @torch.no_grad()
    def rollout(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """All states and log-densities; the last step is sampled, too, for the sake of the picture."""
        states, log_probs = [batch.noise[0]], []
        last = torch.zeros_like(batch.noise[0])
        for level, noise in zip(self.levels, [*batch.noise[1:], last], strict=True):
            with torch.inference_mode():
                v = self.policies.velocity(STUDENT, batch, slice(None), states[-1], level.sigma, self.problem.guidance)
            x_next, log_prob = self.act(states[-1], v, noise, level)
            states.append(x_next)
            log_probs.append(log_prob)
        return states, log_probs

    # parts of a timestep

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.problem.batch, self.microbatch):
            yield slice(start, start + self.microbatch)

    @torch.no_grad()
    def targets(self, batch: Batch, x: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
        """Each sample's teacher's velocity, one forward a teacher, and the anchor's."""
        teacher, scales = torch.empty_like(x), self.problem.teacher_guidance
        with torch.inference_mode():
            each = [
                self.policies.velocity(name, batch, rows, x[rows], level.sigma, scales[int(name)])
                for name, rows in self.groups
            ]
            anchor = None
            if self.problem.mar_beta > 0:
                anchor = self.policies.velocity(ANCHOR, batch, slice(None), x, level.sigma, scales[-1])
        for (_, rows), v in zip(self.groups, each, strict=True):
            teacher[rows] = v
        return teacher, anchor

    @torch.no_grad()
    def act(self, x: Tensor, v: Tensor, noise: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        mean = level.state * x + level.velocity * v
        x_next = mean + level.std * noise
        return x_next, log_density(x_next, mean, level.std)

    def differentiate(
        self, v: Tensor, x: Tensor, x_next: Tensor, old: Tensor, teacher: Tensor, anchor: Tensor | None, level: Level
    ) -> Tensor:
        """Adds the gradient of the summed loss of one timestep of some rows; returns that loss."""
        loss = gap = level.weight * mean_square(v - teacher)
        if self.problem.objective == "clipped":
            log_prob = log_density(x_next, level.state * x + level.velocity * v, level.std)
            ratio, clip = torch.exp(log_prob - old), self.problem.clip
            loss = torch.maximum(ratio * gap, ratio.clamp(1 - clip, 1 + clip) * gap)
        if anchor is not None:
            loss = loss + self.problem.mar_beta * level.weight * mean_square(v - anchor)
        gradients = torch.autograd.grad(loss.sum(), self.policies.student, materialize_grads=True)
        foreach._foreach_add_(self.gradients, list(gradients))
        return loss.detach().sum()


def pick(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
