"""The OCR reward: how closely the text read in an image matches the text its prompt quotes.

Flow-GRPO's rule (Liu et al. 2025), with RapidOCR in processes of its own (`recogniser`) for its PaddleOCR. The
miniature reads its glyphs itself and takes the rule alone.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.exits import need
from fopd_jax.rewards.cores import cores
from fopd_jax.rewards.options import read_options
from fopd_jax.rewards.recogniser import MOST_WORKERS, Recogniser
from fopd_jax.rewards.reward import Metadata, Reward, Scores, collect

_QUOTED = (
    re.compile(r'"([^"]*)"'),
    re.compile(r"“([^“”]*)”"),
    re.compile(r"‘((?:[^‘’]|\b’\b)*)’"),
    re.compile(r"(?<!\w)'((?:[^']|\b'\b)*)'(?!\w)"),
)
"""Double quotes, as published; then the others, an apostrophe inside a word being no quote."""


@dataclasses.dataclass(frozen=True)
class Options:
    """`workers`: processes that read, 0: one a core. `timeout`: seconds an image may take.

    `substring`: a target that occurs anywhere in what was read is right, so stray text is free; without it every
    stray character is one edit. `extra_text_penalty`: what is taken off for as many stray characters as the target
    has, in proportion. `quotes`: 'double' takes targets from "…" alone, 'any' also from “…”, ‘…’ and '…' where there
    are none.
    """

    workers: int = 0
    timeout: float = 60.0
    substring: bool = True
    extra_text_penalty: float = 0.0
    quotes: str = "double"

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= 1024:
            raise ValueError(f"workers: found {self.workers}, expected 0 (one a core) to 1024")
        if not 0 < self.timeout <= 1e6:
            raise ValueError(f"timeout: found {self.timeout}, expected seconds above 0, at most 1e6")
        if not 0 <= self.extra_text_penalty <= 1e6:
            raise ValueError(f"extra_text_penalty: found {self.extra_text_penalty}, expected 0 to 1e6")
        if self.quotes not in ("double", "any"):
            raise ValueError(f"quotes: found {self.quotes!r}, expected 'double' or 'any'")


def make(name: str, settings: RewardConfig, server: Server | None) -> Reward:
    """The reward `ocr`: in [0, 1], on the host's cores. It has no server: whoever serves it makes it so.

    Details of an image: `read`, all its text in the detector's order, `target` and `distance`, the edits between them.

    Raises:
      ValueError: bad options, weights (it has its own), a package or its models are missing. Names the field.
    """
    options = read_options(Options, settings.options, f"rewards.{name}.options")
    if settings.weights:
        raise ValueError(f"rewards.{name}.weights: found {settings.weights!r}, expected none: rapidocr has its models")
    need(f"rewards.{name}", "ocr", "rapidocr", "onnxruntime")
    try:
        recogniser = Recogniser(options.workers or min(cores(), MOST_WORKERS), options.timeout)
    except ValueError as error:
        raise ValueError(f"rewards.{name}: RapidOCR does not start: {error}") from error
    return Reward(
        name,
        functools.partial(_score, recogniser, options),
        (0.0, 1.0),
        "host",
        check=functools.partial(_check, options),
        close=recogniser.close,
    )


def _score(
    recogniser: Recogniser,
    options: Options,
    images: UInt8[np.ndarray, "n h w 3"],
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> Scores:
    texts = recogniser.read(images)
    return collect([_rate(*row, options) for row in zip(texts, prompts, metadata, strict=True)])


def _rate(
    lines: list[str] | Exception, prompt: str, metadata: Metadata, options: Options
) -> tuple[float, Metadata] | Exception:
    if isinstance(lines, Exception):
        return lines
    try:
        target = find_target(prompt, metadata, options.quotes)
    except ValueError as error:
        return error
    read = "".join(lines)
    value, distance = rate(read, target, options.substring, options.extra_text_penalty)
    return value, {"read": read, "target": target, "distance": distance}


def _check(options: Options, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    wrong = []
    for prompt, record in zip(prompts, metadata, strict=True):
        try:
            find_target(prompt, record, options.quotes)
        except ValueError as error:
            wrong.append(error)
    if wrong:
        among = f" (one of {len(wrong)} such among {len(prompts)})" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{among}")


# ---- the rule


def find_target(prompt: str, metadata: Metadata, quotes: str = "double") -> str:
    """The text that an image should show: its metadata's `target` or `text`, else what its prompt quotes first.

    Raises:
      ValueError: there is none, or it is no text, or nothing but spaces.
    """
    for key in ("target", "text"):
        if key in metadata:
            target = metadata[key]
            if not isinstance(target, str) or not normalise(target):
                raise ValueError(f"OCR prompt {prompt!r} has the {key} {target!r} beside it, expected a text to read")
            return target
    return quoted_target(prompt, quotes)


def quoted_target(prompt: str, quotes: str = "double") -> str:
    """The text between the prompt's first two double quotes, as written; with quotes "any", else between others.

    Raises:
      ValueError: the prompt quotes no text, or nothing but spaces.
    """
    found = next(filter(None, (each.search(prompt) for each in _QUOTED[: None if quotes == "any" else 1])), None)
    if found is None:
        raise ValueError(f'OCR prompt {prompt!r} must hold its target text in double quotes, like: sign "K7B"')
    if not normalise(found[1]):
        raise ValueError(f"OCR prompt {prompt!r} has empty double quotes: write the target text between them")
    return found[1]


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))  # row[j]: distance of the part of a seen so far to b[:j]
    for i, char_a in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, char_b in enumerate(b, start=1):
            substituted = diagonal + int(char_a != char_b)
            diagonal = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def rate(read: str, target: str, substring: bool = True, extra_text_penalty: float = 0.0) -> tuple[float, int]:
    """(1 - d / n - penalty · extra / n, at least 0; d). Case and spaces do not count.

    n: the target's length; d: the edit distance of `read` to it, at most n, and 0 if `substring` and it occurs in
    `read`; extra: how many characters more than n were read.
    """
    wanted, found = normalise(target), normalise(read)
    n = len(wanted)
    distance = 0 if substring and wanted in found else min(edit_distance(found, wanted), n)
    return max(0.0, 1.0 - distance / n - extra_text_penalty * max(0, len(found) - n) / n), distance


def ocr_reward(read: str, prompt: str) -> float:
    """The published reward in [0, 1] of what was read against the prompt's quoted target.

    Raises:
      ValueError: the prompt quotes no text.
    """
    return rate(read, quoted_target(prompt))[0]


def normalise(text: str) -> str:
    """What of a text counts: neither case nor spaces."""
    return text.replace(" ", "").lower()
