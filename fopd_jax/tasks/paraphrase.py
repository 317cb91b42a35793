"""The same request in other words, by rules: for students that are to read what nobody trained them on.

GenEval's sentences are taken apart and said anew: another opening, the things in another order or seen from the other
side ("a cat left of a dog" is "a dog right of a cat"), colours behind their noun. Any other text keeps its sentences:
a few words give way to synonyms, a clause moves to the front, or it is announced as an image. What stands in quotes
stays as it is and where it is, relative to other quotes, since it is what is to be written.
"""

import random
import re
from collections.abc import Mapping, Sequence

from fopd_jax.tasks.sampling import chance

_PHOTO = re.compile(r"a photo of (.+)", re.IGNORECASE)
_OPENINGS = (
    "an image showing {}", "a picture of {}", "a photograph that shows {}", "{} in a photo", "{}, photographed",
    "this photo shows {}",
)  # fmt: skip
_ANNOUNCED = ("An image: {}", "Picture this: {}", "The scene: {}", "To be shown: {}")
_SIDES: Mapping[str, tuple[str, str, str]] = {  # from the other side, of "it", and in more words
    "left of": ("right of", "to its left", "to the left of"),
    "right of": ("left of", "to its right", "to the right of"),
    "above": ("below", "above it", "that is above"),
    "below": ("above", "below it", "that is below"),
}
_SIDE = re.compile(rf"(an? .+?) ({'|'.join(_SIDES)}) (an? .+)")
_PAIR = re.compile(r"(an? .+?) and (an? .+)")
_COUNT = re.compile(r"(two|three|four) (.+)")
_COLOURED = re.compile(r"an? (red|orange|yellow|green|blue|purple|pink|brown|black|white) (.+)")
_DIGITS = {"two": "2", "three": "3", "four": "4"}

_SYNONYMS: Mapping[str, Sequence[str]] = {
    "photo": ("picture", "photograph"), "photograph": ("photo", "picture"), "image": ("picture",),
    "that reads": ("that says", "with the words"), "that says": ("that reads", "with the words"),
    "reading": ("saying",), "reads": ("says",), "displays": ("shows",), "displaying": ("showing",),
    "depicting": ("showing",), "featuring": ("with",), "next to": ("beside",), "beside": ("next to",),
    "on top of": ("atop",), "underneath": ("beneath",), "surrounded by": ("in the midst of",), "small": ("little",),
    "large": ("big",), "big": ("large",), "bustling": ("busy",), "busy": ("bustling",), "vibrant": ("vivid",),
    "vivid": ("vibrant",), "beautiful": ("lovely",), "at night": ("by night",), "in the background": ("at the back",),
}  # fmt: skip
_SYNONYM = re.compile(rf"\b({'|'.join(sorted(_SYNONYMS, key=len, reverse=True))})\b", re.IGNORECASE)
_QUOTED = re.compile(r'"[^"]*"?|“[^”]*”?')
_HELD = re.compile(r"\0(\d+)\0")
_MOVES = re.compile(
    r"(?:with|in|on|at|under|beneath|against|near|from|during|set|seen|lit|surrounded|\w+ing (?:\w+ )?(?:a|an|the))"
    r" \S+(?: \S+){0,9}",
    re.IGNORECASE,
)
"""Clauses that can stand before what they are about."""
_SMALL = re.compile(r"(?:An?|The|In|On|At|With|Two|Three|Four|Some)\b")


def paraphrase(prompt: str, seed: int) -> str:
    """Another prompt for the same image, a function of both; the empty one stays.

    It differs by more than case and spaces. What is quoted comes in the same order, to the letter.
    """
    if not prompt.strip():
        return prompt
    rng = random.Random(int(chance(seed, "paraphrase", prompt) * 2**48))
    photo = _PHOTO.fullmatch(prompt)
    if photo and not _QUOTED.search(prompt):
        return _one(_OPENINGS, rng).format(_said(photo[1], rng))
    return _restated(prompt, rng)


# ---- GenEval's sentences


def _said(things: str, rng: random.Random) -> str:
    if side := _SIDE.fullmatch(things):
        first, second = _thing(side[1], rng), _thing(side[3], rng)
        opposite, beside, long = _SIDES[side[2]]
        forms = (f"{second} {opposite} {first}", f"{second} with {first} {beside}", f"{first} {long} {second}")
        return _one(forms, rng)
    if pair := _PAIR.fullmatch(things):
        first, second = _thing(pair[1], rng), _thing(pair[2], rng)
        return _one((f"{second} and {first}", f"{first} together with {second}", f"both {first} and {second}"), rng)
    if count := _COUNT.fullmatch(things):
        number, name = count.groups()
        return _one((f"exactly {number} {name}", f"{name}, {number} of them", f"{_DIGITS[number]} {name}"), rng)
    return _thing(things, rng)


def _thing(thing: str, rng: random.Random) -> str:
    """One with its article; where it has a colour, that may come behind."""
    coloured = _COLOURED.fullmatch(thing)
    if coloured is None:
        return thing
    colour, name = coloured.groups()
    article = "an" if name[0] in "aeiou" else "a"
    return _one((thing, f"{article} {name} that is {colour}", f"{article} {name} coloured {colour}"), rng)


# ---- any other text


def _restated(prompt: str, rng: random.Random) -> str:
    quoted = _QUOTED.findall(prompt)
    places = iter(range(len(quoted)))
    text = _QUOTED.sub(lambda _: f"\0{next(places)}\0", prompt)
    changed = _SYNONYM.sub(lambda found: _alike(found[0], rng), text)
    if rng.random() < 0.75:
        changed = _moved(changed)
    if _plain(changed) == _plain(text) or rng.random() < 0.25:
        changed = _one(_ANNOUNCED, rng).format(changed.strip())
    return _HELD.sub(lambda found: quoted[int(found[1])], changed)


def _alike(words: str, rng: random.Random) -> str:
    if rng.random() >= 0.75:
        return words
    other = _one(_SYNONYMS[words.lower()], rng)
    return _raised(other) if words[0].isupper() else other


def _moved(text: str) -> str:
    """The last clause of the first sentence, or of a list of tags the last, at its beginning, where it can stand there
    and quotes nothing.
    """
    first, *rest = re.split(r"(?<=[.!?])(?=\s)", text, maxsplit=1)
    stop = re.search(r"[.!?]?\s*$", first)
    body, end = (first[: stop.start()], stop[0]) if stop else (first, "")
    head, comma, last = body.rpartition(", ")
    tags = [len(each.split()) for each in body.split(",")]
    if not comma or "\0" in last or not (_MOVES.fullmatch(last) or (len(tags) > 3 and max(tags) < 6)):
        return text
    last = _raised(last) if head[0].isupper() else last
    return f"{last}, {_lowered(head)}{end}{''.join(rest)}"


def _raised(text: str) -> str:
    return text[0].upper() + text[1:]


def _lowered(text: str) -> str:
    """With a small letter at its beginning where that is no name's."""
    return text[0].lower() + text[1:] if _SMALL.match(text) else text


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _one(choices: Sequence[str], rng: random.Random) -> str:
    """By `random()` alone, whose numbers are promised to stay."""
    return choices[int(rng.random() * len(choices))]
