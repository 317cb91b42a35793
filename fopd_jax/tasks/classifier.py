"""Which task a prompt is of, from its words alone: multinomial logistic regression on hashed n-grams.

What of a text counts is which words, pairs of words and two to four neighbouring characters of a word are in it, not
how often; each is hashed into one of `BUCKETS` (Weinberger et al. 2009), and a prompt's vector has length 1, so that
long prompts are not surer than short ones. Every class counts alike, whatever the number of its prompts. The loss is
convex, weights start from 0 and go down by L-BFGS in float64.

Weights are multiples of 1/1024, so that sums of them are exact, and probabilities are rounded to as much: whoever has
the same weights finds the same of a prompt.
"""

import base64
import dataclasses
import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int16

BUCKETS = 2**14
UNIT = 1024
"""Weights and probabilities are multiples of 1/UNIT."""
L2 = 1e-4
"""Of ½·L2·‖W‖² beside the mean cross-entropy; vectors have length 1."""
_CHARACTERS = (2, 3, 4)
_WORD = re.compile(r"\w+|[^\w\s]")
_MOST_ITERATIONS, _TOLERANCE = 500, 1e-6


@dataclasses.dataclass(frozen=True)
class PromptClassifier:
    """`weights [K, BUCKETS]` of each of `classes`, in units of 1/1024."""

    classes: tuple[str, ...]
    weights: Int16[np.ndarray, "k buckets"]

    def probabilities(self, prompts: Sequence[str], temperature: float = 1.0) -> Float[np.ndarray, "n k"]:
        """softmax(logits / temperature), rounded to multiples of 1/1024: a row may miss 1 by some of them."""
        if not prompts:
            return np.zeros((0, len(self.classes)))
        vectors, lengths = _vectors(prompts)
        logits = vectors @ self.weights.T.astype(np.float64) / (UNIT * lengths[:, None])
        found = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
        return np.rint(UNIT * found / found.sum(1, keepdims=True)) / UNIT

    def recalls(self, prompts: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """By class the share of its prompts that it is the likeliest class of; of classes without prompts none."""
        return {
            name: float((self.probabilities(each).argmax(1) == self.classes.index(name)).mean())
            for name, each in prompts.items()
            if each
        }

    def dump(self) -> str:
        """The weights as text; most are 0."""
        return base64.b64encode(zlib.compress(self.weights.astype("<i2").tobytes())).decode()

    @classmethod
    def load(cls, classes: tuple[str, ...], text: str) -> "PromptClassifier":
        """From what `dump` returned."""
        flat = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i2").astype(np.int16)
        return cls(classes, flat.reshape(len(classes), BUCKETS))


def train_classifier(prompts: Mapping[str, Sequence[str]]) -> PromptClassifier:
    """From each class's prompts, each of which counts once; a function of them alone.

    Raises:
      ValueError: there are fewer than two classes, or one has no prompt; names it.
    """
    from scipy import optimize  # here: starting without a classifier is not to wait for it

    if len(prompts) < 2:
        raise ValueError(f"found {len(prompts)} tasks with a teacher, expected at least 2 to tell apart")
    if empty := [name for name, each in prompts.items() if not each]:
        raise ValueError(f"found no prompts of task {empty[0]!r}, expected some to train on")
    distinct = [tuple(dict.fromkeys(each)) for each in prompts.values()]
    vectors, lengths = _vectors([prompt for each in distinct for prompt in each])
    used = np.unique(vectors.indices)
    x = vectors[:, used].multiply(1 / lengths[:, None]).tocsr()
    own = np.repeat(np.arange(len(distinct)), [len(each) for each in distinct])
    share = np.repeat([1 / (len(distinct) * len(each)) for each in distinct], [len(each) for each in distinct])
    shape, rows = (len(distinct), len(used)), np.arange(len(own))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = x @ weights.T
        shifted = logits - logits.max(1, keepdims=True)
        total = np.exp(shifted).sum(1)
        value = float(share @ (np.log(total) - shifted[rows, own])) + L2 / 2 * float(flat @ flat)
        errors = np.exp(shifted) * (share / total)[:, None]
        errors[rows, own] -= share
        return value, np.ravel((x.T @ errors).T + L2 * weights)

    options = {"maxiter": _MOST_ITERATIONS, "gtol": _TOLERANCE, "maxcor": 10}
    found: Any = optimize.minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
    weights = np.zeros((len(distinct), BUCKETS), np.int16)
    weights[:, used] = np.clip(np.rint(UNIT * found.x.reshape(shape)), -(2**15), 2**15 - 1)
    return PromptClassifier(tuple(prompts), weights)


# ---- texts as vectors


def _vectors(prompts: Sequence[str]) -> tuple[Any, Float[np.ndarray, " n"]]:
    """Which buckets each prompt's n-grams fall into, as a sparse 0-1 matrix `[n, BUCKETS]`; and its rows' lengths."""
    from scipy import sparse

    found = [sorted(_buckets(prompt)) for prompt in prompts]
    counts = np.array([len(each) for each in found])
    indices = np.fromiter((bucket for each in found for bucket in each), np.int32, counts.sum())
    ends = np.concatenate([[0], np.cumsum(counts)])
    matrix = sparse.csr_matrix((np.ones(len(indices)), indices, ends), (len(prompts), BUCKETS))
    return matrix, np.sqrt(counts)


def _buckets(prompt: str) -> set[int]:
    """Of all n-grams, and one that every prompt has, for what a class weighs by itself."""
    words = _WORD.findall(prompt.casefold())
    found = {_hashed("every")}
    for word in words:
        found |= _of_word(word)
    return found.union(_hashed(f"pair {left} {right}") for left, right in itertools.pairwise(words))


@lru_cache(maxsize=2**16)
def _of_word(word: str) -> frozenset[int]:
    """Of one word: itself, and its characters, with its ends."""
    marked = f"<{word}>"
    parts = {marked[i : i + size] for size in _CHARACTERS for i in range(len(marked) - size + 1)}
    return frozenset([_hashed(f"word {word}"), *(_hashed(f"part {part}") for part in parts)])


def _hashed(text: str) -> int:
    return zlib.crc32(text.encode(errors="surrogatepass")) % BUCKETS
