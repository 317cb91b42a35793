"""Sets of what teachers have drawn, as tensorflow-datasets without TensorFlow: `fopd_jax.demonstrate` makes them.

A set is a folder of array_record shards, each of one task, and a claim, `demonstrations.json`, which says what is in it
and where it comes from. Shards get their names whole and are never made again; beside each stands how many rows it has
and which samples could not be scored. Features and split are written last, so that who reads the folder as a dataset
finds all of it. The library (extra `prompt-sets`) is imported only where rows are written or read.
"""

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fopd_jax.exits import need
from fopd_jax.files import replacing, write_json, write_text
from fopd_jax.parallel.distributed import warn
from fopd_jax.reading import parse_json, read_regular

NAME, SPLIT, FORMAT, VERSION = "demonstrations", "train", "array_record", "1.0.0"
CLAIM, INFO = "demonstrations.json", "dataset_info.json"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some samples of one task: its draws number `start` to `stop`."""

    number: int
    task: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """What rows hold: latents `[h, w, c]` in `dtype`, and of so many `levels` states and velocities, 0 for none."""

    latents: tuple[int, int, int]
    dtype: str = "float32"
    levels: int = 0

    def features(self) -> Any:
        """Of tensorflow-datasets."""
        find = _library("--out").features

        def array(*shape: int) -> Any:
            return find.Tensor(shape=shape, dtype=np.dtype(self.dtype), encoding="bytes")

        found = {
            "prompt": find.Text(), "task": find.Text(), "metadata": find.Text(),
            "id": find.Scalar(np.int64), "sample": find.Scalar(np.int64), "seed": find.Scalar(np.int64),
            "score": find.Scalar(np.float32), "latents": array(*self.latents),
        }  # fmt: skip
        if self.levels:
            seen = (self.levels, *self.latents)
            found |= {"sigmas": find.Tensor(shape=(self.levels,), dtype=np.float32, encoding="bytes")}
            found |= {"states": array(*seen), "velocities": array(*seen)}
        return find.FeaturesDict(found)


def cut(tasks: Mapping[str, int], rows: int) -> list[Shard]:
    """Shards of at most so many draws for each task's number of them."""
    starts = [(task, count, start) for task, count in tasks.items() for start in range(0, count, rows)]
    return [Shard(k, task, start, min(start + rows, count)) for k, (task, count, start) in enumerate(starts)]


# ---- writing


def claim(folder: Path, claimed: Mapping[str, Any]) -> None:
    """Begin a set in a folder, or go on with it.

    Raises:
      ValueError: it holds another set, or other things; names them.
    """
    path, wanted = folder / CLAIM, json.loads(json.dumps(claimed))
    if path.is_file():
        there = read_claim(folder, "--out")
        if differing := [name for name, value in wanted["identity"].items() if there["identity"].get(name) != value]:
            name = differing[0]
            found, expected = (each["identity"].get(name) for each in (there, wanted))
            raise ValueError(
                f"--out: {folder} holds demonstrations with {name} = {found!r}, but here it is {expected!r}"
            )
        if there.get("versions") != wanted.get("versions"):
            warn(f"--out: {folder} was begun by {there.get('versions')}; shards of {wanted.get('versions')} may round")
        return
    visible = [each.name for each in folder.iterdir() if not each.name.startswith(".")] if folder.is_dir() else []
    if others := sorted(visible):
        raise ValueError(f"--out: {folder} holds {others[0]}, expected a folder that is new or holds demonstrations")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def finished(folder: Path, count: int) -> list[int]:
    """The numbers of the shards that are there."""
    return [number for number in range(count) if _shard(folder, number, count).is_file()]


def write_shard(
    folder: Path, shard: Shard, count: int, layout: Layout, rows: Sequence[Row], failed: Sequence[Mapping[str, Any]]
) -> None:
    """Write a shard of so many; equal rows give equal bytes. `failed`: the samples that nobody could score."""
    from array_record.python.array_record_module import ArrayRecordWriter

    serialise = _serialiser(layout)
    scores = [float(row["score"]) for row in rows if np.isfinite(row["score"])]
    about = {"task": shard.task, "draws": [shard.start, shard.stop], "rows": len(rows), "failed": list(failed)}
    about |= {"score": float(np.mean(scores)) if scores else None, "prompts": [row["prompt"] for row in rows]}
    write_json(_beside(folder, shard.number), about)
    with (
        replacing(_shard(folder, shard.number, count), durable=True) as temporary,
        contextlib.closing(ArrayRecordWriter(str(temporary), "group_size:1")) as writer,
    ):
        for row in rows:
            writer.write(serialise(row))


