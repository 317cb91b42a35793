"""LoRA adapters of the SD3 transformer as others publish them: PEFT folders, diffusers' files, ComfyUI's files.

How each of them conveys the scale, which is what goes wrong in practice:

- PEFT (`peft/tuners/lora/layer.py`): `r` and `lora_alpha` in `adapter_config.json`; the tensors do not tell.
- diffusers (`loaders/lora_pipeline.py: SD3LoraLoaderMixin`, `utils/peft_utils.py: get_peft_kwargs`): a `LoraConfig`
  in the file's metadata `lora_adapter_metadata`, each field behind "transformer.". Without it the scale is 1, and
  a file that holds an `alpha` tensor is refused. Versions before 0.34 do not read the metadata: scale 1 again.
- ComfyUI (`comfy/lora.py: load_lora, model_lora_keys_unet`, `comfy/utils.py: mmdit_to_diffusers`,
  `comfy/weight_adapter/lora.py`): a scalar `alpha` beside each pair of factors, divided by the rank; else the
  scale is 1. It reads neither the metadata nor `adapter_config.json`. Modules are `transformer.` or
  `base_model.model.` + diffusers' name, or `lora_transformer_` + that name with "_" for ".".

So no single file has the right scale in both diffusers and ComfyUI (unless its scale is 1).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter
from fopd_jax.exits import naming
from fopd_jax.files import replacing_folder, write_json, write_tensors
from fopd_jax.interop.lora.cards import card_metadata, write_beside
from fopd_jax.interop.lora.config import LARGEST_ALPHA, LoRASettings, exact_alpha, make_fields, parse_settings
from fopd_jax.interop.lora.files import (
    DIFFUSERS_TENSORS,
    PEFT_PREFIX,
    PEFT_TENSORS,
    PIPELINE_PREFIX,
    SD_SCRIPTS_PREFIX,
    LoRAFile,
    read_lora_file,
)
from fopd_jax.interop.lora.modules import LoRAModule, adapter_from_modules, modules_from_adapter, places
from fopd_jax.interop.sd3.original import module_parts
from fopd_jax.models.mmdit import MMDiTConfig
from fopd_jax.reading import read_regular

PEFT_SETTINGS = "adapter_config.json"
_METADATA = "lora_adapter_metadata"
_HEADER_ALPHAS = ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")  # one number for all modules
_HEADER_RANKS = ("lora_rank", "ss_network_dim", "network_dim", "rank", "r")  # and the rank that it belongs to
_HEADER_UNREAD = ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")  # would change what that number means
_OFF = ("", "None", "null", "{}", "False", "false", "0")
_ROUNDING = 2**-8  # of an alpha that is stored in bfloat16
_FORMAT = {"format": "pt"}  # without which transformers and diffusers refuse a file


def read_lora(path: Path, config: MMDiTConfig) -> Adapter:
    """Read a published adapter: a PEFT folder, a folder with diffusers' file, or a file of diffusers' or ComfyUI's.

    Returns:
      Stacked float32 numpy leaves and the scale, see `adapter_from_modules` for adapters with several ranks or scales.

    Raises:
      ValueError: the adapter is missing, damaged, contradicts itself, or is more than a plain LoRA on the layers of
        `adapters.TARGETS`. One line that names the file, the field or tensor, what was found and what would be right.
    """
    tensors, settings_path = _locate(path)
    settings = _read_settings(settings_path) if settings_path else None
    with naming(tensors):
        file = read_lora_file(tensors, config)
        scales = _scales(file, settings)
        modules = {name: LoRAModule(a, b, scales[name]) for name, (a, b) in file.factors.items()}
        return adapter_from_modules(modules, config)


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The safetensors file, and the settings if it is a PEFT folder's."""
    if path.is_file():
        settings = path.with_name(PEFT_SETTINGS)
        return path, settings if path.name == PEFT_TENSORS and settings.is_file() else None
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    held = [name for name in (PEFT_SETTINGS, DIFFUSERS_TENSORS) if (path / name).is_file()]
    if held == [DIFFUSERS_TENSORS] and (path / PEFT_TENSORS).is_file():
        held.append(PEFT_TENSORS)
    if len(held) != 1:
        found = " and ".join(held) or f"neither {PEFT_SETTINGS} nor {DIFFUSERS_TENSORS}"
        raise ValueError(f"{path}: found {found}, expected one of them; or name the file itself")
    if held == [DIFFUSERS_TENSORS]:
        return path / DIFFUSERS_TENSORS, None
    if not (path / PEFT_TENSORS).is_file():
        pickle = "; adapter_model.bin is a pickle, which is not read" * (path / "adapter_model.bin").is_file()
        raise ValueError(f"{path}: found {PEFT_SETTINGS}, but no {PEFT_TENSORS} beside it{pickle}")
    return path / PEFT_TENSORS, path / PEFT_SETTINGS


def _read_settings(path: Path) -> LoRASettings:
    with naming(path):
        return parse_settings(_parse_json(read_regular(path)))


