"""Published checkpoints → converted folders (see `converted`), and a transformer back.

Tensors are read one at a time and copied straight into the arrays that orbax writes: at no time are there two copies
of a network. A conversion happens in a hidden folder beside the destination, or inside where it exists already (it may
be another file system, or somebody's working directory), and is renamed into place when it is whole.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from fopd_jax.console import Progress
from fopd_jax.console import progress as shown
from fopd_jax.exits import GUIDE
from fopd_jax.interop.files.converted import (
    COMPONENTS,
    TABLE_FILE,
    TOKENIZERS,
    Converted,
    Manifest,
    abstract_params,
    find_damage,
    is_converted,
    load_params,
    load_table,
    make_component,
    parse_manifest,
    preset_of,
    read_manifest,
    save_params,
    save_table,
    write_manifest,
)
from fopd_jax.interop.files.tables import Assembler, Component, Shape, check_names, stream_tensors
from fopd_jax.interop.files.tensor_files import (
    TensorFiles,
    hash_file,
    open_tensor_file,
    open_tensor_files,
    read_json,
    write_tensor_file,
)
from fopd_jax.interop.files.tokenizers import open_tokenizer
from fopd_jax.interop.sd3 import original
from fopd_jax.interop.sd3.diffusers import TABLE
from fopd_jax.reading import real_path

OUTPUT_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_STAGE = ".partial"
_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # others: "model"
Tree = Any
Parts = Iterator[tuple[str, np.ndarray]]
Display = Callable[[str, int], contextlib.AbstractContextManager[Progress]]
"""Opens a display of a title and a total of bytes, and yields the function that counts them."""


def byte_bar(title: str, total: int) -> contextlib.AbstractContextManager[Progress]:
    """A `Display` for people."""
    return shown(title, total, sized=True)


@dataclasses.dataclass(frozen=True)
class Source:
    """One network of a source, its tensors' names, shapes and dtypes checked but not yet read.

    `tensors` are those that are used; `split` turns one into tensors under diffusers' names; `hashed` are the files
    that identify the source, by their path in it.
    """

    name: str
    config: Mapping[str, Any]
    component: Component
    tensors: TensorFiles
    split: Callable[[str, np.ndarray], Parts]
    hashed: Mapping[str, Path]

    def dtype(self, wanted: str) -> str:
        """What its parameters are stored in: the autoencoder, which runs in float32, is never narrowed."""
        return "float32" if self.name == "vae" else wanted

    def output_bytes(self, wanted: str) -> int:
        parameters = _count(self.component.shapes) * OUTPUT_DTYPES[self.dtype(wanted)].itemsize
        return parameters + _count(self.component.kept) * 4


def convert(
    src: Path, dst: Path, *, dtype: str, components: Sequence[str] | None = None, progress: Display
) -> list[str]:
    """Convert a diffusers pipeline folder, or an original single file, into `dst`; returns what was converted.

    Components that `dst` already holds whole, in this dtype and from files of the same hashes, are left alone.

    Raises:
      ValueError: anything about the source that is not as it should be; names the file, field or tensor.
      OSError: the destination cannot be written. Either way `dst` is as it was before.
    """
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {tuple(OUTPUT_DTYPES)}")
    dst = real_path(dst)
    _check_destination(src, dst)
    sources = open_sources(src, components)
    there = dict(parse_manifest(dst).components) if is_converted(dst) else {}
    hashes = {source.name: _hashes(source, progress) for source in sources}
    stale = [
        source
        for source in sources
        if (found := there.get(source.name)) is None
        or (found.source, found.dtype) != (hashes[source.name], source.dtype(dtype))
        or find_damage(dst, found)
    ]
    if not stale:
        return []
    with _staging(dst) as stage:
        _check_space(stage, sum(source.output_bytes(dtype) for source in stale))
        for source in stale:
            files = _write_component(source, stage, source.dtype(dtype), progress)
            there[source.name] = _describe(source, source.dtype(dtype), hashes[source.name], files, stage)
        preset = preset_of(Manifest("", there).transformer) if "transformer" in there else ""
        _install(stage, dst, Manifest(preset, there))
    return [source.name for source in stale]


def _count(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# ---- the source


def open_sources(src: Path, components: Sequence[str] | None) -> list[Source]:
    """The networks of a source, every tensor's name, shape and dtype checked.

    Raises:
      ValueError: see `convert`.
    """
    for name in components or ():
        if name not in COMPONENTS:
            raise ValueError(f"components: found {name!r}, expected some of {', '.join(COMPONENTS)}")
    if src.is_file():
        if components and set(components) != {"transformer"}:
            raise ValueError(f"components: found {', '.join(components)}; of a single file: transformer")
        return [_open_original(src)]
    if bare := _bare_transformer(src):
        if components and set(components) != {"transformer"}:
            raise ValueError(f"components: found {', '.join(components)}; of a transformer's folder: transformer")
        return [_open_folder(src, "transformer", bare)]
    there = _pipeline_components(src / "model_index.json")
    for name in components or ():
        if name not in there:
            raise ValueError(f"components: found {name!r}, but model_index.json has only {', '.join(there)}")
    return [_open_folder(src, name) for name in there if name in (components or there)]


def _bare_transformer(src: Path) -> Path | None:
    """The folder of a transformer that comes without a pipeline: `src` itself, or the one network's folder in it."""
    if (src / "model_index.json").is_file():
        return None
    if (src / "config.json").is_file():
        return src
    networks = [path.parent for path in src.glob("*/config.json")]  # beside it may stand a licence, or a scheduler
    return networks[0] if [path.name for path in networks] == ["transformer"] else None


