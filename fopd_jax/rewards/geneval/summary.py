"""What a set of images is worth by GenEval, every way that it is quoted."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fopd_jax.rewards.geneval.records import TAGS
from fopd_jax.rewards.geneval.rule import VALUES


def summary(details: Sequence[Mapping[str, Any]], metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over images from the details that the reward keeps of each, and the records of their prompts, as JSON.

    Of each of the four values: `tag_mean`, the mean over tags of the mean over their images (the published score, if
    official and of all six tags); `image_mean`; `tags`, by name. Of official and exact also `prompt_mean`: of how many
    prompts (equal records are one) any image is right. What failed is in `failed` and in no mean; a mean of nothing
    is None.

    Raises:
      ValueError: there are not as many records as images.
    """
    if len(details) != len(metadata):
        raise ValueError(f"GenEval summary: found {len(metadata)} records of {len(details)} images, expected one each")
    scored = [(seen, record) for seen, record in zip(details, metadata, strict=True) if "error" not in seen]
    results: dict[str, Any] = {"images": len(details), "failed": len(details) - len(scored)}
    for value in VALUES:
        tags, prompts = {}, {}
        for seen, record in scored:
            tags.setdefault(record["tag"], []).append(float(seen[value]))
            prompts.setdefault(json.dumps(record, sort_keys=True), []).append(float(seen[value]))
        by_tag = {tag: float(np.mean(tags[tag])) for tag in TAGS if tag in tags}
        every = [number for numbers in tags.values() for number in numbers]
        results[value] = {"tag_mean": _mean(list(by_tag.values())), "image_mean": _mean(every), "tags": by_tag}
        if value in ("official", "exact"):
            results[value]["prompt_mean"] = _mean([max(numbers) for numbers in prompts.values()])
    return results


def _mean(numbers: Sequence[float]) -> float | None:
    return float(np.mean(numbers)) if len(numbers) else None
