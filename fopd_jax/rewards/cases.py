"""Of each kind of reward, pairs of pictures whose order it must know: the right text above a wrong one, and the like.

They tell a working reward from a broken one, not a good one from a better one: only what nobody could dispute.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from fopd_jax.rewards import specimens
from fopd_jax.rewards.reward import Metadata
from fopd_jax.rewards.specimens import Picture


@dataclasses.dataclass(frozen=True)
class Case:
    """Two images of one prompt, of which the first is to score higher."""

    name: str
    better: UInt8[np.ndarray, "h w 3"]
    worse: UInt8[np.ndarray, "h w 3"]
    prompt: str
    metadata: Metadata = dataclasses.field(default_factory=dict)


def cases_of(kind: str) -> list[Case]:
    """The cases of a kind of reward; none of kinds that are not ours."""
    return [case for family, kinds in _FAMILIES.items() if kind in kinds for case in family()]


def pictures_of(prompts: Sequence[tuple[str, Metadata]]) -> list[Case]:
    """Pictures to try a reward on of which nothing more is known, for such prompts; their order means nothing."""
    shown = _shown()
    given = prompts or [(each.prompt, each.metadata) for each in shown]
    pictures = [each.picture for each in shown]
    pairs = zip(pictures, [*pictures[1:], pictures[0]], itertools.cycle(given), strict=False)
    return [Case("", first, second, prompt, metadata) for first, second, (prompt, metadata) in pairs]


def texts() -> list[Case]:
    """The right text, one wrong character, another text, no text."""
    blank, cases = specimens.plain(255, 255, 255), []
    for target, right, close, other in (
        ("HELLO WORLD", ["HELLO WORLD"], ["HELLO WARLD"], ["GOOD FRIDAY"]),
        ("Open from 9 to 5", ["Open from", "9 to 5"], ["Open from", "9 to 6"], ["No parking", "on Sundays"]),
    ):
        prompt = f'A white sign with the text "{target}"'
        same, near, far = (specimens.written(lines) for lines in (right, close, other))
        cases += [
            Case(f"{target!r} > one wrong character", same, near, prompt),
            Case(f"{target!r}, one wrong character > another text", near, far, prompt),
            Case(f"{target!r}, one wrong character > no text", near, blank, prompt),
        ]
    return cases


def objects() -> list[Case]:
    """GenEval's tags but the last, by stop signs and clocks, which detectors know even when they are drawn."""
    draw, sign, clock = specimens.side_by_side, specimens.stop_sign, specimens.clock
    empty, one, two, both, turned = draw(), draw(sign), draw(sign, sign), draw(sign, clock), draw(clock, sign)
    blue = draw(functools.partial(sign, colour=(25, 60, 200)))

    def case(name: str, better: Picture, worse: Picture, what: str, tag: str, *include: Metadata, **more: Any) -> Case:
        prompt = f"a photo of {what}"
        return Case(name, better, worse, prompt, {"tag": tag, "include": list(include), "prompt": prompt, **more})

    def asked(name: str, count: int = 1, **more: Any) -> Metadata:
        return {"class": name, "count": count, **more}

    stop, right = asked("stop sign"), asked("clock", position=["right of", 0])
    too_many = {"exclude": [asked("stop sign", 3)]}
    return [
        case("a stop sign > none", one, empty, "a stop sign", "single_object", stop),
        case("two objects > one", both, one, "a stop sign and a clock", "two_object", stop, asked("clock")),
        case("two stop signs > one", two, one, "two stop signs", "counting", asked("stop sign", 2), **too_many),
        case("red > blue", one, blue, "a red stop sign", "colors", asked("stop sign", color="red")),
        case("right of > left of", both, turned, "a clock right of a stop sign", "position", stop, right),
    ]


def asked_for() -> list[Case]:
    """What was asked for against everything else; red against blue tells swapped channels."""
    return [
        Case(f"{right.name} asked for > {other.name}", right.picture, other.picture, right.prompt, right.metadata)
        for right, other in itertools.permutations(_shown(), 2)
    ]


def ruins() -> list[Case]:
    """A clean picture against what is left of it."""
    scene = _shown()[0]
    ways = {"noise": specimens.noisy, "blur": specimens.blurred, "JPEG blocks": specimens.squeezed}
    return [
        Case(f"clean > {name}", scene.picture, ruin(scene.picture), scene.prompt, scene.metadata)
        for name, ruin in ways.items()
    ]


def sizes() -> list[Case]:
    """Less to store against more."""
    scene, blank = specimens.landscape(), specimens.plain(120, 160, 200)
    return [
        Case("one colour > mountains", blank, scene, _SCENE),
        Case("blur > mountains", specimens.blurred(scene), scene, _SCENE),
        Case("mountains > noise", scene, specimens.noisy(scene), _SCENE),
    ]


class _Shown(NamedTuple):
    """A picture with the prompt that asks for it, and beside it the questions that some judges put."""

    name: str
    picture: Picture
    prompt: str
    metadata: Metadata


def _shown() -> list[_Shown]:
    def shown(name: str, picture: Picture, prompt: str, question: str) -> _Shown:
        return _Shown(name, picture, prompt, {"questions": [question.lower()], "vqa_list": [[question, "Yes"]]})

    return [
        shown("mountains", specimens.landscape(), _SCENE, "Are there mountains in the image?"),
        shown("a text", specimens.written(["HELLO", "WORLD"]), 'the text "HELLO WORLD" on white', "Is there a text?"),
        shown("red", specimens.plain(220, 20, 20), "a plain red background", "Is the image red?"),
        shown("blue", specimens.plain(20, 40, 220), "a plain blue background", "Is the image blue?"),
    ]


_SCENE = "mountains behind a green meadow under a blue sky"
_FAMILIES: Mapping[Callable[[], list[Case]], Sequence[str]] = {
    texts: ("ocr",),
    objects: ("geneval",),
    asked_for: ("blip_vqa", "clipscore", "geneval2", "hpsv2", "hpsv3", "imagereward", "pickscore", "unifiedreward"),
    ruins: ("aesthetic", "deqa", "hpsv2", "hpsv3", "imagereward", "pickscore", "qwenvl", "unifiedreward"),
    sizes: ("jpeg_compressibility",),
}
"""Which kinds must know which."""
