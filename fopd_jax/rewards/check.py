"""A reward proves itself before a run trusts it: pictures whose order is known, and what every reward must do.

Another network than was meant, answers in another order, a batch that mixes its images, a server that makes something
up: all give numbers that look like scores, and few of them order these pictures.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from fopd_jax.console import align
from fopd_jax.exits import spell_error
from fopd_jax.rewards.cases import Case
from fopd_jax.rewards.reward import Reward, Scores

SAME = 0.02
"""Of the spread of all scores: what rounding may change between two answers for one image."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What should hold, whether it does, the scores of a case's two images, and what is wrong, in words."""

    what: str
    problem: str
    better: float = np.nan
    worse: float = np.nan


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was found of one reward. Seconds of its first batch, and of one image alone; images a second in a batch."""

    reward: str
    findings: tuple[Finding, ...]
    first_s: float = np.nan
    latency_s: float = np.nan
    per_second: float = np.nan


def prove(reward: Reward, cases: Sequence[Case], pictures: Sequence[Case] = ()) -> Proof:
    """Whether a reward orders its cases, and whether its scores are what every reward's must be.

    `pictures`: what the latter is tried on where there are no cases. Whatever the reward raises is found wrong.
    """
    asked = _Asked(reward, cases or pictures)
    try:
        return _prove(asked, cases)
    except Exception as error:
        return Proof(reward.name, (Finding("it answers", spell_error(error)),))


def _prove(asked: "_Asked", cases: Sequence[Case]) -> Proof:
    asked.check()
    rows = np.arange(asked.count)
    scores, first_s = asked.score(rows)
    findings = [*_orders(cases, scores), *_answers(asked.reward, scores)]
    mixed = np.random.default_rng(0).permutation(asked.count)
    again, batch_s = asked.score(mixed)  # of the same size, so that nothing is compiled in it
    asked.score(rows[:1])
    alone, latency_s = asked.score(rows[1:2])  # another one: a reward may remember its last images
    if not scores.failed.any():
        rounding = max(SAME * float(np.ptp(scores.values)), 1e-6)
        findings.append(_compare("in another order images score the same", scores.values[mixed], again, rounding))
        findings.append(_compare("and without their neighbours", scores.values[1:2], alone, rounding))
    return Proof(asked.reward.name, tuple(findings), first_s, latency_s, asked.count / batch_s)


class _Asked:
    """A reward and the images of some cases, two after two, by which it is tried."""

    def __init__(self, reward: Reward, cases: Sequence[Case]) -> None:
        self.reward, self.count = reward, 2 * len(cases)
        self._images = np.stack([image for case in cases for image in (case.better, case.worse)])
        self._prompts = [case.prompt for case in cases for _ in range(2)]
        self._metadata = [case.metadata for case in cases for _ in range(2)]

    def check(self) -> None:
        self.reward.check(self._prompts, self._metadata)

    def score(self, rows: Int[np.ndarray, " k"]) -> tuple[Scores, float]:
        """Scores of some images, and seconds."""
        prompts, metadata = [self._prompts[i] for i in rows], [self._metadata[i] for i in rows]
        began = time.perf_counter()
        scores = self.reward.score(self._images[rows], prompts, metadata)
        seconds = time.perf_counter() - began
        if len(scores) != len(rows):
            raise ValueError(f"found {len(scores)} scores of {len(rows)} images")
        return scores, seconds


def _orders(cases: Sequence[Case], scores: Scores) -> Iterator[Finding]:
    for i, case in enumerate(cases):
        better, worse = map(float, scores.values[2 * i : 2 * i + 2])
        reasons = [str(each["error"]) for each in scores.details[2 * i : 2 * i + 2] if "error" in each]
        wrong = "" if better > worse else f"{better:.4g} is not above {worse:.4g}"
        yield Finding(case.name, reasons[0] if reasons else wrong, better, worse)


def _answers(reward: Reward, scores: Scores) -> Iterator[Finding]:
    """No failure, and nothing outside of the range that the reward states."""
    yield Finding("every image has a score", _failures(scores))
    low, high = (end if limit is None else limit for end, limit in zip((-np.inf, np.inf), reward.limits, strict=True))
    values = scores.values[~scores.failed]
    outside = values[(values < low - 1e-6) | (values > high + 1e-6)]
    problem = f"found {outside[0]:.4g}, expected {low:g} … {high:g}" if len(outside) else ""
    yield Finding("scores are in their range", problem)


def _compare(what: str, before: Float[np.ndarray, " k"], scores: Scores, rounding: float) -> Finding:
    if scores.failed.any():
        return Finding(what, _failures(scores))
    worst = int(np.abs(scores.values - before).argmax())
    first, second = float(before[worst]), float(scores.values[worst])
    same = abs(first - second) <= rounding
    return Finding(what, "" if same else f"one image scores {first:.6g}, then {second:.6g}")


def _failures(scores: Scores) -> str:
    reasons = [str(scores.details[i]["error"]) for i in np.flatnonzero(scores.failed)]
    return f"{len(reasons)} of {len(scores)} failed: {reasons[0]}" if reasons else ""


# ---- in words


def as_text(proofs: Sequence[Proof]) -> str:
    """A row for every finding, then how fast each reward is."""
    rows = [("reward", "what should hold", "better", "worse", "ok")]
    rows += [_row(proof.reward, finding) for proof in proofs for finding in proof.findings]
    return "\n".join([align(rows), "", *map(_speed, proofs)])


def _row(reward: str, finding: Finding) -> tuple[str, str, str, str, str]:
    better, worse = ("" if np.isnan(value) else f"{value:.4g}" for value in (finding.better, finding.worse))
    return reward, finding.what, better, worse, f"NO: {finding.problem}" if finding.problem else "yes"


def _speed(proof: Proof) -> str:
    if np.isnan(proof.latency_s):
        return f"{proof.reward}: nothing to time"
    return (
        f"{proof.reward}: {proof.latency_s:.3g} s for one image alone, {proof.per_second:.3g} images/s in a batch; "
        f"its first batch took {proof.first_s:.3g} s"
    )


def verdict(proofs: Sequence[Proof]) -> str:
    """What is wrong, on one line; empty where nothing is."""
    parts = []
    for proof in proofs:
        if wrong := [finding for finding in proof.findings if finding.problem]:
            first = f"{wrong[0].what}: {wrong[0].problem}"
            parts.append(f"{proof.reward} ({len(wrong)} of {len(proof.findings)} do not hold, such as {first})")
    return f"rewards that cannot be trusted: {'; '.join(parts)}" if parts else ""
