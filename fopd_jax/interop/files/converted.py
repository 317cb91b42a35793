"""A converted folder: one orbax checkpoint per network, tokenizers, and a manifest that says what they came from.

    manifest.json   transformer/   transformer.pos_embed.safetensors   vae/   text_encoder/ …   tokenizer/ …

The manifest is written last and atomically: a folder whose manifest names a component holds all of it.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from fopd_jax.exits import CONVERTER
from fopd_jax.files import write_json
from fopd_jax.interop.files.tables import Component, Shape, check_names
from fopd_jax.interop.files.tensor_files import hash_file, open_tensor_file, read_json, write_tensor_file
from fopd_jax.interop.sd3.autoencoder import autoencoder_component
from fopd_jax.interop.sd3.diffusers import CLASS_NAME, TABLE, config_from_diffusers, transformer_component
from fopd_jax.interop.sd3.text_encoders import clip_component, t5_component
from fopd_jax.models.mmdit import PRESETS, centre_crop
from fopd_jax.parallel.sharding import parameter_shardings
from fopd_jax.reading import real_path

FORMAT = "fopd_jax/converted/1"
MANIFEST_FILE = "manifest.json"
TABLE_FILE = "transformer.pos_embed.safetensors"
_CHUNK_BYTES = 16 << 20  # a sharded restore reads whole chunks: small ones, so that no host reads everything
Tree = Any
CUSTOM = "custom"  # the preset of a transformer that is none of the published ones


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A class of transformers: `shape` of its configuration, `component` of a shape, and `presets`, the published."""

    shape: Callable[[Mapping[str, Any]], Any]
    component: Callable[[Any], Component]
    presets: Mapping[str, Any]


TRANSFORMERS: Mapping[str, Transformer] = {
    CLASS_NAME: Transformer(config_from_diffusers, transformer_component, PRESETS)
}


def _class_name(config: Mapping[str, Any]) -> str:
    """A transformer's; a configuration that names none is Stable Diffusion 3's.

    Raises:
      ValueError: there is no such class; names those there are.
    """
    name = config.get("_class_name", CLASS_NAME)
    if not isinstance(name, str) or name not in TRANSFORMERS:
        raise ValueError(f"transformer config _class_name: found {name!r}, expected one of {', '.join(TRANSFORMERS)}")
    return name


def _transformer(config: Mapping[str, Any]) -> Component:
    kind = TRANSFORMERS[_class_name(config)]
    return kind.component(kind.shape(config))


COMPONENTS: Mapping[str, Callable[[Mapping[str, Any]], Component]] = {
    "transformer": _transformer,
    "vae": autoencoder_component,
    "text_encoder": clip_component,
    "text_encoder_2": clip_component,
    "text_encoder_3": t5_component,
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}


_MOST_LAYERS = 1000  # ten times the deepest published
_MOST = 2**24  # of anything else that a configuration counts: more than any vocabulary


def make_component(name: str, config: Mapping[str, Any]) -> Component:
    """A network's names and shapes by its `config.json`.

    Raises:
      ValueError: a field is missing, or describes a network that ours is not; names field, found and right value.
    """
    return COMPONENTS[name](_listable(config))


def _listable(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config, if its layers can be listed one by one, as names of tensors are, and its sizes be multiplied."""
    for field, value in config.items():
        most = _MOST_LAYERS if "layers" in field else _MOST
        for each in value if isinstance(value, list | tuple) else (value,):
            if type(each) is int and abs(each) > most:
                raise ValueError(f"{field}: found {each}, expected at most {most}")
    return config


@dataclasses.dataclass(frozen=True)
class Converted:
    """One component: its source's `config`, the `dtype` and number of its parameters, `source` and `files`.

    `source`: path in the source folder → SHA-256. `files`: path in the converted folder → bytes, which tells a
    truncated or missing file before anything is loaded.
    """

    config: Mapping[str, Any]
    dtype: str
    tensors: int
    parameters: int
    source: Mapping[str, str]
    files: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted folder holds; `preset` names the transformer's shape, `custom` where it is no published one."""

    preset: str
    components: Mapping[str, Converted]

    def component(self, name: str) -> Component:
        return make_component(name, self.components[name].config)

    @property
    def class_name(self) -> str:
        """The transformer's, as its source named it."""
        return _class_name(self.components["transformer"].config)

    @property
    def transformer(self) -> Any:
        """The transformer's shape, of its family's own kind."""
        return TRANSFORMERS[self.class_name].shape(_listable(self.components["transformer"].config))


def preset_of(shape: Any) -> str:
    """The published preset that a network is, or `custom`."""
    presets = [item for kind in TRANSFORMERS.values() for item in kind.presets.items()]
    return next((name for name, preset in presets if preset == shape), CUSTOM)


def is_converted(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a converted folder, its files checked to be there at their full length.

    Raises:
      ValueError: as `parse_manifest`, or a file is missing or truncated; names it.
    """
    manifest = parse_manifest(folder)
    for name, each in manifest.components.items():
        if damage := find_damage(folder, each):
            raise ValueError(f"{damage}; convert {name} again")
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    """The manifest alone.

    Raises:
      ValueError: no manifest, of another format or damaged; names the file.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {MANIFEST_FILE}; expected a folder that {CONVERTER} wrote")
    fields = read_json(path)
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{path}: found format {fields.get('format')!r}, expected {FORMAT!r}; convert into a new folder"
        )
    preset, components = fields.get("preset"), fields.get("components")
    if not isinstance(preset, str) or not isinstance(components, dict):
        raise ValueError(f"{path}: damaged (no preset or no components); convert into a new folder")
    return Manifest(preset, {name: _parse_component(path, name, each) for name, each in components.items()})


def _parse_component(path: Path, name: str, fields: Any) -> Converted:
    if name not in COMPONENTS:
        raise ValueError(f"{path}: found component {name!r}, expected some of {', '.join(COMPONENTS)}")
    kinds = {"config": dict, "dtype": str, "tensors": int, "parameters": int, "source": dict, "files": dict}
    if not isinstance(fields, dict) or {key: type(value) for key, value in fields.items()} != kinds:
        raise ValueError(f"{path}: damaged at component {name!r}; convert into a new folder")
    return Converted(**fields)


def weights_hash(path: Path) -> str:
    """Which weights a network's are: SHA-256 of a file, or of a converted folder's source.

    A manifest knows its transformer's source files by their hashes: nothing large is read, and weights are the same in
    float32 and in bfloat16. Several files count as the hash of their sorted hashes. The same numbers in other files, as
    in the authors' and in diffusers' layout, are other weights.

    Raises:
      ValueError: as `parse_manifest`, or there is no transformer.
      OSError: the file cannot be read.
    """
    if path.is_file():
        return hash_file(path)
    components = parse_manifest(path).components
    if "transformer" not in components:
        raise ValueError(f"{path}: holds no transformer, only {', '.join(components)}")
    hashes = sorted(value for name, value in components["transformer"].source.items() if name.endswith(".safetensors"))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def find_damage(folder: Path, converted: Converted) -> str | None:
    """What the first of a component's files that is missing or of another length is, None where all are whole."""
    for name, size in converted.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "nothing"
        if found != size:
            return f"{path}: found {found}, expected {size} bytes"
    return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST_FILE, {"format": FORMAT, **dataclasses.asdict(manifest)})


