"""JSON as prompts: a record a line, or one list of records or of texts.

A record is an object with a text under `prompt`; what else it holds is the prompt's metadata. Read so are GenEval's
metadata and its successors', Flow-Factory's (`metadata`, an object or one as a JSON text, is taken apart), T2I-R1's,
LongText-Bench's and packed DPG-Bench. Records with `include` are GenEval's and are checked as such, since one that
lacks a count would be scored as if it asked for nothing.
"""

import json
from collections.abc import Mapping
from typing import Any

from fopd_jax.tasks.prompt_set import Row

_SHOWN = 60  # characters of what was found, in a message


def read_records(lines: list[str], place: str) -> list[Row]:
    """A record of each line that is not blank.

    Raises:
      ValueError: a line holds none; names it, and the key.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            at = f"{place}, line {number}"
            rows.append(Row(number, *_record(_parse(line, at), at)))
    return rows


def read_list(text: str, place: str) -> list[Row]:
    """The entries of one JSON list: texts, as HPSv2's, or records, as ImageReward's.

    Raises:
      ValueError: it is none; names the line, or the entry (from 1) and its key.
    """
    found = _parse(text, place, lines=True)
    if not isinstance(found, list):
        raise ValueError(f"{place}: found a JSON {type(found).__name__}, expected a list of prompts")
    rows = []
    for number, entry in enumerate(found, start=1):
        record = (entry, {}) if isinstance(entry, str) else _record(entry, f"{place}, entry {number}")
        rows.append(Row(number, *record))
    return rows


def _parse(text: str, place: str, lines: bool = False) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f", line {error.lineno}" if lines else ""
        raise ValueError(f"{place}{where}: no JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # NaN, numbers of thousands of digits, nesting without an end
        raise ValueError(f"{place}: no JSON that can be read ({' '.join(str(error).split())[:_SHOWN]})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _record(found: Any, place: str) -> tuple[str, dict[str, Any]]:
    """Prompt and metadata."""
    if not isinstance(found, dict):
        raise ValueError(f'{place}: found {_short(found)}, expected an object {{"prompt": …}}')
    if "prompt" not in found:
        keys = ", ".join(map(repr, [*found][:6])) or "none"
        raise ValueError(f"{place}: no key 'prompt'; keys: {keys}")
    prompt, metadata = found["prompt"], {name: value for name, value in found.items() if name != "prompt"}
    if not isinstance(prompt, str):
        raise ValueError(f"{place}: key 'prompt': found {_short(prompt)}, expected a text")
    if "metadata" in metadata:
        metadata = _taken_apart(prompt, metadata, place)
    if metadata.keys() & {"include", "exclude"}:
        _check_geneval(metadata, place)
    return prompt, metadata


def _taken_apart(prompt: str, fields: dict[str, Any], place: str) -> dict[str, Any]:
    """Fields whose `metadata`, an object or one as JSON text, stands among them; the prompt's copy in it is left out."""
    inner = fields.pop("metadata")
    at = f"{place}: key 'metadata'"
    if isinstance(inner, str):
        inner = _parse(inner, at)
    if not isinstance(inner, dict):
        raise ValueError(f"{at}: found {_short(inner)}, expected an object, or one as a JSON text")
    inner = {name: value for name, value in inner.items() if (name, value) != ("prompt", prompt)}
    if both := sorted(name for name in inner.keys() & fields.keys() if inner[name] != fields[name]):
        raise ValueError(f"{at}: its {both[0]!r} is {_short(inner[both[0]])}, beside it {_short(fields[both[0]])}")
    return fields | inner


# ---- GenEval


def _check_geneval(metadata: Mapping[str, Any], place: str) -> None:
    """What every record of GenEval's form has; which tags and further keys there are is the reward's to know."""
    _expect(isinstance(metadata.get("tag"), str), f"{place}: key 'tag'", metadata.get("tag"), "a text")
    for name in ("include", "exclude"):
        if name in metadata or name == "include":
            _check_objects(metadata.get(name), f"{place}: key {name!r}")


def _check_objects(found: Any, place: str) -> None:
    _expect(isinstance(found, list) and len(found) > 0, place, found, "a list of objects")
    for number, each in enumerate(found):
        at = f"{place}, object {number}"
        _expect(isinstance(each, dict), at, each, '{"class": …, "count": …}')
        _expect(isinstance(each.get("class"), str) and bool(each["class"]), f"{at}, 'class'", each.get("class"), "a name")
        count = each.get("count")
        _expect(type(count) is int and count > 0, f"{at}, 'count'", count, "a whole number above 0")
        _expect(isinstance(each.get("color", ""), str), f"{at}, 'color'", each.get("color"), "a name")
        if "position" in each:
            _expect(
                _is_position(each["position"], number, len(found)), f"{at}, 'position'", each["position"],
                "[relation, index of another object]",
            )  # fmt: skip


def _is_position(found: Any, own: int, objects: int) -> bool:
    if not (isinstance(found, list) and len(found) == 2 and isinstance(found[0], str) and type(found[1]) is int):
        return False
    return 0 <= found[1] < objects and found[1] != own


def _expect(holds: bool, place: str, found: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{place}: found {_short(found)}, expected {expected}")


def _short(found: Any) -> str:
    text = json.dumps(found, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
