"""Convert a LoRA adapter of the SD3 transformer between fopd_jax, PEFT, diffusers, ComfyUI and sd-scripts.

    python tools/convert_adapter.py --src student.safetensors --dst student_peft --to peft
    python tools/convert_adapter.py --src Flow-GRPO-folder --dst teacher.safetensors --to fopd_jax --preset sd35_medium

    python tools/convert_adapter.py --src teacher.safetensors --describe

An adapter's file may hold a card: how it was trained and how to use it, which `--describe` prints and every conversion
keeps. What a file does not say is put into the new one by `--guidance` (the scale that it was trained under) and
`--base` (the converted folder of the base that it was trained on), which OPD and sampling then read.

The source's kind is detected. Its network is the preset that a fopd_jax file names, else --preset, else that of
--model: a converted folder, or a diffusers one. An adapter of a network that is no preset, as that of
tools/random_pipeline.py, always needs --model. PEFT folders are never overwritten; files are replaced. Takes seconds
and, for SD3.5-Medium at rank 32, some 450 MB of memory; no accelerator and no PyTorch.

Exit status: 0 done; 2 bad input, 1 any other error, with one line that says what is wrong; 130 interrupted.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # converting needs no accelerator, and must not occupy one

from fopd_jax.adapters.card import AdapterCard, parse_card
from fopd_jax.adapters.lora import Adapter
from fopd_jax.console import align
from fopd_jax.exits import GUIDE, Arguments, explained, naming
from fopd_jax.files import check_apart, local_path
from fopd_jax.interop.files.converted import CUSTOM, is_converted, preset_of, read_manifest, weights_hash
from fopd_jax.interop.files.safetensors import is_own_file, load_adapter, save_adapter
from fopd_jax.interop.lora.cards import read_card
from fopd_jax.interop.lora.modules import modules_from_adapter
from fopd_jax.interop.lora.peft import (
    DIFFUSERS_TENSORS,
    PEFT_TENSORS,
    read_lora,
    write_comfyui,
    write_diffusers,
    write_peft,
    write_sd_scripts,
)
from fopd_jax.interop.sd3.diffusers import config_from_diffusers
from fopd_jax.models.mmdit import PRESETS, MMDiTConfig
from fopd_jax.reading import parse_json, read_regular


def write_own(path: Path, adapter: Adapter, config: MMDiTConfig, card: AdapterCard | None) -> None:
    """A file of this project's."""
    save_adapter(path, adapter, {"preset": preset_of(config)}, card)


WRITERS: dict[str, Callable[[Path, Adapter, MMDiTConfig, AdapterCard | None], None]] = {
    "peft": write_peft,
    "diffusers": write_diffusers,
    "comfyui": write_comfyui,
    "sd_scripts": write_sd_scripts,
    "fopd_jax": write_own,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with explained(options.dst or ""):
        src = local_path("src", options.src)
        if options.describe:
            print(describe(src))
            return
        dst = local_path("dst", options.dst)
        check_apart(src, dst, (PEFT_TENSORS, DIFFUSERS_TENSORS))
        adapter, config = read(src, options.preset, local_path("model", options.model) if options.model else None)
        WRITERS[options.to](dst, adapter, config, make_card(src, options, config))
    print(f"{options.dst}: written for {options.to}, scale {adapter.scale:g}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 if it is wrong."""
    parser = Arguments(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--src", required=True, help="adapter file or folder")
    parser.add_argument("--describe", action="store_true", help="print what the source says of itself, and stop")
    parser.add_argument("--dst", help="what to write: a folder for peft, else a file")
    parser.add_argument("--to", choices=WRITERS, help="layout to write")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--preset", choices=PRESETS, help="the network that the adapter is for")
    network.add_argument(
        "--model", help="instead: a converted folder, a diffusers pipeline, or its transformer's folder"
    )
    parser.add_argument("--guidance", type=float, help="say that the adapter is for this scale; 1: none")
    parser.add_argument("--base", help="say that it was trained on this base: a converted folder, or a file of ours")
    options = parser.parse_args(arguments)
    if not options.describe and not (options.dst and options.to):
        parser.error("expected --dst and --to, or --describe")
    return options


def describe(source: Path) -> str:
    """What an adapter says of itself, a field a line.

    Raises:
      ValueError: there is no such adapter, or its card is damaged.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    card = read_card(source)
    if card is None:
        return f"{source}: says nothing of itself; a config has to say its guidance (tasks.NAME.guidance)"
    return align([(name, spell(value)) for name, value in card.fields().items()])


def spell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {spell(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(spell, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def make_card(source: Path, options: argparse.Namespace, config: MMDiTConfig) -> AdapterCard | None:
    """What the new file says of itself: what the source does, and what the command line adds.

    Raises:
      ValueError: a value is out of range, or there is no such base.
    """
    card, said = read_card(source), {}
    if options.guidance is not None:
        said["guidance"] = options.guidance
    if options.base:
        said["base"] = weights_hash(local_path("base", options.base))
    if not said:
        return card
    try:
        return parse_card((card or AdapterCard(preset=preset_of(config))).fields() | said)
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def read(source: Path, preset: str | None, model: Path | None) -> tuple[Adapter, MMDiTConfig]:
    """The adapter, of any kind, and the network that it is for.

    Raises:
      ValueError: the source cannot be read, or its network is not known or another one than that given.
    """
    given = config_of_model(model) if model else PRESETS[preset] if preset else None
    if not source.exists():
        raise ValueError(
            f"{source}: no such file or folder; {GUIDE} says where to get teachers, and runs make students"
        )
    if not is_own_file(source):
        if given is None:
            raise ValueError(f"{source}: does not tell its network; give --preset or --model")
        return read_lora(source, given), given
    adapter, metadata = load_adapter(source)
    name = metadata.get("preset")
    if name == CUSTOM and given is None:
        raise ValueError(f"{source}: is for a network that is no preset; give --model, the folder of its base")
    if name not in (*PRESETS, CUSTOM):
        raise ValueError(f"{source}: found preset {name!r}, expected one of {', '.join((*PRESETS, CUSTOM))}")
    if given is not None and preset_of(given) != name:
        raise ValueError(f"{source}: its preset {name!r} is another network than {preset or model}")
    config = given or PRESETS[name]
    with naming(source):
        modules_from_adapter(adapter, config)  # refuses what is no adapter of this network, before anything is written
    return adapter, config


def config_of_model(model: Path) -> MMDiTConfig:
    """The network of a converted folder, of a diffusers pipeline's, or of its transformer's.

    Raises:
      ValueError: no manifest and no transformer's `config.json` there, or it describes another network; names the file.
    """
    if is_converted(model):
        manifest = read_manifest(model)
        if "transformer" not in manifest.components:
            raise ValueError(f"{model}: holds no transformer, only {', '.join(manifest.components)}")
        return manifest.transformer
    file = next((path for path in (model / "transformer/config.json", model / "config.json") if path.is_file()), None)
    if file is None:
        raise ValueError(f"{model}: found neither manifest.json nor transformer/config.json nor config.json")
    try:
        fields = parse_json(read_regular(file))
        if not isinstance(fields, dict):
            raise ValueError(f"found JSON of type {type(fields).__name__}, expected an object")
        return config_from_diffusers(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


if __name__ == "__main__":
    main()
