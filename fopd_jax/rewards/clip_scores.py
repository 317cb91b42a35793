"""Rewards that are a cosine of CLIP's, or one affine map of its picture: PickScore, CLIPScore, HPSv2, aesthetics.

- `pickscore` (Kirstain et al. 2023, arXiv 2305.01569): cosine times the network's own scale, 100; 20 to 24 of good
  pictures. As a reward it is commonly divided by 26, `divide_by`.
- `clipscore` (Hessel et al. 2021, arXiv 2104.08718): CLIP-L/14's cosine in one of three published units, `unit`.
- `hpsv2` (Wu et al. 2023, arXiv 2306.09341): the plain cosine, .25 to .41; tables show it times 100.
- `aesthetic` (Schuhmann, LAION-Aesthetics V2): of the picture alone, about 1 to 10.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.interop.scorers import aesthetic
from fopd_jax.interop.scorers.weights import load_weights
from fopd_jax.rewards.clip import DTYPES, Clip, load_clip
from fopd_jax.rewards.options import read_options
from fopd_jax.rewards.preprocessing import FLOW_GRPO, HPSV2, TRANSFORMERS, Preprocessing
from fopd_jax.rewards.reward import Metadata, Reward, Scores, Traced, Tree, collect

_UNITS = {"flow_grpo": 1 / 30, "diffusion_nft": 1 / 100, "logits": 1.0}
"""CLIPScore's units, of the network's logits: what Flow-GRPO, Flow-OPD and UniRL divide by, and DiffusionNFT."""
_PREPROCESSING: Mapping[str, Preprocessing] = {"transformers": TRANSFORMERS, "flow_grpo": FLOW_GRPO}


@dataclasses.dataclass(frozen=True)
class _Options:
    """`dtype`: in which the towers compute."""

    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_one_of("dtype", self.dtype, DTYPES)


@dataclasses.dataclass(frozen=True)
class _CLIPScore(_Options):
    """`unit` of the values; `preprocessing`: transformers' own, or what Flow-GRPO does to float tensors."""

    unit: str = "flow_grpo"
    preprocessing: str = "transformers"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_one_of("unit", self.unit, tuple(_UNITS))
        _check_one_of("preprocessing", self.preprocessing, tuple(_PREPROCESSING))


@dataclasses.dataclass(frozen=True)
class _Aesthetic(_Options):
    """`head`: the converted file of the affine map."""

    head: str = ""


_KINDS = {"pickscore": _Options, "clipscore": _CLIPScore, "hpsv2": _Options, "aesthetic": _Aesthetic}


def _check_one_of(name: str, found: str, allowed: Sequence[str]) -> None:
    if found not in allowed:
        raise ValueError(f"{name}: found {found!r}, expected one of {', '.join(allowed)}")


def make(name: str, settings: RewardConfig, server: Server | None) -> Reward:
    """The reward `settings.kind`, or `name` where that is empty; `weights` is a converted CLIP.

    Raises:
      ValueError: the kind is none of these, an option or a file is missing or wrong; names `rewards.NAME` and field.
    """
    kind = settings.kind or name
    if kind not in _KINDS:
        raise ValueError(f"rewards.{name}.kind: found {kind!r}, expected one of {', '.join(_KINDS)}")
    options = read_options(_KINDS[kind], settings.options, f"rewards.{name}.options")
    field = f"rewards.{name}.weights"
    if not settings.weights:
        raise ValueError(f"{field}: found nothing, expected a CLIP that tools/convert_reward_weights.py converted")
    if isinstance(options, _Aesthetic):
        return _aesthetic(name, Path(settings.weights), options)
    how, unit = HPSV2 if kind == "hpsv2" else TRANSFORMERS, 1.0
    if isinstance(options, _CLIPScore):
        how, unit = _PREPROCESSING[options.preprocessing], _UNITS[options.unit]
    clip = load_clip(Path(settings.weights), field, how, options.dtype)
    clip.check_words()
    scale = 1.0 if kind == "hpsv2" else clip.logit_scale * unit
    return Reward(name, _by_cosine(clip, scale), (-scale, scale), "device", traced=_cosine_within(clip, scale))


def _by_cosine(clip: Clip, scale: float) -> Callable[..., Scores]:
    """Scale times the cosine of a picture and its prompt."""

    def score(images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        texts = list(dict.fromkeys(prompts))  # several pictures a prompt are the rule
        of_text = dict(zip(texts, clip.embed_texts(texts), strict=True))
        pictures = clip.embed_images(list(images))
        cosines = [float(picture @ of_text[prompt]) for picture, prompt in zip(pictures, prompts, strict=True)]
        return collect([(scale * cosine, {"cosine": cosine}) for cosine in cosines])

    return score


def _cosine_within(clip: Clip, scale: float) -> Traced:
    """The same within a program; a text is read once for each of its pictures, which costs little beside them."""

    def score(params: Tree, images: UInt8[Array, "b h w 3"], ids: Int32[Array, "b s"]) -> Float[Array, " b"]:
        return scale * (clip.see(params, images) * clip.read(params, ids)).sum(axis=-1)

    return Traced(lambda prompts, metadata: clip.prepare(prompts), score, clip.params)


def _aesthetic(name: str, weights: Path, options: _Aesthetic) -> Reward:
    field = f"rewards.{name}.options.head"
    if not options.head:
        raise ValueError(f"{field}: found nothing, expected the head that tools/convert_reward_weights.py converted")
    shape, head = load_weights(Path(options.head), aesthetic.NETWORK, field)
    clip = load_clip(weights, f"rewards.{name}.weights", TRANSFORMERS, options.dtype)
    if shape["width"] != clip.dim:
        raise ValueError(f"{field}: found a head of {shape['width']} features, expected {clip.dim} as of the weights")
    kernel: Float[np.ndarray, " d"] = head["kernel"]

    def score(images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        values = clip.embed_images(list(images)) @ kernel + head["bias"]
        return collect([(float(value), {}) for value in values])

    def score_within(params: Tree, images: UInt8[Array, "b h w 3"], rows: Tree) -> Float[Array, " b"]:
        seen = clip.see(params, images)
        return (seen * params["head"]["kernel"][None]).sum(axis=-1) + params["head"]["bias"]

    traced = Traced(lambda *_: {}, score_within, lambda: {"vision": clip.params()["vision"], "head": head})
    return Reward(name, score, (None, None), "device", traced=traced)
