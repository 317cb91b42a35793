"""PEFT's `LoraConfig` as JSON, reduced to what decides an adapter's update: the scale of each module.

The same fields stand in a PEFT folder's `adapter_config.json` and in the metadata of diffusers' LoRA files. Field names
and their meaning are those of peft 0.21, `peft/tuners/lora/config.py` and `layer.py`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Initialisations that leave the base weights as they are; every other one stores an update to *changed* base weights.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Fields that do not change what saved factors compute. Which modules are adapted, the tensors themselves say.
_HARMLESS = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
        "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
        "target_modules", "task_type",
    )
)  # fmt: skip
LARGEST_ALPHA, _MOST_RANK = 1e9, 2**20  # far beyond any, and its update is still finite in float32
_MOST_WAYS = 2**18  # see `_ways`: four repetitions and four alternatives; a fraction of a second for each module
_READ = frozenset(("alpha_pattern", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"))
# Fields that must be off, and why. A field that stands nowhere here must be off, too.
_REFUSED = {
    "alora_invocation_tokens": "aLoRA adapts only some tokens",
    "arrow_config": "Arrow routes between adapters",
    "bias": "it replaces biases of the base",
    "fan_in_fan_out": "the factors would be transposed",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "the update has biases",
    "modules_to_save": "it replaces whole modules of the base",
    "monteclora_config": "the update is random",
    "target_parameters": "parameters are adapted that are no linear layers",
    "trainable_token_indices": "it replaces embeddings of the base",
    "use_bdlora": "the factors are block-diagonal",
    "use_dora": "DoRA rescales the base weights",
    "use_qalora": "QALoRA pools the layers' inputs",
}


@dataclasses.dataclass(frozen=True)
class LoRASettings:
    """Rank and scale of every module, as PEFT derives them."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank(self, module: str) -> int:
        """Rank that the settings give a module."""
        return _look_up("rank_pattern", self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """alpha/R, or alpha/√R for rank-stabilised LoRA, in float64."""
        alpha, rank = _look_up("alpha_pattern", self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _look_up(field: str, pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression for the end of a module's name, from a dot on.

    PEFT takes the first key that matches, but sorts the keys whenever it saves them; hence two answers are refused.
    """
    matches = {key: value for key, value in pattern.items() if _compiled(key).match(module)}
    if len(set(matches.values())) > 1:
        raise ValueError(f"{field}: found {matches} for module {module!r}, expected one value")
    return next(iter(matches.values()), default)


@functools.lru_cache(maxsize=2**14)  # every module may have a key of its own, which is more than `re` remembers
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def parse_settings(fields: Mapping[str, Any]) -> LoRASettings:
    """Read `LoraConfig` fields, refusing every switch that makes the update more than scale·b·a on the given base.

    Raises:
      ValueError: names the field, what was found and what would be right.
    """
    if (kind := fields.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"peft_type: found {kind!r}, expected 'LORA'")
    init = fields.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        raise ValueError(
            f"init_lora_weights: found {init!r}, which changes the base weights; expected an adapter that was saved "
            "with path_initial_model_for_weight_conversion (true)"
        )
    for field in sorted(fields.keys() - _HARMLESS - _READ):
        if fields[field] not in (None, False, "none", "", [], {}):
            reason = _REFUSED.get(field, "its meaning is not known here")
            raise ValueError(f"{field}: found {fields[field]!r}, expected it to be off, since {reason}")
    return LoRASettings(
        r=_check_rank("r", fields.get("r")),
        lora_alpha=_check_alpha("lora_alpha", fields.get("lora_alpha")),
        use_rslora=_check_switch("use_rslora", fields.get("use_rslora")),
        rank_pattern=_check_pattern("rank_pattern", fields.get("rank_pattern"), _check_rank),
        alpha_pattern=_check_pattern("alpha_pattern", fields.get("alpha_pattern"), _check_alpha),
    )


def _check_rank(field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_RANK:
        raise ValueError(f"{field}: found {_short(value)}, expected a whole number of at least 1, at most {_MOST_RANK}")
    return value


def _short(value: Any) -> str:
    """A value in a message; JSON has numbers of any length, which Python may not even spell."""
    text = "a number of more digits than fit here" if type(value) is int and abs(value) > 10**80 else repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."


def _check_alpha(field: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < abs(value) <= LARGEST_ALPHA:
        raise ValueError(
            f"{field}: found {_short(value)}, expected a finite number other than 0, at most {LARGEST_ALPHA:g}"
        )
    return float(value)


def _check_switch(field: str, value: Any) -> bool:
    if value not in (None, False, True):
        raise ValueError(f"{field}: found {value!r}, expected true or false")
    return bool(value)


def _check_pattern(field: str, value: Any, check: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise ValueError(f"{field}: found {value!r}, expected an object of regular expressions")
    for key in value or {}:
        if _ways(key) > _MOST_WAYS:
            found = repr(key) if len(key) < 80 else f"{key[:80]!r}..."
            raise ValueError(
                f"{field}: found {found}, which may take for ever to match; expected at most four repetitions, none of "
                "what holds another repetition or alternatives"
            )
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{field}: found {key[:80]!r}, expected a regular expression ({error})") from error
    return {key: check(f"{field}[{key!r}]", entry) for key, entry in (value or {}).items()}


def _ways(key: str) -> float:
    """About how often matching may turn back: 16 per repetition, for each of the alternatives; repeated ones, ∞."""
    text = re.sub(r"\\.", "x", key, flags=re.DOTALL)
    text = re.sub(r"\[\^?\]?[^\]]*\]", "x", text)
    text = re.sub(r"\(\?(?:[:=!>]|<[=!]|P<\w+>|[aiLmsux-]+:?)", "(", text)
    ways = 2.0 ** min(text.count("?"), 64) * 16 ** min(len(re.findall(r"[*+{]", text)), 16)
    while group := re.search(r"\(([^()]*)\)([*+{]?)", text):
        varies = re.search(r"[*+{?|]", group[1]) is not None
        if varies and group[2]:
            return math.inf
        ways *= 1 + group[1].count("|")
        text = text[: group.start()] + "?" * varies + group[2] + text[group.end() :]  # "?": seen by the group around
    return ways * (1 + text.count("|"))


def make_fields(rank: int, scale: float, target_modules: Sequence[str]) -> dict[str, Any]:
    """`LoraConfig` fields for an adapter of one rank and one scale; those left out have PEFT's defaults."""
    alpha, use_rslora = _alpha_of_scale(scale, rank)
    return {
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(target_modules),
        "task_type": None,
        "use_dora": False,
        "use_rslora": use_rslora,
    }


def _alpha_of_scale(scale: float, rank: int) -> tuple[int | float, bool]:
    """(lora_alpha, use_rslora) from which PEFT computes this very scale in float64; nearly, where none exists."""
    for use_rslora, divisor in ((False, rank), (True, math.sqrt(rank))):
        if (alpha := exact_alpha(scale, divisor)) is not None:
            return alpha, use_rslora
    return scale * rank, False


def exact_alpha(scale: float, divisor: int | float) -> int | float | None:
    """A number whose float64 quotient by `divisor` is `scale`, whole if possible; none need exist."""
    product = scale * divisor
    for alpha in (round(product), product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf)):
        if alpha / divisor == scale:
            return alpha
    return None