def finish(folder: Path, count: int, layout: Layout, about: str) -> None:
    """Write what makes a folder of whole shards a dataset, and remove what killed programs had begun."""
    core = _library("--out").core
    for begun in folder.glob(f".{NAME}-*.tmp"):
        begun.unlink()
    template = core.ShardedFileTemplate(data_dir=folder, dataset_name=NAME, split=SPLIT, filetype_suffix=FORMAT)
    sizes = [_shard(folder, number, count).stat().st_size for number in range(count)]
    lengths = [_rows(folder, number) for number in range(count)]
    split = core.SplitInfo(
        name=SPLIT, shard_lengths=lengths, num_bytes=sum(sizes), filename_template=template
    )  # fmt: skip
    named = core.dataset_info.DatasetIdentity(
        name=NAME, version=core.Version(VERSION), data_dir=str(folder), module_name=""
    )  # fmt: skip
    info = core.DatasetInfo(builder=named, features=layout.features(), description=about, disable_shuffling=True)
    info.set_file_format(FORMAT)
    info.set_splits(core.splits.SplitDict([split]))
    with tempfile.TemporaryDirectory() as made:
        info.write_to_directory(made)
        for path in sorted(Path(made).iterdir(), key=lambda each: each.name == INFO):  # that one last
            write_text(folder / path.name, path.read_text(encoding="utf-8"))


def _serialiser(layout: Layout) -> Callable[[Row], bytes]:
    """A row as the library writes it, but its fields in one order: a map's is another in every process."""
    features = layout.features()
    serializer = _library("--out").core.example_serializer.ExampleSerializer(features.get_serialized_info())
    return lambda row: serializer.get_tf_example(features.encode_example(row)).SerializeToString(deterministic=True)


def abouts(folder: Path, count: int) -> list[dict[str, Any]]:
    """What stands beside each shard: `task`, `draws`, `rows`, their mean `score` (or None), `prompts`, and `failed`
    samples."""
    return [_about(folder, number) for number in range(count)]


# ---- reading


def is_set(folder: Path) -> bool:
    """Whether a folder holds demonstrations, whole or begun."""
    return (folder / CLAIM).is_file()


def read_claim(folder: Path, field: str) -> dict[str, Any]:
    """What a set says of itself.

    Raises:
      ValueError: it is damaged; names field and file.
    """
    try:
        found = parse_json(read_regular(folder / CLAIM))
        if isinstance(found, dict) and isinstance(found.get("identity"), dict) and isinstance(found.get("shards"), int):
            return found
    except (OSError, ValueError):
        pass
    raise ValueError(f"{field}: {folder / CLAIM}: damaged, expected what fopd_jax.demonstrate writes")


class Demonstrations:
    """The rows of one task of a set, by their number; `claim`: what the set says of itself, `prompts`: of all rows.

    Raises:
      ValueError: the extra is missing; the set is damaged or not whole, or has no rows of the task; names the field.
    """

    def __init__(self, folder: Path, task: str, field: str) -> None:
        self.folder, self.task, self._field = folder, task, field
        self.claim = read_claim(folder, field)
        count = self.claim["shards"]
        if len(there := finished(folder, count)) < count or not (folder / INFO).is_file():
            raise ValueError(
                f"{field}: {folder} holds {len(there)} of {count} shards; the command that began it makes the others"
            )
        about = abouts(folder, count)
        first = np.cumsum([0, *(each["rows"] for each in about)])
        spans = [range(first[k], first[k + 1]) for k, each in enumerate(about) if each["task"] == task]
        self._places = [place for span in spans for place in span]
        self.prompts = tuple(prompt for each in about if each["task"] == task for prompt in each["prompts"])
        if not self._places:
            names = ", ".join(dict.fromkeys(each["task"] for each in about))
            raise ValueError(f"{field}: {folder} holds demonstrations of {names}, expected some of {task!r}")
        latents, dtype, levels = self.claim["layout"]
        self.layout = Layout(tuple(latents), dtype, levels)

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Some rows, their texts as text.

        Raises:
          ValueError: a shard is damaged; names field and folder.
        """
        try:
            found = self._source.__getitems__([self._places[number] for number in numbers])
        except Exception as error:  # of array_record and of the library there are many kinds
            said = " ".join(str(error).split())[:300]
            raise ValueError(f"{self._field}: {self.folder}: demonstrations that cannot be read ({said})") from error
        texts = ("prompt", "task", "metadata")
        return [row | {name: row[name].decode() for name in texts} for row in found]

    @functools.cached_property
    def _source(self) -> Any:
        return _library(self._field).builder_from_directory(str(self.folder)).as_data_source(split=SPLIT)


def _shard(folder: Path, number: int, count: int) -> Path:
    return folder / f"{NAME}-{SPLIT}.{FORMAT}-{number:05d}-of-{count:05d}"


def _beside(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.json"


def _about(folder: Path, number: int) -> dict[str, Any]:
    return parse_json(read_regular(_beside(folder, number)))


def _rows(folder: Path, number: int) -> int:
    return _about(folder, number)["rows"]


def _library(field: str) -> Any:
    need(field, "prompt-sets", "tensorflow_datasets")
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    return tfds
