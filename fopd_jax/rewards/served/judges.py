"""Vision-language models as judges, behind servers of OpenAI's protocol such as vLLM and SGLang.

- `unifiedreward`, `qwenvl`: the judge writes, and its score is read out of what it wrote, from 1 to 5;
- `deqa`: the expected quality from 1 to 5 over the probabilities of five words that could come next;
- `geneval2` (arXiv 2512.16853): the mean probability of the right answers to a prompt's questions (`vqa_list`);
- `hpsv3` writes nothing, it is a regression: a server of `wire.py`'s protocol, see `remote`.

The wording here is this project's own. To compare with published numbers give the judge's own by `template`, and where
it prints its score otherwise a rule by `extract`. Values are as judges give them; `divide_by` 5 is the authors' scale.
"""

import base64
import dataclasses
import functools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.console import note
from fopd_jax.exits import need
from fopd_jax.reading import read_regular
from fopd_jax.rewards.options import read_options
from fopd_jax.rewards.reward import Metadata, Reward, Scores, collect
from fopd_jax.rewards.served import remote
from fopd_jax.rewards.served.bearer import find_token
from fopd_jax.rewards.served.png import encode_png
from fopd_jax.rewards.served.transport import Call, Pace, Transport, Unanswered, check_urls, none_of
from fopd_jax.rewards.served.verdicts import (
    LIKELIEST,
    Choice,
    answer_mass,
    average,
    expected_quality,
    read_choice,
    read_rating,
)
from fopd_jax.rewards.served.wire import parse_json, shown

IN_FLIGHT = 16
"""Requests at a time, a replica: such servers batch whatever is under way."""
_NUMBER = r"(\d+(?:\.\d+)?)"
_GREY = (122, 116, 104)  # the mean colour of CLIP's images
_UNIFIED = """This picture was made from a description.

Description: {prompt}

Judge two things together: whether it shows what the description asks for (the objects, their number, colours and
places, any text), and how well it is made (no flaws, plausible shapes and light). Compare in a few sentences, then end
with one line of just this form, where N is a number from 1 (wrong or broken) to 5 (right and excellent):
Final Score: N"""
_QWEN = """Judge how beautiful this picture is: composition, colours, light, detail, and whether it is free of flaws.
Use five levels: 1 very poor, 2 poor, 3 fair, 4 good, 5 excellent; fractions are allowed. Answer in just this form:
<Thought>your reasons in a few sentences</Thought>
<Score>a number from 1 to 5</Score>"""
_QUALITY = "How would you rate the quality of this image?"
_RATINGS: Mapping[str, tuple[str, str, int]] = {
    "unifiedreward": (_UNIFIED, rf"Final Score:[\s*]*{_NUMBER}", 512),
    "qwenvl": (_QWEN, rf"<Score>\s*{_NUMBER}\s*</Score>", 0),
}
"""Template, rule and pixels a side of each."""