def _parse_json(text: str | bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are kinds of the first
        raise ValueError(f"damaged JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"found JSON of type {type(fields).__name__}, expected an object")
    return fields


def _scales(file: LoRAFile, settings: LoRASettings | None) -> dict[str, float]:
    """Scale of every module, from the one source that a layout has for it; a header's alpha may repeat what it says."""
    if settings is not None and not file.prefix.startswith(PEFT_PREFIX):
        raise ValueError(f"found tensor names that begin with {file.prefix!r}, expected {PEFT_PREFIX!r}")
    sources = {PEFT_SETTINGS: settings, _METADATA: file.metadata.get(_METADATA), "alpha tensors": file.alphas}
    if len(present := [name for name, source in sources.items() if source]) > 1:
        raise ValueError(f"found the scale in {' and in '.join(present)}, expected one of them")
    header = _header_alpha(file.metadata)
    if not present and header is None and file.prefix.startswith(PEFT_PREFIX):
        raise ValueError(f"found PEFT's tensor names, but no {PEFT_SETTINGS} beside the file, which holds the scale")
    if file.metadata.get(_METADATA):
        with naming(_METADATA):
            settings = _settings_in_metadata(file)
    if settings is not None and file.renamed and (settings.alpha_pattern or settings.rank_pattern):
        field = "alpha_pattern" if settings.alpha_pattern else "rank_pattern"
        raise ValueError(
            f"{field}: found patterns of names beside module {file.renamed!r}, which is not diffusers' name for it, so "
            "that they would match nothing; expected diffusers' names, or alpha tensors without patterns"
        )
    ranks = {module: file.ranks[module] for module in file.factors}
    if settings is None:
        if header is not None and not file.alphas:
            _check_header_rank(file.metadata, max(ranks.values()))
        given = file.alphas or dict.fromkeys(ranks, header or 0)
        alphas = {module: given.get(module) or float(rank) for module, rank in ranks.items()}
        for module, alpha in alphas.items():
            _check_header(header, f"module {module!r}", alpha)
        return {module: alphas[module] / rank for module, rank in ranks.items()}
    _check_header(header, PEFT_SETTINGS if _METADATA not in present else _METADATA, settings.lora_alpha)
    for module, rank in ranks.items():
        if settings.rank(module) != rank:
            raise ValueError(f"module {module!r}: found rank {rank}, but its settings say r = {settings.rank(module)}")
    return {module: settings.scale(module) for module in ranks}


def _header_alpha(metadata: Mapping[str, str]) -> float | None:
    """The alpha of all modules that a file's header tells, as trainers write it."""
    for field in _HEADER_UNREAD:
        if (text := metadata.get(field, "").strip()) not in _OFF:
            where = f"it in {_METADATA}, or alpha tensors"
            raise ValueError(f"metadata {field}: found {text!r}, which is not read there; expected {where}")
    found = {field: metadata[field] for field in _HEADER_ALPHAS if metadata.get(field, "None") not in ("None", "")}
    values = set()
    for field, text in found.items():
        try:
            values.add(float(text.strip('"')))
        except ValueError as error:
            raise ValueError(f"metadata {field}: found {text!r}, expected a number") from error
    if len(values) > 1 or not all(0 < abs(value) <= LARGEST_ALPHA for value in values):
        raise ValueError(f"metadata: found {found}, expected one finite number other than 0, at most {LARGEST_ALPHA:g}")
    return next(iter(values), None)


def _check_header_rank(metadata: Mapping[str, str], rank: int) -> None:
    """A header's alpha that was told for another rank says nothing about these factors."""
    for field in _HEADER_RANKS:
        text = metadata.get(field, "").strip('"')
        if text.isdecimal() and int(text) != rank:
            raise ValueError(f"metadata {field}: found {text}, but the factors are of rank {rank}; expected them equal")


def _check_header(header: float | None, source: str, alpha: float) -> None:
    if header is not None and not math.isclose(header, alpha, rel_tol=_ROUNDING):
        raise ValueError(f"metadata: found alpha {header:g}, but {source} has alpha {alpha:g}; expected them equal")


def _settings_in_metadata(file: LoRAFile) -> LoRASettings:
    fields = _parse_json(file.metadata[_METADATA])
    return parse_settings({k.removeprefix(file.prefix): v for k, v in fields.items() if k.startswith(file.prefix)})


def write_peft(
    folder: Path,
    adapter: Adapter,
    config: MMDiTConfig,
    card: AdapterCard | None = None,
    base_model: str | None = None,
) -> None:
    """Write a PEFT folder, for `PeftModel.from_pretrained` on a diffusers transformer.

    `base_model` is the name or path of the base that the settings record. The card, here and below, stands in the
    tensors' metadata and, in this folder, in a file of its own. The folder appears complete or not at all.
    PEFT computes the adapter's very scale, as long as it is some alpha/R or alpha/√R in float64, else its neighbour.

    Raises:
      ValueError: the folder exists and is not empty (it is never overwritten), or as `modules_from_adapter`.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already, expected a new or an empty folder")
    modules = modules_from_adapter(adapter, config)
    fields = {**_fields(modules, config), "base_model_name_or_path": base_model}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as made:
        write_json(made / PEFT_SETTINGS, fields)
        write_tensors(made / PEFT_TENSORS, _factors(modules, PEFT_PREFIX), _FORMAT | card_metadata(card))
        write_beside(made, card)


def write_diffusers(path: Path, adapter: Adapter, config: MMDiTConfig, card: AdapterCard | None = None) -> None:
    """Write a file for `StableDiffusion3Pipeline.load_lora_weights` of diffusers 0.34 or newer.

    `path` is a file if it ends in ".safetensors", else a folder that gets `pytorch_lora_weights.safetensors`; such a
    file is replaced. ComfyUI would read it at scale 1. The scale is as exact as in `write_peft`.

    Raises:
      ValueError: as `modules_from_adapter`.
    """
    file = path if path.suffix == ".safetensors" else path / DIFFUSERS_TENSORS
    modules = modules_from_adapter(adapter, config)
    fields = {PIPELINE_PREFIX + field: value for field, value in _fields(modules, config).items()}
    metadata = {**_FORMAT, _METADATA: json.dumps(fields, indent=2, sort_keys=True), **card_metadata(card)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, _factors(modules, PIPELINE_PREFIX), metadata)


def write_comfyui(path: Path, adapter: Adapter, config: MMDiTConfig, card: AdapterCard | None = None) -> None:
    """Write a file for ComfyUI, named `*.safetensors`: diffusers' names, and a scalar `alpha` for every module.

    alpha is float32, or float64 where float32 would round it; ComfyUI divides it by the rank in float64, which gives
    the adapter's very scale, as long as it is some alpha/R, else its neighbour. An existing file is replaced. diffusers
    refuses such a file.

    Raises:
      ValueError: the path does not end in ".safetensors", or as `modules_from_adapter`.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a file name that ends in .safetensors")
    modules = modules_from_adapter(adapter, config)
    tensors = _factors(modules, PIPELINE_PREFIX)
    for name, module in modules.items():
        tensors[f"{PIPELINE_PREFIX}{name}.alpha"] = _alpha_tensor(module.scale, module.a.shape[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, _FORMAT | card_metadata(card))


def write_sd_scripts(path: Path, adapter: Adapter, config: MMDiTConfig, card: AdapterCard | None = None) -> None:
    """Write a file in sd-scripts' layout, named `*.safetensors`: the original network's modules, each with its alpha.

    q, k and v are one module there: its factors are theirs along the diagonal, its rank three times theirs, so that
    `read_lora` gives the very adapter back. Alphas are as in `write_comfyui`. An existing file is replaced.

    Raises:
      ValueError: as `write_comfyui`.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a file name that ends in .safetensors")
    modules, known, tensors = modules_from_adapter(adapter, config), places(config), {}
    for name, parts in module_parts(config.depth).items():
        if not modules.keys() & set(parts):
            continue
        rank = next(iter(modules.values())).a.shape[0]
        a = np.zeros((rank * len(parts), known[parts[0]].shape[-2]), np.float32)
        width = known[parts[0]].shape[-1]
        b = np.zeros((width * len(parts), rank * len(parts)), np.float32)
        for index, part in enumerate(parts):
            if part in modules:
                own = slice(index * rank, (index + 1) * rank)
                a[own], b[index * width : (index + 1) * width, own] = modules[part].a, modules[part].b
        place = SD_SCRIPTS_PREFIX + name.replace(".", "_")
        tensors |= {f"{place}.lora_down.weight": a, f"{place}.lora_up.weight": b}
        tensors[f"{place}.alpha"] = _alpha_tensor(adapter.scale, len(a))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, _FORMAT | card_metadata(card))


def _alpha_tensor(scale: float, rank: int) -> np.ndarray:
    alpha = exact_alpha(scale, rank) or scale * rank
    return np.asarray(alpha, np.float32 if float(np.float32(alpha)) == alpha else np.float64)


def _fields(modules: Mapping[str, LoRAModule], config: MMDiTConfig) -> dict[str, Any]:
    module = next(iter(modules.values()))
    return make_fields(module.a.shape[0], module.scale, _target_modules(modules, config))


def _target_modules(modules: Mapping[str, LoRAModule], config: MMDiTConfig) -> list[str]:
    """Names within a block ("attn.to_q") where every block that has it is adapted, else whole module names."""

    def within_block(name: str) -> str:
        return name.split(".", 2)[2]

    partly = {within_block(name) for name in places(config).keys() - modules.keys()}
    return sorted({name if within_block(name) in partly else within_block(name) for name in modules})


def _factors(modules: Mapping[str, LoRAModule], prefix: str) -> dict[str, np.ndarray]:
    tensors = {}
    for name, module in modules.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = module.a
        tensors[f"{prefix}{name}.lora_B.weight"] = module.b
    return tensors
