"""Cards of adapters in files of any layout: in the metadata of the tensors' file, in folders also beside it.

PEFT, diffusers and ComfyUI leave metadata alone that they do not know, but write none of it again. A folder has its
card in `fopd_jax.json` too, which people can read.
"""

import json
from pathlib import Path
from typing import Any

from fopd_jax.adapters.card import AdapterCard, parse_card
from fopd_jax.exits import naming
from fopd_jax.files import write_json
from fopd_jax.interop.files.safetensors import CARD, read_header
from fopd_jax.interop.lora.files import DIFFUSERS_TENSORS, PEFT_TENSORS
from fopd_jax.reading import is_taken, parse_json, read_regular

CARD_FILE = "fopd_jax.json"


def read_card(path: Path) -> AdapterCard | None:
    """The card of a file or folder that holds an adapter; None where it has none, or there is no adapter.

    Raises:
      ValueError: the file is damaged, its card is none, or a folder has two that differ; names file and field.
    """
    tensors = path
    if path.is_dir():
        held = [path / name for name in (PEFT_TENSORS, DIFFUSERS_TENSORS) if (path / name).is_file()]
        if not held:
            return None
        tensors = held[0]  # whoever loads it refuses two
    if not tensors.is_file():
        return None
    with naming(tensors):
        header = read_header(tensors)
        with naming(f"metadata {CARD}"):
            inside = _parse(header[CARD]) if CARD in header else None
    beside = _read_beside(tensors)
    if inside is not None and beside is not None and inside != beside:
        ours, theirs = beside.fields(), inside.fields()
        field = next(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"{tensors.with_name(CARD_FILE)}: {field}: found {ours.get(field)!r}, but {tensors.name} says "
            f"{theirs.get(field)!r}; remove {CARD_FILE}, or write the adapter again"
        )
    return inside or beside


def _parse(text: str | bytes) -> AdapterCard:
    try:
        found: Any = parse_json(text)
    except ValueError as error:  # JSON's and Unicode's errors are kinds of it
        raise ValueError(f"damaged JSON ({error})") from error
    return parse_card(found)


def _read_beside(tensors: Path) -> AdapterCard | None:
    path = tensors.with_name(CARD_FILE)
    if tensors.name not in (PEFT_TENSORS, DIFFUSERS_TENSORS) or not is_taken(path):
        return None
    with naming(path):
        return _parse(read_regular(path))


def card_metadata(card: AdapterCard | None) -> dict[str, str]:
    """What a file's metadata hold of a card, as text."""
    return {} if card is None else {CARD: json.dumps(card.fields())}


def write_beside(folder: Path, card: AdapterCard | None) -> None:
    """Write it into a folder as a file of its own."""
    if card is not None:
        write_json(folder / CARD_FILE, card.fields())
