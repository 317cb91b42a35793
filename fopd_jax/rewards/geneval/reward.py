"""The reward `geneval`: objects found in an image against the record that stands beside its prompt."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.rewards.geneval.colours import Classify, Crop, clip_colours, cut, pixel_colours
from fopd_jax.rewards.geneval.detections import Detect, Detections
from fopd_jax.rewards.geneval.detectors import MASK2FORMER, ONNX, find_detector
from fopd_jax.rewards.geneval.onnx import OnnxOptions
from fopd_jax.rewards.geneval.records import Record, read_record
from fopd_jax.rewards.geneval.rule import VALUES, Limits, find_objects, geneval_score, questions
from fopd_jax.rewards.options import read_options
from fopd_jax.rewards.reward import Metadata, Reward, Scores, collect

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options(OnnxOptions):
    """`value` is what is rewarded; the other three are kept beside it. `colours`: "clip", which needs its weights,
    `clip`; or "pixels", not GenEval's, which needs none. The limits are `rule.Limits`, GenEval's by default; the rest
    is for ONNX detectors.
    """

    value: str = "continuous"
    detector: str = MASK2FORMER
    colours: str = "clip"
    clip: str = ""
    score: float = Limits.score
    counting_score: float = Limits.counting_score
    most: int = Limits.most
    overlap: float = Limits.overlap

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("value", VALUES), ("colours", ("clip", "pixels"))):
            if (found := getattr(self, name)) not in known:
                raise ValueError(f"{name}: found {found!r}, expected one of {', '.join(known)}")
        if self.colours == "clip" and not self.clip:
            raise ValueError("clip: found '', expected the file of CLIP's weights (ViT-L/14), or colours = 'pixels'")
        if self.colours != "clip" and self.clip:
            raise ValueError(f"clip: found {self.clip!r}, expected '': colours = {self.colours!r} reads none")
        for each in dataclasses.fields(OnnxOptions):
            if self.detector != ONNX and (found := getattr(self, each.name)) != each.default:
                raise ValueError(f"{each.name}: found {found!r}, expected none: {self.detector} takes no such option")
        for name in ("score", "counting_score", "overlap"):
            if not 0 <= (found := getattr(self, name)) <= 1:
                raise ValueError(f"{name}: found {found}, expected 0 to 1")
        if not 1 <= self.most <= 1000:
            raise ValueError(f"most: found {self.most}, expected 1 to 1000")

    @property
    def limits(self) -> Limits:
        return Limits(self.score, self.counting_score, self.most, self.overlap)


def make(name: str, settings: RewardConfig, server: Server | None) -> Reward:
    """GenEval by the detector and the colours that the options name; `settings.weights` are the detector's.

    Raises:
      ValueError: an option is wrong, or a network cannot be made; names the field.
    """
    field = f"rewards.{name}"
    options = read_options(Options, settings.options, f"{field}.options")
    detect = find_detector(options.detector, settings.weights, options, field)
    classify = pixel_colours
    if options.colours == "clip":
        from fopd_jax.rewards.clip import load_clip

        classify = clip_colours(load_clip(Path(options.clip), f"{field}.options.clip"))
    return geneval_reward(name, detect, classify, options)


def geneval_reward(name: str, detect: Detect, classify: Classify, options: Options) -> Reward:
    """The same of a detector and a classifier that are at hand."""
    lowest = min(0.0, 2.0 - options.most) if options.value == "continuous" else 0.0  # all that count, one asked for

    def score(images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        found = _detect(detect, images)
        seen = [_attempt(_look, *each, options.limits) for each in zip(images, prompts, metadata, found, strict=True)]
        return collect([_attempt(_value, each, options) for each in _with_colours(seen, classify)])

    def check(prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        for prompt, each in zip(prompts, metadata, strict=True):
            _check_reachable(prompt, read_record(prompt, each), options.most)

    on_device = options.detector == MASK2FORMER or options.colours == "clip"
    return Reward(name, score, (lowest, 1.0), "device" if on_device else "host", check)


def _check_reachable(prompt: str, record: Record, most: int) -> None:
    for item in (*record.include, *record.exclude):
        if item.count > most:
            raise ValueError(
                f"GenEval prompt {prompt!r}, tag {record.tag!r}: found count {item.count} of {item.name}, expected "
                f"at most {most}: no more are looked at (options.most)"
            )


class _Seen(NamedTuple):
    """What is known of an image: its record, what was found, and of whose colour counts the crop, later the colour."""

    record: Record
    detections: Detections
    crops: dict[tuple[str, int], Crop]
    colours: dict[tuple[str, int], str]


def _detect(detect: Detect, images: UInt8[np.ndarray, "n h w 3"]) -> list[Detections | Exception]:
    """Of each image what is in it; if all at once fails, each alone, so that one that cannot be read fails alone."""

    def alone(image: UInt8[np.ndarray, "h w 3"]) -> Detections:
        if len(found := detect(image[None])) != 1:
            raise ValueError(f"the detector answers for {len(found)} images, expected 1")
        return found[0]

    found = _attempt(detect, images)
    if not isinstance(found, Exception) and len(found) == len(images):
        return list(found)
    return [_attempt(alone, image) for image in images]


def _look(
    image: UInt8[np.ndarray, "h w 3"],
    prompt: str,
    metadata: Metadata,
    detections: Detections | Exception,
    limits: Limits,
) -> _Seen:
    if isinstance(detections, Exception):
        raise detections
    boxes, masks = detections.boxes, detections.masks
    if masks is not None and masks.shape[1:] != image.shape[:2]:
        raise ValueError(f"detections: found masks of {masks.shape[1:]} of an image of {image.shape[:2]}")
    record = read_record(prompt, metadata)
    crops = {
        (name, place): cut(name, image, boxes[place], None if masks is None else masks[place])
        for name, places in questions(record, find_objects(record.tag, detections, limits))
        for place in places
    }
    return _Seen(record, detections, crops, {})


def _with_colours(seen: Sequence[_Seen | Exception], classify: Classify) -> list[_Seen | Exception]:
    """The same with colours, all crops classified at once; if that fails, so does each image that needs one."""
    crops = [crop for each in seen if isinstance(each, _Seen) for crop in each.crops.values()]
    colours = _attempt(classify, crops)
    if not isinstance(colours, Exception) and len(colours) != len(crops):
        colours = ValueError(f"the classifier answers for {len(colours)} crops, expected {len(crops)}")
    if isinstance(colours, Exception):
        return [colours if isinstance(each, _Seen) and each.crops else each for each in seen]
    rest = iter(colours)
    return [
        each._replace(colours={asked: next(rest) for asked in each.crops}) if isinstance(each, _Seen) else each
        for each in seen
    ]


def _value(seen: _Seen | Exception, options: Options) -> tuple[float, dict[str, Any]]:
    """The value that is rewarded, and what it rests on."""
    if isinstance(seen, Exception):
        raise seen
    scores = geneval_score(
        seen.record,
        seen.detections,
        lambda name, places: [seen.colours[name, place] for place in places],
        options.limits,
    )
    return float(getattr(scores, options.value)), {"tag": seen.record.tag, **dataclasses.asdict(scores)}


def _attempt(function: Callable[..., T], *args: Any) -> T | Exception:
    try:
        return function(*args)
    except Exception as error:  # whatever goes wrong with one image is its failure, not the batch's
        return error