def _pipeline_components(path: Path) -> list[str]:
    if is_converted(path.parent):
        raise ValueError(f"src: {path.parent} is converted already; expected what diffusers or the authors publish")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a whole pipeline's folder (see {GUIDE}) or a transformer's")
    index = read_json(path)
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        found = index.get("_class_name")
        raise ValueError(f"{path}: found _class_name {found!r}, expected 'StableDiffusion3Pipeline'")
    there = [name for name in COMPONENTS if index.get(name, [None, None]) != [None, None]]  # how an absent one is noted
    if not there:
        raise ValueError(f"{path}: names none of {', '.join(COMPONENTS)}")
    return there


def _open_folder(src: Path, name: str, bare: Path | None = None) -> Source:
    """A network of a pipeline, or the one whose folder `bare` is."""
    folder = bare or src / name
    with _located(folder / "config.json"):
        config = read_json(folder / "config.json")
        component = make_component(name, config)
    with _located(folder):
        tensors = open_tensor_files(folder, _STEMS.get(name, "model"))
        tensors = tensors.select(lambda tensor: not component.is_unused(tensor))
        _check_shapes(tensors, component.tensor_shapes())
    hashed = {f"{name}/{file.name}": file for file in (folder / "config.json", *tensors.files)}
    if name in TOKENIZERS:
        hashed |= _tokenizer_files(src / TOKENIZERS[name])
        open_tokenizer(src / TOKENIZERS[name], config)
    return Source(name, config, component, tensors, lambda tensor, array: iter([(tensor, array)]), hashed)


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder}: missing or empty, expected a tokenizer's files; {GUIDE} says where to get them")
    return {f"{folder.name}/{file.name}": file for file in files}


def _open_original(path: Path) -> Source:
    with _located(path):
        tensors = open_tensor_file(path)
        names = original.names(tensors.entries)
        tensors = dataclasses.replace(tensors, entries={names[name]: each for name, each in tensors.entries.items()})
        tensors = tensors.select(lambda name: not original.belongs_to_another_network(name))
        config = original.infer_config({name: entry.shape for name, entry in tensors.entries.items()})
        component = make_component("transformer", config)
        origins = original.origins(component.tensor_shapes())
        _check_shapes(tensors, {name: shape for name, (_, shape) in origins.items()})
    return Source(
        "transformer", config, component, tensors, lambda name, array: origins[name][0].split(array), {path.name: path}
    )


def _check_shapes(tensors: TensorFiles, expected: Mapping[str, Shape]) -> None:
    check_names({name: entry.shape for name, entry in tensors.entries.items()}, expected)


@contextlib.contextmanager
def _located(where: Path) -> Iterator[None]:
    """Say where something is wrong. A configuration's values come from outside, so any type may meet any operation."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError) as error:
        message = str(error)
        raise ValueError(message if str(where) in message else f"{where}: {message}") from error


def _hashes(source: Source, progress: Display) -> dict[str, str]:
    total = sum(path.stat().st_size for path in source.hashed.values())
    with progress(f"hash {source.name}", total) as count:
        return {name: hash_file(path, count) for name, path in source.hashed.items()}


# ---- the destination


def _check_destination(src: Path, dst: Path) -> None:
    if not src.exists():
        raise ValueError(f"src: {src} does not exist; {GUIDE} says where to get weights")
    if dst.exists() and not dst.is_dir():
        raise ValueError(f"dst: {dst} is a file, expected a folder")
    if dst.exists() and not is_converted(dst) and {path.name for path in dst.iterdir()} - {_STAGE}:
        raise ValueError(f"dst: {dst} is neither empty nor a converted folder; choose another")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"dst: no space left in {folder.parent}, {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free"
        )


@contextlib.contextmanager
def _staging(dst: Path) -> Iterator[Path]:
    """A hidden folder on the file system of `dst`; gone in the end, with every folder made for it."""
    made = [parent for parent in dst.parents if not parent.exists()]
    stage = dst / _STAGE if dst.exists() else dst.with_name(f".{dst.name}{_STAGE}")
    try:
        stage.mkdir(parents=True, exist_ok=True)
        with _alone_in(stage):
            try:
                _clear(stage)
                yield stage
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        named = str(error.filename or dst)
        named = str(dst) if named.startswith(str(stage)) else named  # the hidden name would tell nobody anything
        raise OSError(error.errno, error.strerror or str(error), named) from error
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only where nothing came to lie in it


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other conversions out of a folder; however this process ends, the system opens it again."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock a folder
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"dst: another conversion is at work in {folder}") from error
        yield
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    """Remove what an earlier conversion left that was killed."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _install(stage: Path, dst: Path, manifest: Manifest) -> None:
    """Move the staged components into `dst`: as one rename where it is new, else one by one under the old manifest
    less what is being replaced, so that a crash in between leaves nothing that claims to be whole."""
    if not dst.exists():
        write_manifest(stage, manifest)
        stage.replace(dst)
        return
    new = list(stage.iterdir())
    there = parse_manifest(dst).components if is_converted(dst) else {}
    write_manifest(dst, Manifest("", {name: each for name, each in there.items() if not (stage / name).exists()}))
    replaced = stage / "replaced"
    replaced.mkdir()
    for path in new:
        if (dst / path.name).exists():
            (dst / path.name).rename(replaced / path.name)
        path.rename(dst / path.name)
    write_manifest(dst, manifest)