@dataclasses.dataclass(frozen=True)
class RatingOptions:
    """`model`: its name at the servers; empty: the only one there. `template`: a file of what is asked, {prompt} in it.

    `extract`: a regular expression whose one group is a score; empty, like `template`: the kind's own. The last
    `numbers` scores from `low` to `high` are averaged. `size`: pixels a side that pictures are resized to; 0: the
    kind's own.

    Raises:
      ValueError: names the option.
    """

    model: str = ""
    template: str = ""
    extract: str = ""
    numbers: int = 1
    low: float = 1.0
    high: float = 5.0
    max_tokens: int = 1024
    size: int = 0

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.extract).groups
        except re.error as error:
            raise ValueError(f"extract: found {self.extract!r}, which is no regular expression: {error}") from error
        if self.extract and groups != 1:
            raise ValueError(f"extract: found {groups} groups in {self.extract!r}, expected one, around the score")
        if not self.low < self.high:
            raise ValueError(f"high: found {self.high}, expected more than low, {self.low}")
        for name, least, most in (("numbers", 1, 100), ("max_tokens", 1, 10**5), ("size", 0, 4096)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected from {least} to {most}")


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """`model`, `template` as in `RatingOptions`; `begins`: the words of the answer before the one that counts."""

    model: str = ""
    template: str = ""
    begins: str = "The quality of the image is"


@dataclasses.dataclass(frozen=True)
class QuestionOptions:
    """`model` as in `RatingOptions`; `mean`: over a prompt's questions; `ends`: what is said behind each.

    Raises:
      ValueError: names the option.
    """

    model: str = ""
    mean: str = "geometric"
    ends: str = "Answer in one word."

    def __post_init__(self) -> None:
        if self.mean not in ("geometric", "arithmetic"):
            raise ValueError(f"mean: found {self.mean!r}, expected 'geometric' or 'arithmetic'")


@dataclasses.dataclass(frozen=True)
class Judge:
    """How one is asked, and what its answers mean.

    `ask(prompt, metadata)`: the texts, each a request with the picture as `show` makes it. `read(answers, metadata)`:
    the value and its details; ValueError where they do not say. `begins`: of the answer. `probabilities`: one token and
    the likeliest ones in its place are asked for.
    """

    ask: Callable[[str, Metadata], Sequence[str]]
    read: Callable[[Sequence[Choice], Metadata], tuple[float, Metadata]]
    limits: tuple[float, float]
    check: Callable[[Metadata], object] = lambda metadata: None
    show: Callable[[np.ndarray], np.ndarray] = lambda image: image
    begins: str = ""
    probabilities: bool = False
    max_tokens: int = 1


def make(name: str, settings: RewardConfig, server: Server | None) -> Reward:
    """A judge at servers, at least one of which is there and has its model.

    Raises:
      ValueError: options are wrong, or no server has the model; names fields, servers and reasons.
    """
    kind, options, field = settings.kind or name, f"rewards.{name}.options", f"run.servers.{name}"
    if kind == "hpsv3":
        return remote.make(name, settings, server)
    if settings.weights:
        raise ValueError(f"rewards.{name}.weights: found {settings.weights!r}, expected '': the server has its own")
    judge, model = _make_judge(kind, settings.options, options)
    need(field, "remote", "httpx")
    if server is None:
        raise ValueError(f"{field}.urls: found none, expected servers of OpenAI's protocol, such as vLLM or SGLang")
    check_urls(server.urls, f"{field}.urls")
    if wrong := [url for url in server.urls if url.rstrip("/").endswith("/v1")]:
        raise ValueError(f"{field}.urls: found {wrong[0]!r}, expected it without /v1")
    token = find_token(server.token_file, f"{field}.token_file")
    transport = Transport(server.urls, token, Pace(server.timeout, server.retries, IN_FLIGHT))
    try:
        model = _find_model(name, model, transport, field)
    except BaseException:
        transport.close()
        raise

    def score(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        return _score(judge, model, transport, images, prompts, metadata)

    def check(prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        for prompt, each in zip(prompts, metadata, strict=True):
            try:
                judge.check(each)
            except ValueError as error:
                raise ValueError(f"prompt {prompt!r}: {error}") from error

    return Reward(name, score, judge.limits, "remote", check, transport.close)


def _score(
    judge: Judge,
    model: str,
    transport: Transport,
    images: UInt8[np.ndarray, "n h w 3"],
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> Scores:
    results: list[tuple[float, Metadata] | Exception] = []
    calls = [_calls(judge, model, *each) for each in zip(images, prompts, metadata, strict=True)]
    answers = iter(transport.ask([call for of_image in calls for call in of_image]))
    for of_image, each in zip(calls, metadata, strict=True):
        said = [next(answers) for _ in of_image]
        lost = [answer for answer in said if isinstance(answer, Unanswered)]
        try:
            results.append(lost[0] if lost else judge.read([a for a in said if isinstance(a, Choice)], each))
        except ValueError as error:
            results.append(error)
    return collect(results)


def _calls(judge: Judge, model: str, image: np.ndarray, prompt: str, metadata: Metadata) -> list[Call[Choice]]:
    """One image's requests; the picture is made once, when the first of them goes out."""
    picture = _once(lambda: f"data:image/png;base64,{base64.b64encode(encode_png(judge.show(image))).decode()}")

    def call(text: str) -> Call[Choice]:
        return Call(
            "/v1/chat/completions",
            lambda: chat_request(judge, model, picture(), text),
            functools.partial(read_choice, probabilities=judge.probabilities),
        )

    try:
        judge.check(metadata)
    except ValueError:
        return []  # nothing is asked, and `read` says why
    return [call(text) for text in judge.ask(prompt, metadata)]


def _once(make: Callable[[], str]) -> Callable[[], str]:
    """The same function, whose value is made by the first call, whichever thread's it is."""
    lock, made = threading.Lock(), list[str]()

    def get() -> str:
        with lock:
            if not made:
                made.append(make())
        return made[0]

    return get


def chat_request(judge: Judge, model: str, picture: str, text: str) -> bytes:
    """A request's body: the picture, then what is asked, at temperature 0."""
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": judge.max_tokens,
    }
    if judge.begins:
        body["messages"].append({"role": "assistant", "content": judge.begins})
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    if judge.probabilities:
        body |= {"logprobs": True, "top_logprobs": LIKELIEST}
    return json.dumps(body, allow_nan=False).encode()


def _find_model(name: str, wanted: str, transport: Transport, field: str) -> str:
    """The model's name, the same at every server that is there; the others are told of."""
    found = transport.survey("/v1/models", lambda body: _read_models(body, wanted), remote.SURVEY_S)
    models = {said for said in found.values() if isinstance(said, str)}
    problems = "; ".join(f"{url}: {said}" for url, said in found.items() if isinstance(said, Unanswered))
    if len(models) > 1:
        raise ValueError(f"{field}.urls: its servers have different models: {', '.join(sorted(models))}")
    if not models:
        raise none_of(found, f"{field}.urls: no server can judge: {problems}")
    if problems:
        note(f"reward {name}: goes on without {problems}")
    return models.pop()


def _read_models(body: bytes, wanted: str) -> str:
    match parse_json(body):
        case {"data": list(entries)}:
            names = [str(each.get("id")) for each in entries if isinstance(each, dict)]
        case _:
            raise ValueError("found no list of models: this is no server of OpenAI's protocol")
    if (wanted and wanted not in names) or (not wanted and len(names) != 1):
        meant = repr(wanted) if wanted else "just one: name it by the option model"
        raise ValueError(f"has the models {', '.join(names) or 'none'}, expected {meant}")
    return wanted or names[0]


# ---- the judges


def _make_judge(kind: str, options: Mapping[str, Any], field: str) -> tuple[Judge, str]:
    """A kind's judge and the model that options name."""
    if kind == "deqa":
        quality = read_options(QualityOptions, options, field)
        return _quality_judge(quality, _template(quality.template, _QUALITY, field)), quality.model
    if kind == "geneval2":
        questions = read_options(QuestionOptions, options, field)
        return _question_judge(questions), questions.model
    rating = read_options(RatingOptions, options, field)
    template, rule, size = _RATINGS[kind]
    template = _template(rating.template, template, field)
    if kind == "unifiedreward" and "{prompt}" not in template:
        raise ValueError(f"{field}.template: {rating.template}: expected {{prompt}} in it, where the prompt goes")
    return _rating_judge(rating, template, re.compile(rating.extract or rule), rating.size or size), rating.model


def _template(file: str, own: str, field: str) -> str:
    if not file:
        return own
    try:
        return read_regular(Path(file)).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise ValueError(f"{field}.template: {file}: {reason}") from error


def _rating_judge(options: RatingOptions, template: str, rule: re.Pattern[str], size: int) -> Judge:
    def read(answers: Sequence[Choice], _: Metadata) -> tuple[float, Metadata]:
        value = read_rating(answers[0], rule, options.numbers, options.low, options.high)
        return value, {"answer": answers[0].text}

    return Judge(
        lambda prompt, _: [template.replace("{prompt}", prompt)],
        read,
        (options.low, options.high),
        show=lambda image: resized(image, size) if size else image,
        max_tokens=options.max_tokens,
    )


def _quality_judge(options: QualityOptions, template: str) -> Judge:
    def read(answers: Sequence[Choice], _: Metadata) -> tuple[float, Metadata]:
        value, probabilities = expected_quality(answers[0].first)
        return value, {"probabilities": probabilities}

    return Judge(
        lambda prompt, _: [template.replace("{prompt}", prompt)],
        read,
        (1.0, 5.0),
        show=squared,
        begins=options.begins,
        probabilities=True,
    )


def _question_judge(options: QuestionOptions) -> Judge:
    def read(answers: Sequence[Choice], metadata: Metadata) -> tuple[float, Metadata]:
        questions = read_questions(metadata)
        found = [answer_mass(each.first, right) for each, (_, right) in zip(answers, questions, strict=True)]
        return average(found, options.mean), {"probabilities": found}

    return Judge(
        lambda _, metadata: [f"{question} {options.ends}".strip() for question, _ in read_questions(metadata)],
        read,
        (0.0, 1.0),
        check=read_questions,
        probabilities=True,
    )


def read_questions(metadata: Metadata) -> list[tuple[str, str]]:
    """GenEval2's questions about a prompt, and the right answer of one word to each.

    Raises:
      ValueError: there are none, or they have another form.
    """
    match metadata.get("vqa_list"):
        case [_, *_] as entries:
            pass
        case found:
            raise ValueError(f"vqa_list: found {shown(found)}, expected GenEval2's questions")
    questions = []
    for i, entry in enumerate(entries):
        match entry:
            case [str(question), str(answer)] if question.strip() and len(answer.split()) == 1:
                questions.append((question, answer))
            case _:
                raise ValueError(f"vqa_list[{i}]: found {shown(entry)}, expected a question and an answer of one word")
    return questions


def resized(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """A square picture of it, bicubic."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def squared(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "side side 3"]:
    """The picture in the middle of a square of CLIP's mean colour."""
    height, width, _ = image.shape
    side = max(height, width)
    square = np.full((side, side, 3), _GREY, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square
