"""The card of an adapter: what its file says of itself, how it was trained and how to use it.

A card is JSON in the file's metadata, see `interop.lora.cards`. Scale, layers and numbers are the tensors' own; a card
tells what tensors cannot, above all under which guidance scale they were trained: an adapter that learned without
guidance draws badly under 4.5, and teaches what it draws.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_LARGEST = 1e300  # a whole number beyond it is no float


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and _is_number(each) for key, each in value.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


class _Rule(NamedTuple):
    """What a field's value may be in JSON, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


_FLOATS = ("guidance", "alpha", "coordinates_high")
_TEXT = _Rule("a text", _is_text)
_TEXTS = _Rule("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value)))
_COUNT = _Rule("a whole number of at least 0", lambda value: type(value) is int and value >= 0)
_NUMBERS = _Rule("an object of finite numbers", _are_numbers)
_RULES: Mapping[str, _Rule] = {
    "algorithm": _TEXT,
    "rewards": _NUMBERS,
    "guidance": _Rule("a number from 0 to 100", lambda value: _is_number(value) and 0 <= value <= 100),
    "resolution": _Rule("[height, width] in pixels", _is_size),
    "train_steps": _COUNT,
    "eval_steps": _COUNT,
    "preset": _TEXT,
    "base": _TEXT,
    "rank": _Rule("a whole number of at least 1", lambda value: type(value) is int and value >= 1),
    "alpha": _Rule("a finite number other than 0", lambda value: _is_number(value) and value != 0),
    "targets": _TEXTS,
    "updates": _COUNT,
    "scores": _NUMBERS,
    "scored_at": _COUNT,
    "config": _TEXT,
    "config_hash": _TEXT,
    "version": _TEXT,
    "coordinates": _TEXTS,
    "coordinates_high": _Rule("a number from 1 to 2", lambda value: _is_number(value) and 1 <= value <= 2),
}


@dataclasses.dataclass(frozen=True)
class AdapterCard:
    """What is not known is empty or None.

    `algorithm`: `flow_grpo`, `diffusion_nft`, `flow_matching`, `opd`, …; `rewards`: names with weights. `guidance`: the
    scale to use it under, 1: none. `resolution`: (height, width) in pixels of what it was trained on. `train_steps` of
    the sampler that rolled out, `eval_steps` of the one that was evaluated. `preset` and `base`: the network and the
    SHA-256 of its weights (`stages.cards.base_hash`). `rank`, `alpha`, `targets`: its geometry. `updates`: how many.
    `scores`: of the newest evaluation, made after `scored_at` updates. `config`, `config_hash`, `version`: name and
    identity of what trained it, and of which program. `coordinates`: the skills that it has a dial for, in their order,
    trained up to `coordinates_high`; 1 is where nobody turns them.
    """

    algorithm: str = ""
    rewards: Mapping[str, float] = dataclasses.field(default_factory=dict)
    guidance: float | None = None
    resolution: tuple[int, int] | None = None
    train_steps: int | None = None
    eval_steps: int | None = None
    preset: str = ""
    base: str = ""
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    updates: int | None = None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scored_at: int | None = None
    config: str = ""
    config_hash: str = ""
    version: str = ""
    coordinates: tuple[str, ...] = ()
    coordinates_high: float | None = None

    @property
    def scale(self) -> float | None:
        """By which the update is multiplied, as `adapters.lora.Adapter.scale`."""
        return None if self.alpha is None or self.rank is None else self.alpha / self.rank

    def fields(self) -> dict[str, Any]:
        """What is known, in JSON types and in the order of the fields; equal cards give equal fields."""
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in known.items() if value not in ("", None, (), {})}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(sorted(value.items()))
    return list(value) if isinstance(value, tuple) else value


def parse_card(found: Any) -> AdapterCard:
    """The card that JSON holds. Fields that no one here knows are a later version's, and left alone.

    Raises:
      ValueError: it is no object, or a field is of another type or out of range; names field, found and right value.
    """
    if not isinstance(found, dict):
        raise ValueError(f"found JSON of type {type(found).__name__}, expected an object")
    for name, value in found.items():
        if name in _RULES and not _RULES[name].holds(value):
            text = repr(value)
            raise ValueError(f"{name}: found {text[:80]}{'…' * (len(text) > 80)}, expected {_RULES[name].expected}")
    known: dict[str, Any] = {name: _typed(name, value) for name, value in found.items() if name in _RULES}
    return AdapterCard(**known)


def _typed(name: str, value: Any) -> Any:
    """A field's value in its own type, of which JSON has fewer."""
    return tuple(value) if isinstance(value, list) else float(value) if name in _FLOATS else value