def _write_component(source: Source, stage: Path, dtype: str, progress: Display) -> list[Path]:
    """Read, check and write one network; returns the files and folders made."""
    made = [stage / source.name]
    params = _read(source, stage, dtype, progress)
    total = source.output_bytes(dtype)
    with progress(f"write {source.name}", total) as count:
        save_params(stage, source.name, params)
        count(total)
    if source.component.kept:
        made.append(stage / TABLE_FILE)
    if source.name in TOKENIZERS:
        made.append(stage / TOKENIZERS[source.name])
        made[-1].mkdir()
        for name, path in source.hashed.items():
            if name.startswith(f"{made[-1].name}/"):
                shutil.copyfile(path, stage / name)
    return made


def _read(source: Source, stage: Path, dtype: str, progress: Display) -> dict[str, Any]:
    """A network's parameters; its position table, which is none of them, is written at once."""
    assembler = Assembler(source.component, OUTPUT_DTYPES[dtype])
    with progress(f"read {source.name}", source.tensors.total_bytes) as count:
        for name, tensor in source.tensors.stream(count):
            for part, array in source.split(name, tensor):
                if part == TABLE:
                    save_table(stage, array)
                else:
                    assembler.place(part, array)
    return assembler.tree()


def _describe(source: Source, dtype: str, hashes: Mapping[str, str], made: Sequence[Path], stage: Path) -> Converted:
    files = [
        path for root in made for path in ([root] if root.is_file() else sorted(root.rglob("*"))) if path.is_file()
    ]
    return Converted(
        config=source.config,
        dtype=dtype,
        tensors=len(source.tensors.entries),
        parameters=_count(source.component.shapes),
        source=hashes,
        files={path.relative_to(stage).as_posix(): path.stat().st_size for path in files},
    )


# ---- the way back


def write_transformer(src: Path, dst: Path, *, progress: Display) -> None:
    """Write a converted folder's transformer as a diffusers one: `dst/config.json`, `dst/diffusion_pytorch_model…`.

    Raises:
      ValueError: `src` is no converted folder or has no transformer, or `dst` exists.
      OSError: the destination cannot be written; it is left as it was.
    """
    manifest, dst = read_manifest(src), real_path(dst)
    if "transformer" not in manifest.components:
        raise ValueError(f"src: {src} holds no transformer, only {', '.join(manifest.components)}")
    if dst.exists():
        raise ValueError(f"dst: {dst} exists; choose another")
    component, dtype = manifest.component("transformer"), OUTPUT_DTYPES[manifest.components["transformer"].dtype]
    params = load_params(src, "transformer", abstract_params(component, dtype))
    write_diffusers(dst, manifest, params, load_table(src), progress=progress)


def write_diffusers(dst: Path, manifest: Manifest, params: Tree, table: np.ndarray, *, progress: Display) -> None:
    """Write a transformer like the manifest's, its parameters (on this host, all in one dtype) given, as `dst`.

    Raises:
      OSError: the destination cannot be written; it is left as it was.
    """
    component, dtype = manifest.component("transformer"), jax.tree.leaves(params)[0].dtype
    shapes = component.tensor_shapes()
    dtypes = {name: table.dtype if name == TABLE else dtype for name in shapes}
    total = _count(component.shapes) * dtype.itemsize + table.nbytes
    with _staging(dst) as stage:
        _check_space(stage, total)
        tensors = itertools.chain(stream_tensors(component, params), [(TABLE, table)])
        config = json.dumps(manifest.components["transformer"].config, indent=2)
        (stage / "config.json").write_text(config + "\n", encoding="utf-8")
        with progress("write transformer", total) as count:
            weights = stage / f"{_STEMS['transformer']}.safetensors"
            write_tensor_file(weights, shapes, dtypes, _counted(tensors, count))
        stage.replace(dst)


def _counted(tensors: Parts, count: Progress) -> Parts:
    for name, tensor in tensors:
        yield name, tensor
        count(tensor.nbytes)
