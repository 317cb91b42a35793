"""LoRA factors in safetensors files: tensor names of PEFT, diffusers and ComfyUI, and reading them.

A tensor's name is layout prefix + module + role. Prefixes: `base_model.model.` (PEFT), `transformer.` (a diffusers
pipeline, ComfyUI), none (diffusers' `save_lora_adapter`), and with "_" for every "." `lora_transformer_` (OneTrainer,
ComfyUI) and `lycoris_` (SimpleTuner, ComfyUI); they may be nested. Behind `diffusion_model.` (ComfyUI) and, with "_"
for every ".", `lora_unet_` (sd-scripts) stand the original network's modules, of which one may hold q, k and v. Roles:
`lora_A.weight`, `lora_down.weight` or `lora.down.weight` [R, in], `lora_B.weight`, `lora_up.weight` or `lora.up.weight`
[out, R], and the scalar `alpha`. An adapter's name may stand before `.weight`. diffusers' first layout,
`attn.processor.to_q_lora.down.weight`, is read as diffusers does. Tensors of text encoders are left out, and counted in
one warning.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, so that safetensors can return it
import numpy as np
from safetensors import SafetensorError, safe_open

from fopd_jax.interop.files.tensor_files import other_format
from fopd_jax.interop.lora.config import LARGEST_ALPHA
from fopd_jax.interop.lora.modules import find_place
from fopd_jax.interop.sd3.diffusers import module_names
from fopd_jax.interop.sd3.original import module_parts
from fopd_jax.models.mmdit import MMDiTConfig

PEFT_TENSORS = "adapter_model.safetensors"
DIFFUSERS_TENSORS = "pytorch_lora_weights.safetensors"
PEFT_PREFIX = "base_model.model."
PIPELINE_PREFIX = "transformer."
_UNDERSCORED_PREFIX = "lora_transformer_"
_LYCORIS_PREFIX = "lycoris_"
SD_SCRIPTS_PREFIX = "lora_unet_"
_ORIGINAL_PREFIX = "diffusion_model."
_LAYOUTS = (
    PEFT_PREFIX, PIPELINE_PREFIX, _UNDERSCORED_PREFIX, _LYCORIS_PREFIX, SD_SCRIPTS_PREFIX, "model." + _ORIGINAL_PREFIX,
    _ORIGINAL_PREFIX,
)  # fmt: skip
_TEXT_ENCODERS = (
    "text_encoder", "lora_te", "te1.", "te2.", "te3.", "clip_l", "clip_g", "t5xxl", "bundle_emb.",
)  # fmt: skip  # begin the names of their tensors, words trained for them among those
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")  # torch.compile and FSDP insert these
_ROLES = {
    "lora_A": "a", "lora_down": "a", "lora.down": "a", "lora_linear_layer.down": "a",
    "lora_B": "b", "lora_up": "b", "lora.up": "b", "lora_linear_layer.up": "b", "alpha": "alpha",
}  # fmt: skip
_FACTORS = "|".join(re.escape(role) for role in _ROLES if role != "alpha")
_NAME = re.compile(rf"(?P<module>.+?)\.(?:(?P<factor>{_FACTORS})(?:\.(?P<adapter>[^.]+))?\.weight|(?P<alpha>alpha))")
_PROCESSOR = re.compile(r"(?:\.processor)?\.(to_[qkv]|to_out)_lora\.(down|up)(?=\.weight$)")
_DTYPES = {
    "a": ("F32", "F16", "BF16"), "b": ("F32", "F16", "BF16"), "alpha": ("F64", "F32", "F16", "BF16", "I64", "I32")
}  # fmt: skip
_REFUSED = {
    "lora_magnitude_vector": "DoRA rescales the base weights, which is not supported",
    "dora_scale": "DoRA rescales the base weights, which is not supported",
    "lora_B.bias": "biases of the update (lora_bias) are not supported",
    "hada_": "LoHa is not supported, only LoRA is",
    "lokr_": "LoKr is not supported, only LoRA is",
    "oft_": "OFT is not supported, only LoRA is",
    "lora_mid": "three-factor LoRA is not supported",
    ".diff_b": "differences of biases are not supported, only LoRA is",
}


@dataclasses.dataclass(frozen=True)
class LoRAFile:
    """What one file holds: factors (a [R, in], b [out, R], float32) and alphas by module, its prefix and metadata.

    `ranks` are those that the file's alphas are divided by: of what holds q, k and v, the rank of the whole.
    `renamed` is a module that the file calls otherwise than diffusers does, where it has any.
    """

    prefix: str
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    alphas: Mapping[str, float]
    ranks: Mapping[str, int]
    metadata: Mapping[str, str]
    renamed: str | None


@dataclasses.dataclass(frozen=True)
class _Name:
    prefix: str
    module: str  # as the file calls it
    parts: tuple[str, ...]  # modules that the tensor holds along its outputs
    role: str
    adapter: str | None


def read_lora_file(path: Path, config: MMDiTConfig) -> LoRAFile:
    """Read every tensor of a file, each exactly once.

    Raises:
      ValueError: the file is missing or damaged; a name is unknown, occurs twice after normalisation or adapts what no
        bank can route; a tensor is misshapen, not finite or of another dtype than float32, float16 and bfloat16; or a
        module lacks a factor. Names the tensor, what was found and what would be right, but not the file (`naming`).
    """
    if not path.is_file():
        raise ValueError("no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            names = _parse_names(_of_transformer(list(file.keys())), config)
            whole = {key: _read(file, key, name.role) for key, name in names.items()}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(other_format(path) or f"damaged or no safetensors file ({error})") from error
    keys = {(part, name.role): key for key, name in names.items() for part in name.parts}
    tensors = {
        (part, name.role): tensor
        for key, name in names.items()
        for part, tensor in zip(name.parts, _split(key, name, whole[key]), strict=True)
    }
    modules = sorted({module for module, _ in tensors})
    pairs = {module: _pair(module, tensors, keys, config) for module in modules}
    factors = dict(pairs)
    for name in names.values():
        if len(name.parts) > 1 and name.role == "b":
            factors |= _without_blocks({part: pairs[part] for part in name.parts})
    factors = {module: pair for module, pair in factors.items() if len(keys) == len(names) or any(map(np.any, pair))}
    if not factors:
        raise ValueError("found zeros only, expected LoRA factors")
    return LoRAFile(
        prefix=next(iter(names.values())).prefix,
        factors=factors,
        alphas={module: float(value.item()) for (module, role), value in tensors.items() if role == "alpha"},
        ranks={module: len(a) for module, (a, _) in pairs.items()},
        metadata=metadata,
        renamed=next((name.module for name in names.values() if name.parts != (name.module,)), None),
    )


def _of_transformer(keys: Sequence[str]) -> list[str]:
    """The names that are no text encoder's; those are counted in a warning, and nothing but those is refused."""
    others = [key for key in keys if any(key.removeprefix(PEFT_PREFIX).startswith(mark) for mark in _TEXT_ENCODERS)]
    if others and len(others) == len(keys):
        raise ValueError(f"tensor {keys[0]!r}: only adapters of the transformer are read, not of a text encoder")
    if others:
        logging.getLogger(__name__).warning(
            "left out %d tensors of text encoders (%s, ...): only the transformer's are read", len(others), others[0]
        )
    return [key for key in keys if key not in set(others)]


