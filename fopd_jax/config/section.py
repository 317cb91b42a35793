"""What a config is made of: sections, which are dataclasses until they are frozen, and their fields."""

import dataclasses
from typing import Any, NoReturn

from fopd_jax.config.rules import Rule

_FROZEN = "settings are frozen once a run has begun"


def setting(default: Any, doc: str, rule: Rule | None = None, paper: str = "", *, open_names: bool = False) -> Any:
    """A field with its description, its rule and the authors' value; a dict or a section is made anew each time.

    `open_names`: a flag may name an entry of this dict that is not there yet, which makes it.
    """
    metadata = {"doc": doc, "rule": rule, "paper": paper, "open": open_names}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Settings, to be changed until they are frozen.

    Raises:
      AttributeError: a field that is not there is set, which names it and those there are, or one is removed.
      dataclasses.FrozenInstanceError: after `freeze`.
    """

    _frozen = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self._frozen:
            raise dataclasses.FrozenInstanceError(f"{name}: {_FROZEN}")
        if name not in (known := [each.name for each in dataclasses.fields(self)]):  # type: ignore[arg-type]
            raise AttributeError(f"{type(self).__name__} has no field {name!r}, only {', '.join(known)}")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name}: settings are changed, not removed")

    def freeze(self) -> None:
        """Let nothing be changed any more."""
        object.__setattr__(self, "_frozen", True)


class FrozenDict(dict[str, Any]):
    """Entries of a frozen section. Still a dict: to read, to compare, to write as JSON.

    Raises:
      dataclasses.FrozenInstanceError: they are changed.
    """

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise dataclasses.FrozenInstanceError(_FROZEN)

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)
