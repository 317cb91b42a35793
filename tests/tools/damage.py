"""Ways to break a pipeline's folder: functions that return what does it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

CONFIG, WEIGHTS = "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FIRST, SECOND = (f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
QUERY, BIAS = "transformer_blocks.0.attn.to_q.weight", "proj_out.bias"


def edit_json(file: str, **changes: Any) -> Callable[[Path], None]:
    """Set fields of a JSON file; None removes one."""

    def apply(src: Path) -> None:
        fields = json.loads((src / file).read_text()) | changes
        (src / file).write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Callable[[Path], None]:
    def apply(src: Path) -> None:
        tensors = safetensors.torch.load_file(src / file)
        change(tensors)
        safetensors.torch.save_file(tensors, src / file)

    return apply


def edit_header(change: Callable[[dict[str, Any]], Any], file: str = WEIGHTS) -> Callable[[Path], None]:
    """Change the header and leave the data."""

    def apply(src: Path) -> None:
        data = (src / file).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        change(header)
        encoded = json.dumps(header).encode()
        (src / file).write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[start:])

    return apply


def edit_bytes(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda src: void((src / file).write_bytes(change((src / file).read_bytes())))


def shard(then: Callable[[Path], None] = lambda src: None) -> Callable[[Path], None]:
    """Split the transformer into two shards, then do something to them."""

    def apply(src: Path) -> None:
        tensors = safetensors.torch.load_file(src / WEIGHTS)
        (src / WEIGHTS).unlink()
        names = sorted(tensors)
        files = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
        for file, part in files.items():
            safetensors.torch.save_file({name: tensors[name] for name in part}, src / file)
        weight_map = {name: Path(file).name for file, part in files.items() for name in part}
        (src / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        then(src)

    return apply


def edit_map(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(src: Path) -> None:
        index = json.loads((src / INDEX).read_text())
        change(index["weight_map"])
        (src / INDEX).write_text(json.dumps(index))

    return apply


def copy_into_second_shard(src: Path) -> None:
    """One tensor of the first shard stands in both."""
    first = safetensors.torch.load_file(src / FIRST)
    name = min(first)
    edit_tensors(lambda tensors: tensors.update({name: first[name]}), SECOND)(src)


def remove(name: str) -> Callable[[Path], None]:
    return lambda src: shutil.rmtree(src / name) if (src / name).is_dir() else (src / name).unlink()


def pickle_only(src: Path) -> None:
    torch.save({}, src / "transformer" / "diffusion_pytorch_model.bin")
    (src / WEIGHTS).unlink()


def empty_tokenizer(src: Path) -> None:
    shutil.rmtree(src / "tokenizer_2")
    (src / "tokenizer_2").mkdir()


def foreign_tokenizer(name: str, other: str) -> Callable[[Path], None]:
    """Another encoder's tokenizer in the place of one's own."""

    def apply(src: Path) -> None:
        shutil.rmtree(src / name)
        shutil.copytree(src / other, src / name)

    return apply


def truncated_vocabulary(name: str, count: int) -> Callable[[Path], None]:
    """Only a T5 tokenizer's first tokens."""

    def apply(src: Path) -> None:
        fields = json.loads((src / name / "tokenizer.json").read_text())
        fields["model"]["vocab"] = fields["model"]["vocab"][:count]
        (src / name / "tokenizer.json").write_text(json.dumps(fields))

    return apply


def set_first(value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY] = tensors[QUERY].to(dtype)
        tensors[QUERY].view(-1)[0] = value

    return change


def cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({QUERY: tensors[QUERY].to(dtype)})


def twice(data: bytes) -> bytes:
    """The same name a second time in the header, which JSON readers pass over."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start].rstrip()
    assert header.endswith(b"}")
    fields = json.dumps({BIAS: json.loads(header)[BIAS]}).encode()
    header = header[:-1] + b"," + fields[1:]
    return len(header).to_bytes(8, "little") + header + data[start:]


def shift_offsets(amount: int) -> Callable[[dict[str, Any]], None]:
    """Move every tensor but the first by some bytes: a gap, or an overlap."""

    def change(header: dict[str, Any]) -> None:
        for entry in (each for key, each in header.items() if key != "__metadata__"):
            if entry["data_offsets"][0] > 0:
                entry["data_offsets"] = [offset + amount for offset in entry["data_offsets"]]

    return change


def void(value: Any) -> None:
    """For lambdas that are called for what they do."""