def _split(key: str, name: _Name, tensor: np.ndarray) -> Sequence[np.ndarray]:
    """What each part of a module gets of its tensor: rows of the update's outputs, and all of the rest."""
    count = len(name.parts)
    if name.role != "b" or count == 1:
        return [tensor] * count
    if tensor.ndim != 2 or len(tensor) % count:
        raise ValueError(f"tensor {key!r}: found shape {tensor.shape}, expected {count} equal parts of outputs")
    return np.split(tensor, count)


def _without_blocks(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Factors of the parts of one module, each of its own rank where the module's b is block-diagonal."""
    a, count = next(iter(pairs.values()))[0], len(pairs)
    if len(a) % count:
        return dict(pairs)
    rank, made = len(a) // count, {}
    for index, (part, (_, b)) in enumerate(pairs.items()):
        own = slice(index * rank, (index + 1) * rank)
        if np.delete(b, own, axis=1).any():
            return dict(pairs)
        made[part] = (a[own], b[:, own])
    return made


def _parse_names(keys: Sequence[str], config: MMDiTConfig) -> dict[str, _Name]:
    """Names by key; refuses a file that mixes layouts or adapters, or holds a tensor twice."""
    if not keys:
        raise ValueError("found no tensors, expected LoRA factors")
    names = {key: _parse_name(key, config) for key in keys}
    seen: dict[tuple[str, str], str] = {}
    for key, name in names.items():
        for part in name.parts:
            if (other := seen.setdefault((part, name.role), key)) != key:
                raise ValueError(f"tensors {other!r} and {key!r}: both are {name.role} of module {part!r}")
    first, *others = [key for key in keys if names[key].role != "alpha"] or keys
    for key in others:
        if names[key].adapter != names[first].adapter:
            raise ValueError(f"tensors {first!r} and {key!r}: found two adapters, expected one")
    for key in keys:
        if names[key].prefix != names[first].prefix:
            raise ValueError(f"tensors {first!r} and {key!r}: found two layouts, expected one")
    return names


def _parse_name(key: str, config: MMDiTConfig) -> _Name:
    plain = functools.reduce(lambda text, wrapper: text.replace(wrapper, ""), _WRAPPERS, key)
    plain = _PROCESSOR.sub(lambda match: f".{match[1]}{'.0' * (match[1] == 'to_out')}.lora.{match[2]}", plain)
    for mark, reason in _REFUSED.items():
        if mark in plain:
            raise ValueError(f"tensor {key!r}: {reason}")
    match = _NAME.fullmatch(plain)
    if match is None:
        raise ValueError(f"tensor {key!r}: no LoRA factor, expected <module>.lora_A.weight, .lora_B.weight or .alpha")
    module = match["module"]
    while layout := next((layout for layout in _LAYOUTS if module.startswith(layout)), ""):
        module = module.removeprefix(layout)
    prefix = match["module"].removesuffix(module)
    parts = _parts(config).get(module, (module,))
    return _Name(prefix, module, parts, _ROLES[match["factor"] or match["alpha"]], match["adapter"])


@functools.lru_cache(maxsize=8)
def _parts(config: MMDiTConfig) -> Mapping[str, tuple[str, ...]]:
    """Other names of modules, the original network's and those with "_" for every "." → diffusers' names."""
    own = module_names(config).values()
    original = {ours: parts for ours, parts in module_parts(config.depth).items() if set(parts) <= set(own)}
    names = {name: (name,) for name in own} | original
    return {name.replace(".", "_"): parts for name, parts in names.items()} | names


def _read(file: Any, key: str, role: str) -> np.ndarray:
    """One tensor, factors as float32, alphas as float64."""
    if (dtype := file.get_slice(key).get_dtype()) not in _DTYPES[role]:
        raise ValueError(f"tensor {key!r}: found dtype {dtype}, expected one of {', '.join(_DTYPES[role])}")
    tensor = file.get_tensor(key).astype(np.float64 if role == "alpha" else np.float32)
    if role == "alpha" and tensor.size != 1:
        raise ValueError(f"tensor {key!r}: found shape {tensor.shape}, expected a scalar")
    if not np.isfinite(tensor).all() or (role == "alpha" and not 0 < abs(tensor.item()) <= LARGEST_ALPHA):
        raise ValueError(f"tensor {key!r}: found {'0 or ' * (role == 'alpha')}a number that is not finite")
    return tensor


def _pair(
    module: str,
    tensors: Mapping[tuple[str, str], np.ndarray],
    keys: Mapping[tuple[str, str], str],
    config: MMDiTConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Both factors of a module, of the shapes that the network has there."""
    *_, d_in, d_out = find_place(module, config).shape
    for role in ("a", "b"):
        if (module, role) not in tensors:
            present = next(key for (name, _), key in keys.items() if name == module)
            missing = "lora_A" if role == "a" else "lora_B"
            raise ValueError(f"module {module!r}: found {present!r}, but no {missing} beside it")
    a, b = tensors[module, "a"], tensors[module, "b"]
    rank = a.shape[0] if a.ndim == 2 and len(a) else "R"
    for role, tensor, expected in (("a", a, (rank, d_in)), ("b", b, (d_out, rank))):
        if tensor.shape != expected:
            right = "({}, {})".format(*expected)
            raise ValueError(f"tensor {keys[module, role]!r}: found shape {tensor.shape}, expected {right}")
    return a, b
