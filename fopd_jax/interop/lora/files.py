"""LoRA factors in safetensors files: tensor names of PEFT, diffusers and ComfyUI, and reading them.

A tensor's name is layout prefix + module + role. Prefixes: `base_model.model.` (PEFT), `transformer.` (a diffusers
pipeline, ComfyUI), none (diffusers' `save_lora_adapter`), and `lora_transformer_` with "_" for every "." (OneTrainer,
ComfyUI). Roles: `lora_A.weight` or `lora_down.weight` [R, in], `lora_B.weight` or `lora_up.weight` [out, R], and the
scalar `alpha`, which only ComfyUI reads. An adapter's name may stand before `.weight`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, so that safetensors can return it
import numpy as np
from safetensors import SafetensorError, safe_open

from fopd_jax.interop.lora.modules import find_place, places
from fopd_jax.models.mmdit import MMDiTConfig

PEFT_PREFIX = "base_model.model."
PIPELINE_PREFIX = "transformer."
_UNDERSCORED_PREFIX = "lora_transformer_"
_LAYOUTS = (PEFT_PREFIX, PIPELINE_PREFIX, _UNDERSCORED_PREFIX, "")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")  # torch.compile and FSDP insert these
_ROLES = {"lora_A": "a", "lora_down": "a", "lora_B": "b", "lora_up": "b", "alpha": "alpha"}
_NAME = re.compile(
    r"(?P<module>.+?)\.(?:(?P<factor>lora_A|lora_B|lora_down|lora_up)(?:\.(?P<adapter>[^.]+))?\.weight|(?P<alpha>alpha))"
)
_DTYPES = {"a": ("F32", "F16", "BF16"), "b": ("F32", "F16", "BF16"), "alpha": ("F64", "F32", "F16", "BF16")}
_REFUSED = {
    "lora_magnitude_vector": "DoRA rescales the base weights, which is not supported",
    "dora_scale": "DoRA rescales the base weights, which is not supported",
    "text_encoder": "only adapters of the transformer are read, not of a text encoder",
    "lora_te": "only adapters of the transformer are read, not of a text encoder",
    "lora_B.bias": "biases of the update (lora_bias) are not supported",
    "lora_unet_": "Stability's own module names, with q, k and v in one matrix; expected diffusers' module names",
    "diffusion_model.": "Stability's own module names, with q, k and v in one matrix; expected diffusers' module names",
    "hada_": "LoHa is not supported, only LoRA is",
    "lokr_": "LoKr is not supported, only LoRA is",
    "lora_mid": "three-factor LoRA is not supported",
}


@dataclasses.dataclass(frozen=True)
class LoRAFile:
    """What one file holds: factors (a [R, in], b [out, R], float32) and alphas by module, its prefix and metadata."""

    prefix: str
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Name:
    prefix: str
    module: str
    role: str
    adapter: str | None


@contextmanager
def naming(source: Path | str) -> Iterator[None]:
    """Put the name of a file, or of a part of one, in front of the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


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
            names = _parse_names(list(file.keys()), config)
            tensors = {(name.module, name.role): _read(file, key, name.role) for key, name in names.items()}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"damaged or no safetensors file ({error})") from error
    keys = {(name.module, name.role): key for key, name in names.items()}
    modules = sorted({module for module, _ in tensors})
    return LoRAFile(
        prefix=next(iter(names.values())).prefix,
        factors={module: _pair(module, tensors, keys, config) for module in modules},
        alphas={module: float(value.item()) for (module, role), value in tensors.items() if role == "alpha"},
        metadata=metadata,
    )


def _parse_names(keys: Sequence[str], config: MMDiTConfig) -> dict[str, _Name]:
    """Names by key; refuses a file that mixes layouts or adapters, or holds a tensor twice."""
    if not keys:
        raise ValueError("found no tensors, expected LoRA factors")
    underscored = {name.replace(".", "_"): name for name in places(config)}
    names = {key: _parse_name(key, underscored) for key in keys}
    seen: dict[tuple[str, str], str] = {}
    for key, name in names.items():
        if (other := seen.setdefault((name.module, name.role), key)) != key:
            raise ValueError(f"tensors {other!r} and {key!r}: both are {name.role} of module {name.module!r}")
    first, *others = [key for key in keys if names[key].role != "alpha"] or keys
    for key in others:
        if names[key].adapter != names[first].adapter:
            raise ValueError(f"tensors {first!r} and {key!r}: found two adapters, expected one")
    for key in keys:
        if names[key].prefix != names[first].prefix:
            raise ValueError(f"tensors {first!r} and {key!r}: found two layouts, expected one")
    return names


def _parse_name(key: str, underscored: Mapping[str, str]) -> _Name:
    plain = functools.reduce(lambda text, wrapper: text.replace(wrapper, ""), _WRAPPERS, key)
    for mark, reason in _REFUSED.items():
        if mark in plain:
            raise ValueError(f"tensor {key!r}: {reason}")
    match = _NAME.fullmatch(plain)
    if match is None:
        raise ValueError(f"tensor {key!r}: no LoRA factor, expected <module>.lora_A.weight, .lora_B.weight or .alpha")
    prefix = next(layout for layout in _LAYOUTS if match["module"].startswith(layout))
    module = match["module"].removeprefix(prefix)
    if prefix == _UNDERSCORED_PREFIX:
        module = underscored.get(module, module)
    return _Name(prefix, module, _ROLES[match["factor"] or match["alpha"]], match["adapter"])


def _read(file: Any, key: str, role: str) -> np.ndarray:
    """One tensor, factors as float32, alphas as float64."""
    if (dtype := file.get_slice(key).get_dtype()) not in _DTYPES[role]:
        raise ValueError(f"tensor {key!r}: found dtype {dtype}, expected one of {', '.join(_DTYPES[role])}")
    tensor = file.get_tensor(key).astype(np.float64 if role == "alpha" else np.float32)
    if role == "alpha" and tensor.size != 1:
        raise ValueError(f"tensor {key!r}: found shape {tensor.shape}, expected a scalar")
    if not np.isfinite(tensor).all() or (role == "alpha" and tensor.item() == 0):
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
