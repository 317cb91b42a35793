"""Scores of sampled images: as JSON beside and inside their files, and as a table for people."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from fopd_jax.console import align
from fopd_jax.evaluation.score import measure
from fopd_jax.exits import naming
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.rewards.registry import close_all
from fopd_jax.rewards.reward import Metadata, Reward, Scores

MOST_ROWS = 40
_LONGEST, _LONGEST_REASON = 48, 60

Scored = Mapping[str, Mapping[str, Any]]
"""Of one image by reward: `{"value": …, "details": …}`, or `{"failed": reason, "details": …}`."""
Row = Mapping[str, Any]
"""One image: its `file`, `policy`, `prompt`, `seed` and `scores`."""


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Who scores the images of each prompt, by its place among those asked for, and what stands beside it."""

    rewards: Mapping[str, Reward]
    names: Sequence[Sequence[str]]
    metadata: Sequence[Metadata]

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that can never be scored.

        Raises:
          ValueError: names reward and prompt.
        """
        for name, reward in self.rewards.items():
            at = [place for place, names in enumerate(self.names) if name in names]
            with naming(f"rewards.{name}"):
                reward.check([prompts[place] for place in at], [self.metadata[place] for place in at])

    def __call__(
        self, images: Sequence[Float[np.ndarray, "h w 3"]], prompts: Sequence[str], places: Sequence[int]
    ) -> list[Scored]:
        """What each image's rewards say; images in [-1, 1], `places`: of their prompts."""
        scored: list[dict[str, Mapping[str, Any]]] = [{} for _ in places]
        for name in self.rewards:
            if at := [i for i, place in enumerate(places) if name in self.names[place]]:
                pixels, beside = to_pixels(np.stack([images[i] for i in at])), [self.metadata[places[i]] for i in at]
                found = measure(self.rewards, [name], pixels, [prompts[i] for i in at], beside)[name]
                for k, i in enumerate(at):
                    scored[i][name] = _as_json(found, k)
        return list(scored)

    def close(self) -> None:
        """End what rewards have started."""
        close_all(self.rewards)


def _as_json(scores: Scores, image: int) -> dict[str, Any]:
    details = dict(scores.details[image])
    if scores.failed[image]:
        return {"failed": details.pop("error"), "details": details}
    return {"value": float(scores.values[image]), "details": details}


def to_lines(rows: Sequence[Row]) -> str:
    """JSON, a line an image."""
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def format_scores(rows: Sequence[Row]) -> str:
    """A row an image, the first ones of many, then each policy's means over the images that have a score."""
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    body = [[row["file"], _short(row["prompt"]), *(_cell(row["scores"], name) for name in names)] for row in rows]
    left = len(body) - MOST_ROWS
    policies = dict.fromkeys(row["policy"] for row in rows)
    means = [_means(policy, [row for row in rows if row["policy"] == policy], names) for policy in policies]
    lines = align([["file", "prompt", *names], *body[:MOST_ROWS], *means]).split("\n")
    if left > 0:
        lines.insert(1 + MOST_ROWS, f"… and {left} more")
    return "\n".join(lines)


def _means(policy: str, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        scores = [row["scores"][name] for row in rows if name in row["scores"]]
        values = [each["value"] for each in scores if "value" in each]
        failed = f" ({len(scores) - len(values)} failed)" if len(values) < len(scores) else ""
        cells.append(f"{np.mean(values):.4g}{failed}" if values else f"-{failed}")
    return ["mean", policy, *cells]


def _cell(scores: Mapping[str, Any], name: str) -> str:
    if name not in scores:
        return "-"
    found = scores[name]
    return f"{found['value']:.4g}" if "value" in found else _short(f"failed: {found['failed']}", _LONGEST_REASON)


def _short(text: str, longest: int = _LONGEST) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
