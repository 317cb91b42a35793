"""A set of prompts: texts in an order, what stands beside each, and what was peculiar about its file."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from fopd_jax.rewards.reward import Metadata


class Row(NamedTuple):
    """One prompt of a file, with the line (from 1) or, of a list, the entry where it begins."""

    place: int
    prompt: str
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Order and repeats are those of the source; `metadata`: one each, or () where nothing stands beside any.

    `form`: what it was read as; `quirks`: what reading evened out, in words, a phrase each.

    Raises:
      ValueError: texts and metadata differ in number.
    """

    texts: tuple[str, ...]
    metadata: tuple[Metadata, ...] = ()
    form: str = "one prompt a line"
    quirks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.metadata and len(self.metadata) != len(self.texts):
            raise ValueError(f"prompts: found metadata of {len(self.metadata)} among {len(self.texts)} prompts")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def repeats(self) -> int:
        """Rows whose text an earlier one has."""
        return len(self.texts) - len(set(self.texts))

    def beside(self) -> Sequence[Metadata]:
        """Metadata of every prompt, {} where nothing stands beside it."""
        return self.metadata or ({},) * len(self.texts)
