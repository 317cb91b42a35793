"""Rewards of BLIP: `imagereward`, how well people like an image for its prompt, and `blip_vqa`, answers about it.

ImageReward: Xu et al. 2023, arXiv 2304.05977. BLIP-VQA as T2I-CompBench asks it (Huang et al. 2023, arXiv 2307.06350):
the product over a prompt's questions of the probability that an answer begins with "yes".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt8

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.interop.scorers.blip import NETWORK, SPECIAL
from fopd_jax.interop.scorers.weights import CONVERTER, load_weights
from fopd_jax.models.blip import BLIPVQA, BLIPConfig, BLIPTextConfig, BLIPVisionConfig, ImageReward
from fopd_jax.parallel.parts import at_once, in_parts, own_mesh
from fopd_jax.parallel.sharding import replicated
from fopd_jax.rewards.clip import DTYPES
from fopd_jax.rewards.options import read_options
from fopd_jax.rewards.preprocessing import BLIP_VQA, OPEN_CLIP, Pictures, Preprocessing, preprocess, preprocess_within
from fopd_jax.rewards.reward import Metadata, Reward, Scores, Traced, all_failed, collect

REWARD_MEAN, REWARD_STD = 0.16717363, 1.03333947  # of ImageReward's own training pairs [code]
ROWS = 16  # pictures at once on one accelerator
MOST_TOKENS = 35  # of a prompt or question, [code] in both
Rows = dict[str, np.ndarray]
KINDS = {"imagereward": "imagereward", "blip_vqa": "vqa"}


@dataclasses.dataclass(frozen=True)
class Options:
    """`questions`: at most so many an image, in `blip_vqa`. `dtype`: in which the network computes.

    Raises:
      ValueError: a number is out of range, or the dtype is not known.
    """

    questions: int = 8
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 1 <= self.questions <= 1000:
            raise ValueError(f"questions: found {self.questions}, expected 1 to 1000")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")


def make(name: str, settings: RewardConfig, server: Server | None) -> Reward:
    """`imagereward`, standardised as published, without ends; `blip_vqa` in [0, 1].

    A prompt's questions stand in its metadata under `questions`; without them it is asked about itself, with a "?".

    Raises:
      ValueError: an option is wrong, or `weights` is no converted BLIP of this kind; names the field.
    """
    options = read_options(Options, settings.options, f"rewards.{name}.options")
    network = _Network(settings.weights, f"rewards.{name}.weights", KINDS[settings.kind or name], options)
    if network.kind == "imagereward":
        traced = Traced(
            lambda prompts, metadata: _words(network, prompts),
            functools.partial(_image_reward_within, network),
            lambda: network.params,
        )
        return Reward(name, functools.partial(_image_reward, network), (None, None), "device", traced=traced)
    traced = Traced(
        functools.partial(_prepare_questions, network), functools.partial(_vqa_within, network), lambda: network.params
    )
    check = functools.partial(_check, options)
    return Reward(name, functools.partial(_vqa, network), (0.0, 1.0), "device", check, traced=traced)


class _Network:
    """A converted BLIP on this process's devices, its words and its compiled programs."""

    def __init__(self, weights: str, field: str, kind: str, options: Options) -> None:
        if not weights:
            raise ValueError(f"{field}: found nothing, expected a converted BLIP: {CONVERTER}")
        shape, params = load_weights(Path(weights), NETWORK, field)
        if shape["kind"] != kind:
            raise ValueError(f"{field}: {weights}: found BLIP for {shape['kind']}, expected {kind}")
        self.kind, self.options, self.mesh = kind, options, own_mesh()
        self.config = BLIPConfig(BLIPVisionConfig(**shape["vision"]), BLIPTextConfig(**shape["text"]))
        if "vocabulary" not in shape:
            raise ValueError(f"{field}: {weights}: holds no words; convert again with {CONVERTER} --tokenizer")
        self.words = Words(shape["vocabulary"], marked=shape["marked_question"] and kind == "vqa")
        dtype = jnp.dtype(options.dtype)
        self._precision = "highest" if options.dtype == "float32" else "default"  # float32 means it on every device
        self.params = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(dtype), params), replicated(self.mesh))

    @functools.cached_property
    def image_reward(self) -> Callable[[Any, Any], Array]:
        network = ImageReward(self.config, jnp.dtype(self.options.dtype))

        def score(params: Any, rows: Any) -> Array:
            pixels = rows["pixels"].astype(network.dtype)
            with jax.default_matmul_precision(self._precision):
                return network.apply({"params": params}, pixels, rows["ids"], rows["mask"])  # type: ignore[return-value]

        return jax.jit(score)

    @functools.cached_property
    def yes(self) -> Callable[[Any, Any], Array]:
        """Probabilities of "yes" `[b, questions]`; each image is seen once."""
        network = BLIPVQA(self.config, jnp.dtype(self.options.dtype))
        start, yes = self.words.ids["[DEC]"], self.words.ids["yes"]

        def ask(params: Any, rows: Any) -> Array:
            pixels = rows["pixels"].astype(network.dtype)
            with jax.default_matmul_precision(self._precision):
                answers = network.apply({"params": params}, pixels, rows["ids"], rows["mask"], start)
            return jnp.exp(answers[..., yes])  # type: ignore[index]

        return jax.jit(ask)

    @property
    def preprocessing(self) -> Preprocessing:
        return OPEN_CLIP if self.kind == "imagereward" else BLIP_VQA

    def over(self, program: Callable[[Any, Any], Array], images: Pictures, **rows: np.ndarray) -> np.ndarray:
        each = at_once(self.mesh, ROWS)
        pixels = preprocess(images, self.preprocessing, self.config.vision.image_size, self.mesh, each)
        return in_parts(functools.partial(program, self.params), {"pixels": pixels, **rows}, self.mesh, each)

    def within(self, images: UInt8[Array, "b h w 3"], rows: Any) -> Any:
        """A program's rows of pictures of one size, within another program."""
        pixels = preprocess_within(images, self.preprocessing, self.config.vision.image_size)
        return {"pixels": pixels, "ids": rows["ids"], "mask": rows["mask"]}


