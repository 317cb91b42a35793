"""Prompt sets as tensorflow-datasets, without TensorFlow: generated or read once, then the same everywhere.

One builder, one config of it a set. Its files are array_record, in the order of the rows, and are read by
`as_data_source`, which gives rows by their number; the library's default format and `as_dataset` would need TensorFlow.
The library (extra `prompt-sets`) is imported only where such a folder is written or read.
"""

import contextlib
import dataclasses
import functools
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fopd_jax.exits import need
from fopd_jax.parallel.distributed import barrier, is_main
from fopd_jax.tasks.prompt_set import PromptSet

FORMAT, VERSION = "array_record", "1.0.0"
_INFO, _FEATURES = "dataset_info.json", {"prompt", "metadata"}
_BUILDING_TIMEOUT_S = 3600.0


def is_built(path: Path) -> bool:
    """Whether a path is a folder of a set in this form."""
    try:
        return (path / _INFO).is_file()
    except OSError:  # no name that a file could have
        return False


def build(name: str, splits: Mapping[str, PromptSet], data_dir: Path, about: str) -> Path:
    """Write a set's splits to `data_dir/prompt_sets/NAME/VERSION`, whole or not at all; what is there stays as it is.

    Of several processes, which all call it, the first one writes. `about`: where the prompts come from.

    Returns:
      The folder, to be named as a source.

    Raises:
      ValueError: the extra is missing; or the folder holds other prompts.
      OSError: it cannot be written.
    """
    builder = _builder()(data_dir=str(data_dir), config=_config()(name=name, description=about, splits=splits))
    folder = Path(str(builder.data_path))
    if is_main():
        if is_built(folder):
            _check_same(folder, splits)
        else:
            with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as nothing:
                builder.download_and_prepare(download_dir=nothing, file_format=FORMAT)  # it prints, and makes folders
    barrier(f"the prompt set {name} is built", _BUILDING_TIMEOUT_S)
    return folder


def read_built(folder: Path, split: str, field: str) -> PromptSet:
    """One split of a set.

    Raises:
      ValueError: the extra is missing; the folder is damaged, or no set of prompts; names field and folder.
    """
    tfds = _library(field)
    try:
        builder = tfds.builder_from_directory(str(folder))
        splits, features = list(builder.info.splits), set(builder.info.features or ())
        if features != _FEATURES or split not in splits:
            what = f"splits {', '.join(splits) or 'none'} of {', '.join(sorted(features)) or 'nothing'}"
            raise ValueError(f"found {what}, expected the split {split!r} of prompt and metadata")
        source = builder.as_data_source(split=split)
        rows = source.__getitems__(range(len(source)))
        texts = tuple(row["prompt"].decode() for row in rows)
        metadata = tuple(json.loads(row["metadata"]) for row in rows)
    except Exception as error:  # of array_record and of the library there are many kinds
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{field}: {folder}: no prompt set that can be read ({said})") from error
    return PromptSet(texts, metadata if any(metadata) else (), f"a prompt set of {FORMAT}")


def _check_same(folder: Path, splits: Mapping[str, PromptSet]) -> None:
    for name, prompts in splits.items():
        there = read_built(folder, name, "--data-dir")
        if (there.texts, tuple(there.beside())) != (prompts.texts, tuple(prompts.beside())):
            raise ValueError(f"--data-dir: {folder} holds other prompts in {name!r}; remove it, or choose another")


def _library(field: str) -> Any:
    need(field, "prompt-sets", "tensorflow_datasets")
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    return tfds


@functools.cache
def _config() -> Any:
    """The class of configs: one a set. The rows are no part of what is shown of it."""

    @dataclasses.dataclass(eq=False)
    class PromptSetConfig(_library("--data-dir").core.BuilderConfig):
        splits: Mapping[str, PromptSet] = dataclasses.field(default_factory=dict, repr=False)

    return PromptSetConfig


@functools.cache
def _builder() -> Any:
    """The class of the builder, which cannot be made without the library."""
    tfds = _library("--data-dir")

    class PromptSets(tfds.core.GeneratorBasedBuilder):
        """Prompts, and as JSON what stands beside each."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> Any:
            text = tfds.features.Text
            return tfds.core.DatasetInfo(
                builder=self, description=self.__doc__, disable_shuffling=True,
                features=tfds.features.FeaturesDict({"prompt": text(), "metadata": text()}),
            )  # fmt: skip

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {name: self._generate_examples(prompts) for name, prompts in self.builder_config.splits.items()}

        def _generate_examples(self, prompts: PromptSet) -> Iterator[tuple[int, dict[str, str]]]:
            for i, (text, metadata) in enumerate(zip(prompts.texts, prompts.beside(), strict=True)):
                yield i, {"prompt": text, "metadata": json.dumps(metadata, ensure_ascii=False)}

    return PromptSets
