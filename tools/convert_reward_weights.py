"""Convert the weights of a reward's network once, for every later run.

    python tools/convert_reward_weights.py --src FILE_OR_FOLDER --dst FILE.safetensors [--force]
        [--network clip|blip|mask2former|aesthetic] [--tokenizer FOLDER_OR_FILE] [--activation gelu|quick_gelu]

The source is a transformers folder (`config.json`, safetensors single or sharded, or `pytorch_model.bin`), a
safetensors file, or a `.pt`, `.pth` or `.bin` file, which PyTorch reads with `weights_only=True`: no pickled code is
ever run. The network is recognised by its tensors' names. A folder's own tokenizer is taken along; for other sources
name one, as open_clip's `bpe_simple_vocab_16e6.txt.gz`. open_clip's files of CLIP-L and smaller do not tell which GELU
they were trained with: `--activation quick_gelu` for OpenAI's weights, `gelu` for LAION's.

Exit codes: 0 done, 2 something is wrong with the command line, source or destination, 1 any other error, as a full disk
(one line says what), 130 interrupted. Whatever happens, the destination is whole or as it was before.
"""

import argparse
import importlib
import os
import signal
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # converting needs no accelerator, and must not occupy one

import numpy as np

from fopd_jax.exits import Arguments, naming, report
from fopd_jax.files import check_apart, check_writable, local_path
from fopd_jax.interop.files.tensor_files import (
    TensorFiles,
    check_finite,
    hash_file,
    open_tensor_file,
    open_tensor_files,
    read_json,
)
from fopd_jax.interop.scorers.weights import save_weights

NETWORKS = ("clip", "blip", "mask2former", "aesthetic")
_PICKLES = (".pt", ".pth", ".bin")
_NESTED = ("state_dict", "model", "params", "module")
Tensors = dict[str, np.ndarray]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 if it is wrong."""
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True)
    parser.add_argument("--dst", required=True)
    parser.add_argument("--network", choices=NETWORKS, help="default: recognised by the names of the tensors")
    parser.add_argument("--tokenizer", help="folder or file of the words; default: the source's own, if it has one")
    parser.add_argument("--activation", choices=("gelu", "quick_gelu"), help="of open_clip's files")
    parser.add_argument("--force", action="store_true", help="write over a destination that is there")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> str:
    """Convert; returns what was done, in words."""
    src, dst = local_path("src", args.src), local_path("dst", args.dst)
    if not src.exists():
        raise ValueError(f"src: {src}: no such file or folder")
    check_apart(src, dst)
    if dst.is_dir() or (dst.exists() and not args.force):
        raise ValueError(f"dst: {dst} is there already; {'it is a folder' if dst.is_dir() else '--force replaces it'}")
    check_writable(dst.parent, "dst")
    tensors, config, files = read(src)
    if args.activation:
        config = {**(config or {}), "activation": args.activation}
    network = args.network or recognise(tensors, src)
    converter = load_converter(network)
    with naming(src):
        shape, params = converter.convert(tensors, config)
    if words := tokenizer_of(src, args.tokenizer, converter):
        shape = converter.add_tokenizer(shape, words)
    save_weights(dst, network, shape, params, {file.name: hash_file(file) for file in files})
    return f"converted {network} from {src} to {dst}{'' if words or not can_read(converter) else ', without words'}"


# ---- networks


def load_converter(network: str) -> ModuleType:
    return importlib.import_module(f"fopd_jax.interop.scorers.{network}")


def recognise(names: Collection[str], src: Path) -> str:
    """The one network whose tensors these are.

    Raises:
      ValueError: none, or several; names the source.
    """
    found = [name for name in NETWORKS if load_converter(name).recognises(names)]
    if len(found) != 1:
        first = ", ".join(sorted(names)[:3])
        raise ValueError(
            f"src: {src}: found tensors ({first}, …) of {' and '.join(found) or 'no network that is known'}, "
            f"expected one of {', '.join(NETWORKS)}; --network says which"
        )
    return found[0]


def can_read(converter: ModuleType) -> bool:
    """Whether a network reads texts, so that its file holds their tokenizer."""
    return hasattr(converter, "add_tokenizer")


def tokenizer_of(src: Path, named: str | None, converter: ModuleType) -> Path | None:
    """Where the words come from: what was named, or the source's own.

    Raises:
      ValueError: the network reads no texts.
    """
    if named is not None:
        if not can_read(converter):
            raise ValueError("tokenizer: this network reads no texts; leave it out")
        return local_path("tokenizer", named)
    names = ("tokenizer.json", "merges.txt", "vocab.txt")
    own = src.is_dir() and any((src / name).is_file() for name in names)
    return src if own and can_read(converter) else None


# ---- sources


def read(src: Path) -> tuple[Tensors, dict[str, Any] | None, tuple[Path, ...]]:
    """All tensors, mapped from disk wherever that is possible, with the configuration beside them and the files.

    Raises:
      ValueError: there are none, or they are damaged; names the file.
    """
    if src.is_dir():
        config = read_json(src / "config.json") if (src / "config.json").is_file() else None
        if (pickled := src / "pytorch_model.bin").is_file() and not list(src.glob("model*.safetensors*")):
            return read_pickle(pickled), config, (pickled,)
        found = open_tensor_files(src, "model")
        return map_tensors(found), config, found.files
    if src.suffix in _PICKLES:
        return read_pickle(src), None, (src,)
    found = open_tensor_file(src)
    return map_tensors(found), None, found.files


def map_tensors(files: TensorFiles) -> Tensors:
    """The tensors of safetensors files; the disk holds them until they are read. Whole numbers are a buffer's."""
    floats = {name for name, entry in files.entries.items() if not entry.kind.startswith(("I", "U", "BOOL"))}
    maps = {file: np.memmap(file, np.uint8, "r") for file in files.files}  # each holds a file open
    tensors = {}
    for name, entry in files.select(lambda name: name in floats).entries.items():
        raw = np.asarray(maps[entry.file])[entry.begin : entry.end]
        tensors[name] = raw.view(entry.dtype).reshape(entry.shape)
        check_finite(name, tensors[name], entry.file)
    return tensors


def read_pickle(path: Path) -> Tensors:
    """The floating-point tensors of a file of PyTorch's, read without running what it may contain.

    Raises:
      ValueError: PyTorch is not installed, or refuses the file, or it holds no tensors; names the file.
    """
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"src: {path} needs PyTorch: pip install 'fopd_jax[convert]'") from error
    try:
        mapped = zipfile.is_zipfile(path)  # files of before 2020 are none, and are read as a whole
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # zip, pickle and torch have their own kinds each
        first = str(error).split(". ")[0].split("\n")[0][:200]
        raise ValueError(f"src: {path}: PyTorch reads no tensors from it ({type(error).__name__}: {first})") from error
    nested = unwrap(loaded)
    named = {name: each.detach() for name, each in nested.items() if isinstance(each, torch.Tensor)}
    if not named:
        raise ValueError(f"src: {path}: found no tensors, expected a state dict")
    tensors = {}
    for name, each in named.items():
        if each.is_floating_point():
            each = each.float() if each.dtype == torch.bfloat16 else each  # which numpy lacks
            tensors[name.removeprefix("module.")] = each.numpy()
            check_finite(name, each.numpy(), path)
    return tensors


def unwrap(loaded: Any) -> Mapping[str, Any]:
    """The state dict in what trainers save around it."""
    while isinstance(loaded, Mapping):
        inner = next((loaded[name] for name in _NESTED if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            return loaded
        loaded = inner
    return {}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    report(args.dst, lambda: run(args))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop cleans up as Ctrl-C does
    main()
