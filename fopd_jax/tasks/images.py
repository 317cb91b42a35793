"""Folders of captioned images: their files, and the caption of each.

Captions stand in `metadata.jsonl` as Hugging Face's imagefolder has it (a line `{"file_name": …, "text": …}` an image;
`caption` for `text` is read too), or else each in a text file of its image's name: `cat.txt` beside `cat.png`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fopd_jax.config.schema import Pairs
from fopd_jax.reading import read_regular
from fopd_jax.tasks.demonstrations import Demonstrations, is_set
from fopd_jax.tasks.sources import read_set
from fopd_jax.tasks.task import Task

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"


def read_image_tasks(tasks: Mapping[str, Pairs]) -> dict[str, Task]:
    """The tasks whose captioned images and held-out prompts lie in files; they have no scores of their own.

    Raises:
      ValueError: as `read_captions` for `tasks.NAME.images`, and `read_set` for `tasks.NAME.test`.
    """
    found = {}
    for name, pairs in tasks.items():
        captions, images = read_pairs(name, pairs)
        test = read_set(pairs.test, f"tasks.{name}.test", "test")
        found[name] = Task(name, captions, test.texts, images=images, test_metadata=test.metadata)
    return found


def read_pairs(name: str, pairs: Pairs) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """A task's captions and their images; of a set of demonstrations, which are latents, the prompts alone.

    Raises:
      ValueError: as `read_captions` and `Demonstrations`; names `tasks.NAME.images`.
    """
    field = f"tasks.{name}.images"
    if pairs.images and is_set(Path(pairs.images)):
        return Demonstrations(Path(pairs.images), name, field).prompts, ()
    captions = read_captions(pairs.images, field)
    return tuple(captions.values()), tuple(captions)


def read_captions(folder: str, field: str) -> dict[Path, str]:
    """Every image of a folder with its caption, in the order of their names; no image is opened.

    Raises:
      ValueError: there is no such folder, or no image in it; an image has no caption, an empty one or two; a caption
        has no image. Names the config's field, the file and, in `metadata.jsonl`, the line.
    """
    path = Path(folder)
    if not folder or not path.is_dir():
        raise ValueError(
            f"{field}: found {folder!r}, expected a folder of images and their captions, as configs/sd35m_sft.py says"
        )
    images = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
    metadata = path / METADATA
    captions = _from_lines(metadata, field) if metadata.is_file() else _from_texts(images, field)
    if not captions:
        raise ValueError(f"{field}: {path} holds no images, expected {', '.join(SUFFIXES)}")
    if missing := [each for each in images if each not in captions]:
        raise ValueError(f"{field}: {missing[0]} has no caption: {_among(missing)}without a line in {METADATA}")
    return dict(sorted(captions.items()))


def _from_texts(images: list[Path], field: str) -> dict[Path, str]:
    texts: dict[Path, Path] = {}
    for image in images:
        text = image.with_suffix(".txt")
        if text in texts:
            raise ValueError(f"{field}: {texts[text]} and {image.name} are both captioned by {text.name}; rename one")
        texts[text] = image
    if missing := [image for text, image in texts.items() if not text.is_file()]:
        raise ValueError(
            f"{field}: {missing[0]} has no caption: {_among(missing)}without {METADATA} or a .txt beside it"
        )
    return {image: _caption(_read(text, field), f"{field}: {text}") for text, image in texts.items()}


def _from_lines(metadata: Path, field: str) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    for place, fields in _lines(metadata, field):
        name = fields.get("file_name")
        if not isinstance(name, str) or Path(name).suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"{place}: found file_name {name!r}, expected the name of an image ({', '.join(SUFFIXES)})"
            )
        image = metadata.parent / name
        if not image.is_file():
            raise ValueError(f"{place}: {image}: no such file")
        if image in captions:
            raise ValueError(f"{place}: {name} has a line already")
        captions[image] = _caption(fields.get("text", fields.get("caption")), place)
    return captions


def _lines(metadata: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place, in words, and its fields."""
    for number, line in enumerate(_read(metadata, field).splitlines(), start=1):
        place = f"{field}: {metadata}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: no JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f'{place}: found {line[:40]!r}, expected {{"file_name": …, "text": …}}')
        yield place, fields


def _caption(text: Any, place: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: found {text!r}, expected a caption (for empty ones there is empty_caption)")
    return " ".join(text.split())


def _read(path: Path, field: str) -> str:
    try:
        return read_regular(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{field}: {path}: cannot be read as UTF-8 text ({error})") from error


def _among(missing: list[Path]) -> str:
    return f"one of {len(missing)} images " if len(missing) > 1 else "it is "