class Words:
    """BERT's tokens of texts: lower case, without accents, [CLS] before and [SEP] after.

    BLIP's own VQA puts [ENC] in the first one's place (`marked`).

    Raises:
      ValueError: the vocabulary lacks a word that is needed.
    """

    def __init__(self, vocabulary: Sequence[str], marked: bool) -> None:
        from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

        self.ids, self._marked = {word: place for place, word in enumerate(vocabulary)}, marked
        if missing := [word for word in ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "yes", *SPECIAL) if word not in self.ids]:
            raise ValueError(f"vocabulary: found no {missing[0]!r} among {len(vocabulary)} words")
        self._tokenizer = BertWordPieceTokenizer(self.ids, lowercase=True)
        self._tokenizer.enable_truncation(MOST_TOKENS)

    def __call__(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "n s"], Bool[np.ndarray, "n s"]]:
        """Ids, filled up to 35, and which of them are text; what is beyond is cut off, as published."""
        ids = np.full((len(texts), MOST_TOKENS), self.ids["[PAD]"], np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, encoding in enumerate(self._tokenizer.encode_batch(list(texts))):
            ids[row, : len(encoding.ids)], mask[row, : len(encoding.ids)] = encoding.ids, True
        if self._marked:
            ids[:, 0] = self.ids["[ENC]"]
        return ids, mask


def _image_reward(
    network: _Network, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], metadata: Sequence[Metadata]
) -> Scores:
    values = network.over(network.image_reward, list(images), **_words(network, prompts))
    return collect([((float(value) - REWARD_MEAN) / REWARD_STD, {}) for value in values])


def _words(network: _Network, prompts: Sequence[str]) -> Rows:
    ids, mask = network.words(prompts)
    return {"ids": ids, "mask": mask}


def _image_reward_within(
    network: _Network, params: Any, images: UInt8[Array, "b h w 3"], rows: Any
) -> Float[Array, " b"]:
    return (network.image_reward(params, network.within(images, rows)) - REWARD_MEAN) / REWARD_STD


def questions(prompt: str, metadata: Metadata) -> list[str]:
    """What is asked about a prompt's image.

    Raises:
      ValueError: `questions` is there but no list of texts; names the prompt.
    """
    asked = metadata.get("questions", [f"{prompt.rstrip(' .?!')}?"])
    if not isinstance(asked, list | tuple) or not all(isinstance(each, str) and each.strip() for each in asked):
        raise ValueError(f"prompt {prompt!r}: found questions {asked!r}, expected a list of texts")
    return list(asked)


def _check(options: Options, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    for prompt, about in zip(prompts, metadata, strict=True):
        if (count := len(questions(prompt, about))) > options.questions:
            raise ValueError(f"prompt {prompt!r}: found {count} questions, expected at most {options.questions}")


def _vqa(
    network: _Network, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], metadata: Sequence[Metadata]
) -> Scores:
    """The product over questions; 1 of none, as T2I-CompBench has it."""
    try:
        _check(network.options, prompts, metadata)
    except ValueError as error:
        return all_failed(len(images), str(error))
    asked = [questions(*each) for each in zip(prompts, metadata, strict=True)]
    answers = network.over(network.yes, list(images), **_asked(network, asked))
    said = [row[: len(each)].astype(float).tolist() for row, each in zip(answers, asked, strict=True)]
    return collect([(math.prod(each), {"questions": q, "yes": each}) for q, each in zip(asked, said, strict=True)])


def _asked(network: _Network, asked: Sequence[Sequence[str]]) -> Rows:
    """The words of each image's questions, filled up to as many as an image may have."""
    most = network.options.questions
    ids, mask = network.words([text for each in asked for text in (*each, *[""] * (most - len(each)))])
    return {"ids": ids.reshape(-1, most, MOST_TOKENS), "mask": mask.reshape(-1, most, MOST_TOKENS)}


def _prepare_questions(network: _Network, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Rows:
    """Besides, how many each image has: -1 where they are none that can be asked, which is no score."""
    asked, counts = [], []
    for prompt, about in zip(prompts, metadata, strict=True):
        try:
            _check(network.options, [prompt], [about])
            asked.append(questions(prompt, about))
            counts.append(len(asked[-1]))
        except ValueError:
            asked.append([])
            counts.append(-1)
    return {**_asked(network, asked), "counts": np.array(counts, np.int32)}


def _vqa_within(network: _Network, params: Any, images: UInt8[Array, "b h w 3"], rows: Any) -> Float[Array, " b"]:
    answers, counts = network.yes(params, network.within(images, rows)), rows["counts"]
    answered = jnp.arange(answers.shape[1])[None] < counts[:, None]
    return jnp.where(counts >= 0, jnp.where(answered, answers, 1.0).prod(axis=1), jnp.nan)