# ---- parameters


def save_params(folder: Path, name: str, params: Tree) -> None:
    """Write a tree of numpy arrays as an orbax checkpoint, without compression: weights do not compress.

    Arrays whose memory is aligned (`tables.Assembler` makes such) are not copied. An interrupt takes effect when the
    writing has ended: its threads would otherwise go on making files while the caller removes them.

    Raises:
      OSError: the files cannot be written.
    """
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_save, real_path(folder / name), params).result()
    except ValueError as error:  # tensorstore's, which has the system's error in its text only
        _wait_for_silence(folder)
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder / name)) from error
        raise


def _wait_for_silence(folder: Path) -> None:
    """Until nothing in a folder changes: writes that were under way when another one failed still go on, and would
    bring back what the caller removes."""
    before, now = None, _sizes(folder)
    while before != now:
        time.sleep(0.5)
        before, now = now, _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found[str(path)] = path.stat().st_size
    return found


def _save(path: Path, params: Tree) -> None:
    arrays = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices("cpu")[0], may_alias=True), params)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), arrays)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, save_concurrent_gb=_gigabytes_at_once(arrays))
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(arrays, save_args=save_args))


def _gigabytes_at_once(arrays: Tree) -> int:
    """Orbax's limit on what is under way, as small as it may be: it refuses an array that is larger."""
    return 1 + max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)) // 10**9


def abstract_params(component: Component, dtype: Any) -> Tree:
    """Shapes of a component's parameters in one dtype, without shardings."""
    shapes = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in component.shapes.items()}
    return unflatten_dict(shapes, sep="/")


def load_params(folder: Path, name: str, abstract: Tree) -> Tree:
    """A component's parameters in the dtypes of `abstract`, each shard read by the device that holds it alone.

    Leaves of `abstract` without a sharding are put on the default device.

    Raises:
      ValueError: the checkpoint is damaged, or its shapes are not those of `abstract`; names the folder.
    """
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default), abstract
    )
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_gigabytes_at_once(placed))
    restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(  # another process may have no need to read
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            path, args = real_path(folder / name), ocp.args.PyTreeRestore(placed, restore_args=restore_args)
            stored: Any = checkpointer.metadata(path).item_metadata
            if stored is None:
                raise ValueError("its metadata cannot be read")
            check_names(_shapes(stored.tree), _shapes(placed), "parameter")
            return checkpointer.restore(path, args=args)
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder / name}: damaged, or of another shape ({reason}); convert {name} again") from error


def _shapes(tree: Tree) -> dict[str, Shape]:
    leaves: dict[str, Any] = flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def load_sharded(folder: Path, name: str, boxed: Tree, dtype: Any, mesh: Mesh) -> Tree:
    """`load_params` onto a mesh by the logical axes that the shapes in `boxed` are boxed with."""
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        nn.unbox(boxed),
        parameter_shardings(mesh, boxed),
    )
    return load_params(folder, name, abstract)


def save_table(folder: Path, table: np.ndarray) -> None:
    """Write the transformer's own position table `[1, side², D]`, in the checkpoint's dtype."""
    write_tensor_file(folder / TABLE_FILE, {TABLE: table.shape}, {TABLE: table.dtype}, iter([(TABLE, table)]))


def load_table(folder: Path, crop: tuple[int, int, int] | None = None) -> np.ndarray:
    """The position table, or of a table of `crop = (side, rows, columns)` the middle alone `[rows, columns, D]`.

    Raises:
      ValueError: the file is missing or damaged, or the grid of patches is larger than the table.
    """
    path = folder / TABLE_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; convert transformer again ({CONVERTER})")
    entry = open_tensor_file(path).entries[TABLE]
    table = np.memmap(path, entry.dtype, "r", entry.begin, entry.shape)
    if crop is None:
        return np.array(table)
    side, rows, columns = crop
    return np.array(centre_crop(table.reshape(side, side, -1), rows, columns))
